"""Episodes of a text world, told as tokens: those of a policy, all rows turn by turn, and those of the world's expert.

An episode ends where the world says so. It is cut off after `TextWorld.turns` actions, and where what the world says
next would leave no room for a whole action within the budget of tokens: nothing of it is shown then, and nothing that
was shown is ever taken away.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import closing
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import NamedTuple

import numpy as np
from flax import nnx

from jaxrl_llm.environments.time_limits import time_limit
from jaxrl_llm.environments.worlds import STEP_SECONDS
from jaxrl_llm.environments.worlds import Reply
from jaxrl_llm.environments.worlds import TextEpisodes
from jaxrl_llm.environments.worlds import TextWorld
from jaxrl_llm.rollouts.text_turns import TextTurns
from jaxrl_llm.rollouts.wording import Script
from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Budget(NamedTuple):
    """T, most tokens of an episode, and A, most tokens of an action, its end among them."""

    width: int
    action_tokens: int


@dataclass
class Told:
    """An episode as far as it was told.

    Attributes:
        tokens: everything that was shown and said.
        prompt: tokens of the opening and the prompt, at the beginning.
        steps: which turn each token was chosen in; -1 where it was given.
        log_probs, rewards: of each token, 0 where it was given.
        turns: actions.
        refused: actions that the world could not take.
        ended: whether the world said that it is over.
        cut_off: whether the budget of tokens ended it.
        dropped: whether the world took too long; its return is NaN, so that nothing is learned from it.
    """

    tokens: list[int]
    prompt: int
    steps: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: int = 0
    refused: int = 0
    ended: bool = False
    cut_off: bool = False
    dropped: bool = False

    def __post_init__(self) -> None:
        """Nothing of the prompt was chosen."""
        self._columns(len(self.tokens), OUTSIDE)

    def given(self, ids: Sequence[int]) -> None:
        """The world said something."""
        self.tokens += ids
        self._columns(len(ids), OUTSIDE)

    def chose(self, ids: Sequence[int], log_probs: Sequence[float], *, reward: float, valid: bool) -> None:
        """Somebody acted, and earned something."""
        self.tokens += ids
        self._columns(len(ids), self.turns)
        self.log_probs[-len(ids) :], self.rewards[-1] = log_probs, reward
        self.turns, self.refused = self.turns + 1, self.refused + (not valid)

    def _columns(self, count: int, step: int) -> None:
        self.steps += [step] * count
        self.log_probs += [0.0] * count
        self.rewards += [0.0] * count


class Played(NamedTuple):
    """A batch of episodes.

    Attributes:
        episodes: row = task * G + sample.
        recomputed: tokens that the model read beyond those it had to, once each.
        waiting: share of the time that the policy waited for the world and the tokenizer.
    """

    episodes: list[Told]
    recomputed: int
    waiting: float


class TextStage:
    """A world, how it is written, and how much of it: what the policy's episodes and the expert's have in common."""

    def __init__(self, world: TextWorld, script: Script, budget: Budget, *, seconds: float = STEP_SECONDS) -> None:
        """`seconds` is what the world may take for a step of the policy's [s].

        Raises:
        ValueError: the world has no tasks or no turns, or no action fits into the budget.
        """
        if world.tasks < 1 or world.turns < 1:
            raise ValueError(f"{world.name} has {world.tasks} tasks and {world.turns} turns; it must have one of each.")
        if budget.action_tokens < 1:
            raise ValueError(f"action_tokens is {budget.action_tokens}; it must be at least 1, the end of an action.")
        if len(script.opening) + budget.action_tokens >= budget.width:
            raise ValueError(
                f"width is {budget.width} tokens; an opening of {len(script.opening)} and an action of up to "
                f"{budget.action_tokens} (action_tokens) must leave room for a task in it."
            )
        self.world, self.script, self.budget, self.seconds = world, script, budget, seconds

    def prompt(self, seed: int, text: str) -> list[int]:
        """Tokens of a task's prompt behind the opening.

        Raises:
            ValueError: no action fits behind it.
        """
        prompt = self.script.prompt(text)
        shown = len(self.script.opening) + len(prompt)
        if shown + self.budget.action_tokens > self.budget.width:
            raise ValueError(
                f"the prompt of task {seed} of {self.world.name} has {shown} tokens; with an action of up to "
                f"{self.budget.action_tokens} that is more than width, {self.budget.width}."
            )
        return prompt

    def begin(self, prompt: Sequence[int]) -> Told:
        """An episode of which only the prompt was told."""
        return Told([*self.script.opening, *prompt], len(self.script.opening) + len(prompt))

    def answer(self, told: Told, ids: Sequence[int], log_probs: Sequence[float], reply: Reply | None) -> list[int]:
        """Write down an action and the world's reply, None where it took too long.

        Returns:
            What is shown of the reply; nothing where the episode is over.
        """
        if reply is None:
            told.chose(ids, log_probs, reward=float("nan"), valid=True)
            told.dropped = True
            return []
        told.chose(ids, log_probs, reward=float(reply.reward), valid=reply.valid)
        told.ended = reply.done
        if reply.done or told.turns == self.world.turns:
            return []
        answer = self.script.answer(ids, reply.text)
        if len(told.tokens) + len(answer) + self.budget.action_tokens > self.budget.width:
            told.cut_off = True
            return []
        told.given(answer)
        return answer


def play_texts(
    stage: TextStage,
    policy: TextTurns,
    state: nnx.State,
    seeds: Int[np.ndarray, " N"],
    key: PRNGKey,
    step: int,
    prompt_index: Int[Array, " N"],
    sample_index: Int[Array, " G"],
) -> Played:
    """Groups of G episodes of the policy in these tasks.

    Args:
        stage: where it acts.
        policy: the programs that read and act, for groups of G.
        state: parameters of the policy.
        seeds: the tasks.
        key, step, prompt_index, sample_index: see `TextTurns.begin`.

    Raises:
        ValueError: a prompt does not fit, or a task begins in two ways.
        TimeoutError: a task does not begin in time.
    """
    clock, group_size = _Clock(), len(sample_index)
    with clock.waiting():
        episodes = TextEpisodes(stage.world, np.repeat(seeds, group_size).tolist(), seconds=stage.seconds)
    with closing(episodes):
        with clock.waiting():
            prompts = _prompts(stage, seeds, episodes, group_size)
            told = [stage.begin(prompt) for prompt in prompts for _ in range(group_size)]
        session = policy.begin(state, prompts, key, step, prompt_index, sample_index)
        active = np.ones(len(told), bool)
        for turn in range(stage.world.turns):
            session, said = policy.act(session, turn, active)
            with clock.waiting():
                unread: list[list[int]] = [[] for _ in told]
                chosen = [
                    [column[row, :count].tolist() for column in said[:2]] for row, count in enumerate(said.counts)
                ]
                actions = [
                    stage.script.said(ids) if acts else None for (ids, _), acts in zip(chosen, active, strict=True)
                ]
                replies = episodes.step(actions)
                for row in np.flatnonzero(active):
                    ids, log_probs = chosen[row]
                    answer = stage.answer(told[row], ids, log_probs, replies[row])
                    # The end of an action was drawn and not read.
                    unread[row] = [ids[-1], *answer] if answer else []
            active = np.array([*map(bool, unread)])
            if not active.any():
                break
            session = policy.read(session, unread)
        # Everything once, but for the last token of each row.
        needed = len(stage.script.opening) + sum(map(len, prompts)) + sum(len(t.tokens) - t.prompt - 1 for t in told)
        return Played(told, int(session.reading.reads) - needed, clock.share())


def _prompts(
    stage: TextStage, seeds: Int[np.ndarray, " N"], episodes: TextEpisodes, group_size: int
) -> list[list[int]]:
    """Tokens of each task's prompt, which the episodes of a group share."""
    prompts = []
    for first, seed in zip(range(0, len(seeds) * group_size, group_size), seeds, strict=True):
        group = slice(first, first + group_size)
        if episodes.dropped[group].any():
            raise TimeoutError(f"task {seed} of {stage.world.name} did not begin within {stage.seconds:g} s.")
        if len({*episodes.prompts[group]}) > 1:
            raise ValueError(f"task {seed} of {stage.world.name} begins in two ways; it must in one.")
        prompts.append(stage.prompt(int(seed), episodes.prompts[first]))
    return prompts


