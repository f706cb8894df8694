"""When the mean reward of rollouts has stopped to rise."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Reached when the mean of the last `window` rewards exceeds that of the `window` before by at most `margin`.

    A fall counts too. The reports that wait for a plateau (GLM-4.5, arXiv 2508.06471, section 3) give no rule; this one
    is ours. With rewards of independent noise of standard deviation s, the difference of the two means has s sqrt(2 /
    window): a margin below that is met by chance while the reward still rises.

    Attributes:
        window: rewards per mean. [steps]
        margin: gain that still counts as none. [reward]

    Raises:
        ValueError: a window below 1 or of parts of a step, or a margin that is no finite number of at least 0.
    """

    window: int = 20
    margin: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window is {self.window}; it must be a whole number of at least 1.")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin is {self.margin}; it must be a finite number of at least 0.")

    def seen(self, rewards: tuple[float, ...], reward: float) -> tuple[float, ...]:
        """The rewards that the rule still looks at, with one more.

        Raises:
            ValueError: it is no finite number.
        """
        if not math.isfinite(reward):
            raise ValueError(f"reward is {reward}; the mean reward of a step must be a finite number.")
        return (*rewards, float(reward))[-2 * self.window :]

    def reached(self, rewards: tuple[float, ...]) -> bool:
        """Whether they have stopped to rise; never before there are two windows of them."""
        if len(rewards) < 2 * self.window:
            return False
        before, last = rewards[-2 * self.window : -self.window], rewards[-self.window :]
        return (math.fsum(last) - math.fsum(before)) / self.window <= self.margin
