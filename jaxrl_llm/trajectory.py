"""Experience, one way: what every collector makes and every signal and update reads.

A batch is B rows of T tokens. What the policy chose is said by `action_mask`: one stretch per row for a single answer,
several where it acted more than once. Every `[B, T]` column is aligned to its token: the reward, log-prob and version
at column t belong to token t. `Actions` gathers the chosen tokens into `[B, R]` columns, which is where signals and
losses live; nothing else slices a row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

OUTSIDE = -1
"""Step, actor and version of a token that nobody chose."""

OPTIONAL = ("log_prob_behaviour", "routes")
"""Columns that may be None."""

KINDS = {jnp.integer: "integer", jnp.bool_: "bool", jnp.floating: "floating"}
"""Kinds of dtypes, as a sentence names them."""

LOG_PROB_SLACK = 1e-3
"""How far above 0 rounding may put the log-prob of a certain token [nats]."""


Column = Array | np.ndarray
"""On the host, or under jit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectories:
    """B rows of T tokens, who chose which, and what it earned; NumPy arrays on the host, or arrays under jit.

    Attributes:
        tokens: token ids.
        token_mask: true at real tokens; padding may stand on either side.
        action_mask: true at tokens that the policy chose, an end token included. Never the first real token of its
            row, as nothing predicts that one.
        group_ids: equal for rows that are compared with each other: answers to one prompt, the sides of a pair.
        rewards: of each token: what a step earned at the last token chosen in it, the outcome at the last chosen token
            of the row; 0 elsewhere. Their sum is the return of the row.
        log_prob_behaviour: of each chosen token under the policy that sampled it, in the precision that did [nats], 0
            elsewhere; None where nobody recorded it, as in demonstrations.
        step_ids: which step of its row each chosen token belongs to, 0, 1, ..; -1 elsewhere.
        actor_ids: who chose each token, 0 where there is one actor; -1 elsewhere.
        versions: number of updates of the weights that sampled each chosen token; -1 elsewhere and where unknown.
        ended: whether the row came to its end; false where it was cut off at its width.
        routes: experts that each token went to in each layer, where they were recorded.
    """

    tokens: Int[Column, "B T"]
    token_mask: Bool[Column, "B T"]
    action_mask: Bool[Column, "B T"]
    group_ids: Int[Column, " B"]
    rewards: Float[Column, "B T"]
    log_prob_behaviour: Float[Column, "B T"] | None
    step_ids: Int[Column, "B T"]
    actor_ids: Int[Column, "B T"]
    versions: Int[Column, "B T"]
    ended: Bool[Column, " B"]
    routes: Int[Column, "B T L K"] | None = None

    @property
    def returns(self) -> Float[Column, " B"]:
        """What each row earned: the sum of its rewards."""
        return self.rewards.sum(axis=-1)


def single_step(
    tokens: Int[np.ndarray, "B T"],
    token_mask: Bool[np.ndarray, "B T"],
    action_mask: Bool[np.ndarray, "B T"],
    *,
    group_ids: Int[np.ndarray, " B"],
    outcomes: Float[np.ndarray, " B"],
    ended: Bool[np.ndarray, " B"],
    log_prob_behaviour: Float[np.ndarray, "B T"] | None = None,
    version: int = OUTSIDE,
) -> Trajectories:
    """Rows in which one actor took one step, and only the outcome was rewarded.

    Args:
        tokens, token_mask, action_mask, group_ids, ended, log_prob_behaviour: as in `Trajectories`.
        outcomes: reward of each row; it is put at the last chosen token.
        version: updates of the weights that sampled.

    Raises:
        ValueError: a row has an outcome and no chosen token to put it at.
    """
    actions = np.asarray(action_mask, bool)
    chosen = actions.any(axis=1)
    outcomes = np.asarray(outcomes, np.float32)
    lost = ~chosen & (outcomes != 0)
    if lost.any():
        row = int(np.argmax(lost))
        raise ValueError(
            f"row {row} has the outcome {outcomes[row]} and no action token to put it at; every row must have one."
        )
    rewards = np.zeros(actions.shape, np.float32)
    last = np.where(actions, np.arange(actions.shape[1]), -1).max(axis=1, initial=-1)
    rewards[chosen, last[chosen]] = outcomes[chosen]
    nobody = np.full(actions.shape, OUTSIDE, np.int32)
    return Trajectories(
        tokens=np.asarray(tokens),
        token_mask=np.asarray(token_mask, bool),
        action_mask=actions,
        group_ids=np.asarray(group_ids),
        rewards=rewards,
        log_prob_behaviour=None if log_prob_behaviour is None else np.asarray(log_prob_behaviour),
        step_ids=np.where(actions, np.int32(0), nobody),
        actor_ids=np.where(actions, np.int32(0), nobody),
        versions=np.where(actions, np.int32(version), nobody),
        ended=np.asarray(ended, bool),
    )