def expert_text(stage: TextStage, seed: int) -> Told:
    """What the world's expert does in a task; its log-probs are 0, as it is certain.

    Raises:
        ValueError: the expert knows no action, or one that is longer than an action may be.
        TimeoutError: the world or its expert takes too long.
    """
    name = stage.world.name

    def limited() -> AbstractContextManager[None]:
        return time_limit(stage.seconds, what=f"the expert of {name} in task {seed}")

    with limited():
        begun = stage.world.reset(seed)
    with closing(begun) as episode:
        told = stage.begin(stage.prompt(seed, episode.prompt))
        for _ in range(stage.world.turns):
            with limited():
                action = episode.expert()
            if action is None:
                raise ValueError(
                    f"the expert of {name} knows no action in turn {told.turns + 1} of task {seed}; "
                    "its episodes cannot be learned."
                )
            ids = stage.script.action(action)
            if len(ids) > stage.budget.action_tokens:
                raise ValueError(
                    f"the expert of {name} says {action!r} in task {seed}, {len(ids)} tokens with its "
                    f"end; action_tokens is {stage.budget.action_tokens}, so the policy could not say it."
                )
            with limited():
                reply = episode.step(stage.script.said(ids))
            if not stage.answer(told, ids, [0.0] * len(ids), reply):
                break
        return told


class _Clock:
    """How much of the time since it was made somebody waited."""

    def __init__(self) -> None:
        self._started, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def share(self) -> float:
        return self._waited / (time.perf_counter() - self._started)
