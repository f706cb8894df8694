"""Experience from a world of texts: groups of episodes of the policy, or of the world's expert.

An action is what the policy writes up to the end of an action, or `action_tokens` tokens of it. Control tokens and
white space around it are taken away, and the world hears the rest, whatever it is: what the world does not understand
it answers in its own words, and that is counted.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.environments.worlds import TextWorld
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect.dialogs import Row
from jaxrl_llm.rollouts.collect.dialogs import rows_to_trajectories
from jaxrl_llm.rollouts.collect.panel_tasks import PanelTasks
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import CollectError
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.samplers import SAMPLING
from jaxrl_llm.rollouts.collect.samplers import Law
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.text_play import Budget
from jaxrl_llm.rollouts.text_play import TextStage
from jaxrl_llm.rollouts.text_play import Told
from jaxrl_llm.rollouts.text_play import expert_text
from jaxrl_llm.rollouts.text_play import play_texts
from jaxrl_llm.rollouts.text_turns import TextTurns
from jaxrl_llm.rollouts.wording import Script
from jaxrl_llm.rollouts.wording import Wording
from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import PRNGKey


class _TextEpisodes(PanelTasks):
    """What collectors of one world of texts share: how episodes are written, and what is told of them."""

    def __init__(
        self,
        world: TextWorld,
        panel: Panel,
        tokenizer: Tokenizer,
        *,
        seed: int,
        tasks: int,
        group_size: int,
        width: int,
        action_tokens: int,
        wording: Wording | None,
        samples: int,
    ) -> None:
        script = Script(Wording() if wording is None else wording, tokenizer)
        self.stage = TextStage(world, script, Budget(width, action_tokens))
        most = min(world.turns * action_tokens, width - 1)
        shape = BatchShape(tasks * group_size, group_size, width, most)
        super().__init__(world, panel, tokenizer, seed=seed, shape=shape, samples=samples)

    def _experience(
        self, seeds: np.ndarray, told: Sequence[Told], metrics: Mapping[str, float], *, version: int | None
    ) -> Experience:
        """`version` is of the weights that acted; None where nobody sampled."""
        rows = _trajectories(told, self._shape, self._tokenizer.pad_id, version)
        turns = np.array([one.turns for one in told])
        return Experience(
            trajectories=rows,
            per_row={
                "world/solved": np.asarray(rows.returns) > 0,
                "world/turns": turns,
                "world/refused": np.array([one.refused for one in told]) / turns,
                "world/cut_off": np.array([one.cut_off for one in told]),
                "world/tokens": np.array([len(one.tokens) for one in told]),
            },
            # Of the whole batch: rows that were dropped are in no mean over rows.
            metrics={**metrics, "world/dropped": float(np.mean([one.dropped for one in told]))},
            samples=self.written(seeds, rows),
            texts=self.texts(rows, np.asarray(rows.action_mask)),
        )


class TextAgentCollector(_TextEpisodes):
    """The policy acts in a world of texts; a group is several episodes of one task."""

    def __init__(
        self,
        world: TextWorld,
        panel: Panel,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int,
        tasks: int,
        group_size: int,
        width: int,
        action_tokens: int,
        wording: Wording | None = None,
        sampling: SamplingSettings | None = None,
        samples: int = 0,
        decode_dtype: Any = None,
    ) -> None:
        """Nothing is compiled, and no task begun, before the first batch.

        Args:
            world: where the policy acts.
            panel: the tasks that batches are drawn from.
            model: for its structure; the weights come with each policy.
            tokenizer: of the policy.
            seed: of the tasks.
            tasks: tasks per batch.
            group_size: episodes per task.
            width: T, most tokens of an episode. One is cut off where what the world says next would leave no room for
                a whole action.
            action_tokens: most tokens of an action, its end among them. One that is longer ends there, and is given an
                end that is not learned.
            wording: how episodes are written; `Wording()` where None.
            sampling: temperature and truncation; the whole softmax where None. Its temperature must be that of the
                run's settings, at which the trainer scores what was sampled.
            samples: tasks of each batch whose first episode is written down.
            decode_dtype: see `make_generate`.

        Raises:
            ValueError: the panel is of another world or empty, the world has no tasks, the end of an action is not one
                token, no action fits into the width, or the width into the model.
        """
        options = {"seed": seed, "tasks": tasks, "group_size": group_size, "samples": samples}
        super().__init__(world, panel, tokenizer, width=width, action_tokens=action_tokens, wording=wording, **options)
        if width > model.config.max_positions:
            raise ValueError(f"width is {width}; the model has {model.config.max_positions} positions.")
        self.sampling = SamplingSettings() if sampling is None else sampling
        self.law = Law(known=not self.sampling.truncated)
        script = self.stage.script
        self._turns = TextTurns(
            model,
            opening=script.opening,
            group_size=group_size,
            slots=width - len(script.opening),
            action_tokens=action_tokens,
            sampling=self.sampling,
            end_ids=script.end_ids,
            pad_id=tokenizer.pad_id,
            decode_dtype=decode_dtype,
        )

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`."""
        seeds = self.tasks(step)
        key = jax.random.fold_in(key, SAMPLING)
        order, samples = jnp.arange(len(seeds)), jnp.arange(self._shape.group_size)
        try:
            played = play_texts(self.stage, self._turns, policy.state, seeds, key, step, order, samples)
        except TimeoutError as error:
            raise CollectError(str(error)) from error
        if all(one.dropped for one in played.episodes):
            raise CollectError(
                f"{self.stage.world.name} took too long in every episode; is what it runs in still alive?"
            )
        metrics = {"world/recomputed": float(played.recomputed), "perf/world_share": played.waiting}
        return self._experience(seeds, played.episodes, metrics, version=policy.version)