@dataclasses.dataclass(frozen=True)
class Actions:
    """Where the chosen tokens of each row stand, in order, and how many there are.

    Attributes:
        columns: column of each chosen token in its row; 0 beyond the last one.
        mask: true where there is one.
    """

    columns: Int[np.ndarray, "B R"]
    mask: Bool[np.ndarray, "B R"]

    @classmethod
    def of(cls, trajectories: Trajectories, *, width: int | None = None) -> "Actions":
        """The chosen tokens of every row, in `width` columns; None takes the most that a row has.

        Raises:
            ValueError: a row has more chosen tokens than `width`.
        """
        mask = np.asarray(trajectories.action_mask)
        counts = mask.sum(axis=1)
        most = int(counts.max(initial=0))
        width = max(most, 1) if width is None else width
        if most > width:
            raise ValueError(f"width is {width}; a row has {most} action tokens, and width must hold them all.")
        columns = np.zeros((len(mask), width), np.int32)
        rows, places = np.nonzero(mask)
        columns[rows, (np.cumsum(mask, axis=1) - 1)[rows, places]] = places
        return cls(columns, np.arange(width) < counts[:, None])

    def take(self, values: Any, *, fill: Any = 0) -> np.ndarray:
        """A `[B, T, ..]` column at the chosen tokens, `[B, R, ..]`, in its own dtype; `fill` beyond the last one."""
        values = np.asarray(values)
        gathered = values[np.arange(len(values))[:, None], self.columns]
        mask = self.mask.reshape(self.mask.shape + (1,) * (values.ndim - 2))
        return np.where(mask, gathered, np.asarray(fill, gathered.dtype))


def check_trajectory(trajectories: Trajectories, *, vocab_size: int | None = None) -> None:
    """What is true of every batch of experience, whoever collected it.

    Numbers that are not finite are let through in `rewards` and `log_prob_behaviour`: the trainer drops and counts
    those rows.

    Args:
        trajectories: arrays on the host.
        vocab_size: if given, ids must lie in 0 .. vocab_size - 1.

    Raises:
        TypeError: a column has another kind of dtype.
        ValueError: naming the first row that breaks a rule, and the rule.
    """
    _check_columns(trajectories)
    t = trajectories
    tokens, real, actions = (np.asarray(x) for x in (t.tokens, t.token_mask, t.action_mask))
    if vocab_size is not None:
        strange = real & ((tokens < 0) | (tokens >= vocab_size))
        _refuse(strange, f"has a token outside 0 .. {vocab_size - 1}")
    _refuse(actions & ~real, "has an action token that is no real token (token_mask is false there)")
    first = np.cumsum(real, axis=1) == 1
    _refuse(actions & real & first, "has its first real token as an action; nothing predicts that one")
    holes = np.diff(real.astype(np.int8), axis=1, prepend=0, append=0) == 1
    _refuse(holes.sum(axis=1, keepdims=True) > 1, "has padding between real tokens")
    for name, column in (("step_ids", t.step_ids), ("actor_ids", t.actor_ids)):
        ids = np.asarray(column)
        _refuse(actions & (ids < 0), f"has an action token with {name} below 0")
        _refuse(~actions & (ids != OUTSIDE), f"has {name} other than {OUTSIDE} where no token was chosen")
    versions = np.asarray(t.versions)
    _refuse(actions & (versions < OUTSIDE), f"has a version below {OUTSIDE}")
    _refuse(~actions & (versions != OUTSIDE), f"has a version other than {OUTSIDE} where no token was chosen")
    columns = Actions.of(t)
    steps = columns.take(t.step_ids)
    backwards = (np.diff(steps, axis=1) < 0) & columns.mask[:, 1:]
    _refuse(backwards, "has steps that go backwards")
    _refuse(~actions & (np.asarray(t.rewards) != 0), "has a reward at a token that was not chosen")
    if t.log_prob_behaviour is not None:
        behaviour = np.asarray(t.log_prob_behaviour)
        _refuse(~actions & (behaviour != 0), "has a log-prob other than 0 at a token that was not chosen")
        _refuse(actions & np.isfinite(behaviour) & (behaviour > LOG_PROB_SLACK), "has a log-prob above 0")


def _check_columns(t: Trajectories) -> None:
    shape = np.shape(t.tokens)
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"tokens has shape {shape}; it must have two axes, rows and at least one token.")
    columns: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
        "tokens": (t.tokens, jnp.integer, shape),
        "token_mask": (t.token_mask, jnp.bool_, shape),
        "action_mask": (t.action_mask, jnp.bool_, shape),
        "group_ids": (t.group_ids, jnp.integer, shape[:1]),
        "rewards": (t.rewards, jnp.floating, shape),
        "log_prob_behaviour": (t.log_prob_behaviour, jnp.floating, shape),
        "step_ids": (t.step_ids, jnp.integer, shape),
        "actor_ids": (t.actor_ids, jnp.integer, shape),
        "versions": (t.versions, jnp.integer, shape),
        "ended": (t.ended, jnp.bool_, shape[:1]),
    }
    for name, (column, kind, wanted) in columns.items():
        if column is None and name in OPTIONAL:
            continue
        array = np.asarray(column)
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}; it must be {wanted} beside tokens of {shape}.")
        _require_kind(name, array, kind)
    if t.routes is not None:
        routes = np.asarray(t.routes)
        if routes.ndim != 4 or routes.shape[:2] != shape:
            raise ValueError(
                f"routes has shape {routes.shape}; it must be {shape} with two more axes, layers and experts."
            )
        _require_kind("routes", routes, jnp.integer)


def _require_kind(name: str, array: np.ndarray, kind: Any) -> None:
    # jax's issubdtype, as bfloat16 is no floating number to NumPy.
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{name} is of {array.dtype}; it must be of kind {KINDS[kind]}.")


def _refuse(broken: np.ndarray, what: str) -> None:
    rows = np.flatnonzero(broken.any(axis=1))
    if len(rows):
        raise ValueError(f"row {rows[0]} {what} ({len(rows)} of {len(broken)} rows do).")
