"""What a collector is: it brings a batch of experience, and knows nothing of losses, signals or optimisers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

import numpy as np
from flax import nnx

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.trajectory import check_trajectory
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class CollectError(RuntimeError):
    """Experience could not be collected; the sentence says what happened and what helps."""


@dataclass(frozen=True)
class PolicySnapshot:
    """The policy at one moment, valid until the next update takes its buffers over.

    Attributes:
        graphdef: structure of the model.
        state: all its parameters.
        version: updates that made them.
    """

    graphdef: nnx.GraphDef[Transformer]
    state: nnx.State
    version: int

    def model(self) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, self.state)


@dataclass(frozen=True)
class BatchShape:
    """The sizes of every batch of a collector, so that what is compiled for one serves all.

    Attributes:
        rows: B, rows of a batch.
        group_size: rows that are compared with each other, neighbours in the batch.
        width: T, tokens of a row.
        actions: R, most tokens of a row that the policy chose.
        prompt_length: P, where every row is a left-padded prompt of this width and one stretch of T - P chosen tokens;
            None where rows have another form.
    """

    rows: int
    group_size: int
    width: int
    actions: int
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "group_size", "width", "actions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.rows % self.group_size:
            raise ValueError(f"rows is {self.rows}; it must be a multiple of group_size, {self.group_size}.")

    @property
    def groups(self) -> int:
        """Groups of a batch."""
        return self.rows // self.group_size


@dataclass(frozen=True)
class Brings:
    """What every batch of a collector has, beside its tokens.

    Attributes:
        rewards: whether anybody rewarded what was chosen; where nobody did, all rewards are 0.
        log_probs: whether the log-probs of the policy that sampled are recorded; where they are not, no policy sampled.
        pairs: whether its groups are pairs of which one side is to be learned and the other one not.
    """

    rewards: bool = True
    log_probs: bool = True
    pairs: bool = False


@dataclass(frozen=True)
class Experience:
    """A batch of trajectories, and what only the host needs of it.

    Attributes:
        trajectories: arrays on the host, in the collector's shape.
        per_row: numbers of each row, whose means over the rows that are learned from are metrics.
        metrics: other numbers of the step.
        samples: JSON rows for people to read.
        texts: what was chosen in each row, decoded; empty where nobody decoded it.
        cursor: where the collector stands after this batch, in JSON.
        selections: the k experts to which each of L layers sent each token when it was sampled, where that was
            recorded (`Rollout.selections`).
    """

    trajectories: Trajectories
    per_row: Mapping[str, Float[Any, " B"]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    texts: tuple[str, ...] = ()
    cursor: Mapping[str, Any] = field(default_factory=dict)
    selections: Int[np.ndarray, "B T L k"] | None = None


class Collector(Protocol):
    """Brings batches of experience.

    One that lacks rewards or recorded log-probs says so in an attribute `brings`, a `Brings`, so that what reads them
    is refused before anything is computed; a collector without the attribute has both. One whose batches the present
    policy samples from its whole softmax says so in `law`, a `Law`: then bounds and exact masks are computed. If it
    samples itself, `sampling` are its settings, whose temperature must be that of the run.
    """

    @property
    def shape(self) -> BatchShape:
        """The sizes of every batch."""
        ...

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """The batch of step number `step` (0 is the first): the same for the same arguments, so that a run that was
        stopped goes on as if it had not been.

        Args:
            policy: the policy now; a collector of files does not look at it.
            key: root of the random numbers of the run; `step` is folded in.
            step: the number of the batch.
            cursor: what the batch before said; empty at the start.

        Raises:
            ValueError: settings that cannot be, found by looking at the first batch.
            CollectError, EngineError: it could not be had.
        """
        ...


def brought_by(collector: Collector) -> Brings:
    """What a collector says that it brings."""
    return getattr(collector, "brings", Brings())


def check_experience(experience: Experience, shape: BatchShape, *, vocab_size: int, name: str) -> None:
    """Hold a batch to what is true of every batch, and to what its collector promised.

    Args:
        experience: the batch.
        shape: the collector's.
        vocab_size: tokens of the policy.
        name: of the collector, for the sentence.

    Raises:
        CollectError: naming what is wrong with it.
    """
    try:
        check_trajectory(experience.trajectories, vocab_size=vocab_size)
    except (TypeError, ValueError) as error:
        raise CollectError(f"{name} collected experience that cannot be: {error}") from error
    rows, width = np.shape(experience.trajectories.tokens)
    if (rows, width) != (shape.rows, shape.width):
        raise CollectError(
            f"{name} collected {rows} rows of {width} tokens; it promised {shape.rows} of {shape.width}."
        )
    most = int(np.sum(experience.trajectories.action_mask, axis=1).max())
    if not 0 < most <= shape.actions:
        what = f"a row with {most} chosen tokens" if most else "rows in which the policy chose no token"
        raise CollectError(f"{name} collected {what}; it promised 1 to {shape.actions}.")
    groups = np.asarray(experience.trajectories.group_ids).reshape(shape.groups, shape.group_size)
    if (groups != groups[:, :1]).any():
        group = int(np.argmax((groups != groups[:, :1]).any(axis=1)))
        raise CollectError(
            f"{name} promised groups of {shape.group_size} neighbours, and rows {group * shape.group_size} to "
            f"{(group + 1) * shape.group_size - 1} have the group_ids {groups[group].tolist()}; they must be equal."
        )
    for what, value in (("cursor", dict(experience.cursor)), ("samples", list(map(dict, experience.samples)))):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise CollectError(f"The {what} of {name} must be JSON, so that it can be saved: {error}.") from error