class TextExpertCollector(_TextEpisodes):
    """The world's expert acts; for a supervised warm start, which learns its actions and their ends only."""

    brings = Brings(log_probs=False)

    def __init__(
        self,
        world: TextWorld,
        panel: Panel,
        tokenizer: Tokenizer,
        *,
        seed: int,
        tasks: int,
        width: int,
        action_tokens: int,
        wording: Wording | None = None,
        samples: int = 0,
    ) -> None:
        """Args: as `TextAgentCollector`; a group is one episode, as the expert always does the same."""
        options = {"seed": seed, "tasks": tasks, "group_size": 1, "samples": samples}
        super().__init__(world, panel, tokenizer, width=width, action_tokens=action_tokens, wording=wording, **options)

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`."""
        seeds = self.tasks(step)
        try:
            told = [expert_text(self.stage, int(seed)) for seed in seeds]
        except TimeoutError as error:
            raise CollectError(str(error)) from error
        return self._experience(seeds, told, {}, version=None)


def _trajectories(told: Sequence[Told], shape: BatchShape, pad_id: int, version: int | None) -> Trajectories:
    rows = rows_to_trajectories(
        [Row(np.array(one.tokens), np.array(one.steps), one.ended) for one in told],
        width=shape.width,
        pad_id=pad_id,
        group_ids=np.repeat(np.arange(shape.groups), shape.group_size).tolist(),
        outcomes=[0.0] * len(told),
    )

    def column(values: Sequence[Sequence[float]]) -> np.ndarray:
        found = np.zeros(rows.tokens.shape, np.float32)
        for row, numbers in enumerate(values):
            found[row, : len(numbers)] = numbers
        return found

    rows = dataclasses.replace(rows, rewards=column([one.rewards for one in told]))
    if version is None:
        return rows
    chosen = np.asarray(rows.action_mask)
    return dataclasses.replace(
        rows,
        log_prob_behaviour=column([one.log_probs for one in told]),
        versions=np.where(chosen, np.int32(version), np.int32(OUTSIDE)),
    )
