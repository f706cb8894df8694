"""Tasks of the reasoning-gym package: its generators under a time limit, its verifiers, a split by problem identity."""

import functools
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.environments.splits import stable_key
from jaxrl_llm.environments.tasks import Problem
from jaxrl_llm.environments.tasks import Score
from jaxrl_llm.environments.tasks import before_stop
from jaxrl_llm.environments.tasks import final_answer
from jaxrl_llm.environments.tasks import is_number
from jaxrl_llm.environments.time_limits import AlarmError
from jaxrl_llm.environments.time_limits import TimeLimitError
from jaxrl_llm.environments.time_limits import time_limit
from jaxrl_llm.environments.verifiers import REFUSED
from jaxrl_llm.environments.verifiers import Entry
from jaxrl_llm.environments.verifiers import Verifier
from jaxrl_llm.environments.verifiers import require_scorable
from jaxrl_llm.environments.verifiers import too_long
from jaxrl_llm.environments.verifiers import verifier_of

MAX_DRAWS = 10_000
"""Keys tried for one problem before the settings are called impossible."""
MAX_FAILURES = 5
"""Keys of one problem that may time out or fail before the error is passed on."""
NEW_PROBLEM_PATIENCE = 5_000
"""The search for held-out problems ends after this many keys in a row that gave no new one."""


def question_prompt(entry: Entry) -> str:
    """The question as it stands."""
    return entry["question"]


def question_identity(entry: Entry) -> str:
    """The question with its case and white space evened out: right only where no rephrasing occurs."""
    return " ".join(entry["question"].lower().split())


def every_entry(entry: Entry) -> bool:
    """Keep all."""
    return True


class GenerationError(RuntimeError):
    """A generator of reasoning-gym raised."""


def matching_places(given: str, wanted: str) -> float:
    """The fraction of places that are right, units under units, of as many as the longer number has.

        sum_i 1[given_i = wanted_i] / max(len(given), len(wanted)),  i counted from the last letter

    "52" for "42" has 1 of 2 right, "5" for "42" none, "142" for "42" 2 of 3.
    """
    longest = max(len(given), len(wanted))
    right = sum(g == w for g, w in zip(reversed(given), reversed(wanted), strict=False))
    return right / longest if longest else 0.0


