"""Iterated distillation: reinforcement to a plateau, its answers as the new cold start, harder tasks."""

import dataclasses
from typing import Literal

from jaxrl_llm.training.phases.plateau import Plateau


@dataclasses.dataclass(frozen=True)
class Phase:
    """Where a run stands: numbers and a name, which can be saved by the caller, as JSON for example.

    Attributes:
        kind: what is done now.
        level: of the tasks, 0 the easiest.
        rewards: mean rewards of the steps of this phase that its end depends on.
    """

    kind: Literal["reinforce", "collect", "imitate", "done"] = "reinforce"
    level: int = 0
    rewards: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", tuple(self.rewards))  # JSON has lists


@dataclasses.dataclass(frozen=True)
class IteratedDistillation:
    """reinforce (to a plateau) -> collect (answers of that policy) -> imitate (them, in the place of the first
    demonstrations) -> reinforce on the next level -> ... -> done, after the plateau of the last level.

        phase = plan.observe(phase, mean reward)     in "reinforce", after each step
        phase = plan.finished(phase)                 in "collect" and "imitate", when they are

    Source: GLM-4.5 (arXiv 2508.06471, section 3, agentic RL). The report says neither how many rounds, nor what a
    plateau is, nor whether imitation starts from the base model or the last one.

    Attributes:
        levels: of difficulty, one round of reinforcement each.
        plateau: the rule.

    Raises:
        ValueError: fewer than one level.
    """

    levels: int
    plateau: Plateau = dataclasses.field(default_factory=Plateau)

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels is {self.levels}; it must be at least 1.")

    def observe(self, phase: Phase, reward: float) -> Phase:
        """The phase after a step of reinforcement with this mean reward.

        Raises:
            ValueError: in another phase, or for a reward that is no finite number.
        """
        self._require(phase, "reinforce")
        rewards = self.plateau.seen(phase.rewards, reward)
        if not self.plateau.reached(rewards):
            return dataclasses.replace(phase, rewards=rewards)
        return Phase("done" if phase.level == self.levels - 1 else "collect", phase.level)

    def finished(self, phase: Phase) -> Phase:
        """The phase after collecting or imitating.

        Raises:
            ValueError: in another phase.
        """
        self._require(phase, "collect", "imitate")
        return Phase("imitate", phase.level) if phase.kind == "collect" else Phase("reinforce", phase.level + 1)

    def _require(self, phase: Phase, *kinds: str) -> None:
        if phase.kind not in kinds or not 0 <= phase.level < self.levels:
            raise ValueError(
                f"phase is {phase.kind!r} of level {phase.level}; it must be {' or '.join(map(repr, kinds))} of a "
                f"level below {self.levels}."
            )