@dataclass(frozen=True)
class GeneratedTask:
    """A dataset of reasoning-gym as a task; see `jaxrl_llm.environments.tasks.Task` for the members all tasks have.

    Problem `index` of step `step` is generated with the key stable_key("train", seed, step, index, attempt), attempt
    counting up over keys whose problem is held out or not wanted, and over keys on which the generator timed out or
    raised. The latter stand in the metadata of the problem as `replaced_keys`. The limit is wall-clock time, so the
    problems are a function of (seed, step) as long as no generator finishes near its limit, which is set thousands of
    times above what the generators take.

    Attributes:
        name: what it is registered as.
        dataset: name of the dataset in reasoning-gym; one whose verifier evaluates answers is refused, see
            `jaxrl_llm.environments.verifiers`.
        config: the dataset's settings, without size and seed.
        prompt: entry -> the text to continue.
        identity: entry -> canonical form; see `Problem`.
        keep: entry -> whether the problem belongs to the family.
        place_credit: reward of a wrong number per fraction of matching places, in [0, 1); see `matching_places`.
            It shapes the reward only: lenient and strict scores stay right or wrong.
        wordy_reward: reward of a right final answer with other text around it, in [0, 1]. Below 1 it keeps the whole
            answer clean: at 1, what follows the number is free to drift.
        stop: the text that ends an answer.
        held_out_count: at most this many problems are in held_out(); all others of that third stay untouched.
        seconds: limit for one call of a generator or a verifier [s].

    Raises:
        UnsafeVerifierError: the dataset is refused; one that is not known here is when it is first used.
        ValueError: place_credit or wordy_reward out of range.
    """

    name: str
    dataset: str
    config: Mapping[str, Any] = field(default_factory=dict)
    prompt: Callable[[Entry], str] = question_prompt
    identity: Callable[[Entry], str] = question_identity
    keep: Callable[[Entry], bool] = every_entry
    place_credit: float = 0.0
    wordy_reward: float = 1.0
    stop: str = "\n"
    held_out_count: int = 128
    seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.place_credit < 1.0:
            raise ValueError(f"place_credit is {self.place_credit}; it must be in [0, 1).")
        if not 0.0 <= self.wordy_reward <= 1.0:
            raise ValueError(f"wordy_reward is {self.wordy_reward}; it must be in [0, 1].")
        if self.dataset in REFUSED:
            require_scorable(self.dataset)

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """`count` problems whose identity is not held out.

        Raises:
            TimeLimitError: the last of `MAX_FAILURES` keys that failed ran into the limit.
            GenerationError: the last of `MAX_FAILURES` keys that failed made the generator raise.
            ValueError: the settings allow no problem, or reasoning-gym refuses them.
        """
        return [self._draw(seed, step, index) for index in range(count)]

    def held_out(self) -> list[Problem]:
        """The first `held_out_count` distinct held-out problems along a fixed sequence of keys."""
        return list(self._held_out)

    def score(self, problem: Problem, text: str) -> Score:
        """Verifier of the dataset on the final answer (lenient) and on the whole text (strict).

        The reward is 1 if strict, wordy_reward if lenient only, else place_credit * matching_places(final, right).
        An answer on which the verifier fails or does not end in time is wrong, and so is one that is too long to be
        looked at (`verifiers.LONGEST_ANSWER`).
        """
        text = before_stop(text, self.stop).strip()
        if too_long(text, problem.answer):
            return Score(reward=0.0, lenient=False, strict=False)
        final = final_answer(text, like=problem.answer)
        lenient = self._verified(problem, final)
        if text == final or is_number(problem.answer):
            strict = lenient and text == final
        else:
            strict = self._verified(problem, text)
            lenient = lenient or strict  # answers of several lines
        if strict:
            reward = 1.0
        else:
            reward = self.wordy_reward if lenient else self.place_credit * matching_places(final, problem.answer)
        return Score(reward=reward, lenient=lenient, strict=strict)

    @functools.cached_property
    def _held_out(self) -> tuple[Problem, ...]:
        found: dict[str, Problem] = {}
        since_new = attempt = 0
        while len(found) < self.held_out_count and since_new < NEW_PROBLEM_PATIENCE:
            since_new += 1
            problem = self._problem(stable_key("held out", attempt))
            attempt += 1
            if problem is not None and is_held_out(problem.identity) and problem.identity not in found:
                found[problem.identity] = problem
                since_new = 0
        if not found:
            raise ValueError(
                f"{self.name}: no held-out problem among {attempt} keys; the settings allow too few problems."
            )
        return tuple(found.values())

    def _draw(self, seed: int, step: int, index: int) -> Problem:
        replaced: list[int] = []
        for attempt in range(MAX_DRAWS):
            key = stable_key("train", seed, step, index, attempt)
            try:
                problem = self._generate(key)
            except (TimeLimitError, GenerationError):
                replaced.append(key)
                if len(replaced) >= MAX_FAILURES:
                    raise
                continue
            if problem is not None and not is_held_out(problem.identity):
                return Problem(
                    problem.prompt,
                    problem.answer,
                    problem.identity,
                    {**problem.metadata, "replaced_keys": tuple(replaced)},
                )
        raise ValueError(
            f"{self.name}: no problem to train on among {MAX_DRAWS} keys; the settings allow too few problems."
        )

    def _problem(self, key: int) -> Problem | None:
        try:
            return self._generate(key)
        except (TimeLimitError, GenerationError):
            return None

    def _generate(self, key: int) -> Problem | None:
        """The problem of a key, or None where it is not of the family."""
        what = f"generator {self.dataset!r} with key {key} and settings {dict(self.config)}"
        _reasoning_gym()  # The first import takes seconds, which are not the generator's.
        with time_limit(self.seconds, what=what):
            dataset = self._create(seed=key, size=1)
            try:
                entry = dataset[0]
            except (Exception, SystemExit) as error:
                raise GenerationError(f"{what} failed: {error}") from error
        if not self.keep(entry):
            return None
        metadata = {"key": key, "entry": entry, "replaced_keys": ()}
        return Problem(self.prompt(entry), str(entry["answer"]), self.identity(entry), metadata)

    def _create(self, **arguments: Any) -> Any:
        datasets = _reasoning_gym()
        if self.dataset in datasets.factory.DATASETS:
            require_scorable(self.dataset)
        try:
            return datasets.create_dataset(self.dataset, **self.config, **arguments)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{self.name}: reasoning-gym refuses {self.dataset!r} with {dict(self.config)}: {error}"
            ) from error

    @functools.cached_property
    def _verifier(self) -> Verifier:
        return verifier_of(self.dataset, self._create(seed=0, size=1).score_answer)

    def _verified(self, problem: Problem, answer: str) -> bool:
        verifier = self._verifier
        try:
            with time_limit(self.seconds, what=f"verifier of {self.dataset!r}"):
                return bool(verifier(answer, problem.metadata["entry"]) >= 1.0)
        except (KeyboardInterrupt, AlarmError):  # the user's, or a time limit's around this one
            raise
        except BaseException:
            # The text comes from a model, the verifier from a package: whatever goes wrong, SystemExit included, the
            # answer was not right.
            return False


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("this task needs the package reasoning-gym: pip install 'jaxrl_llm[llm]'.") from error
    return reasoning_gym
