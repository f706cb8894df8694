"""From experience to advantages: what the signal reads is computed, what is not sound is left out, and no more."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import SIGNALS
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.objectives.signals import VALUE_TARGETS
from jaxrl_llm.objectives.signals import value_targets
from jaxrl_llm.training.text.objective import Objective
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float

OF_REFERENCE = ("log_prob_ref", "kl_ref_t")
"""Inputs for which a reference policy, or a teacher, must score the batch."""

UserSignal = Callable[[SignalInputs], Any]
"""(inputs) -> advantages, `[B]` or `[B, R]`; or (advantages, weights), each of one of these shapes, weights >= 0."""


class Signal(NamedTuple):
    """How advantages are made, and what that needs.

    Attributes:
        name: for messages.
        needs: names of the inputs that must be computed for it.
        advantages: (inputs) -> advantages, or (advantages, weights).
        targets: (inputs) -> what the critic is trained towards; None where there is no critic.
        reads_rewards: whether the advantages depend on the rewards.
    """

    name: str
    needs: frozenset[str]
    advantages: UserSignal
    targets: Callable[[SignalInputs], Array] | None = None
    reads_rewards: bool = True


NO_SIGNAL = Signal("none", frozenset(), lambda inputs: jnp.ones_like(inputs.rewards), reads_rewards=False)
"""Every row counts the same: for objectives that read no advantages."""


def recipe_signal(recipe: Recipe) -> Signal:
    """The rule that the recipe names, compiled.

    Raises:
        ValueError: the recipe takes advantages as given.
    """
    if recipe.advantage not in SIGNALS:
        raise ValueError(
            f"recipe {recipe.name!r} takes advantages as given; pass a signal, or replace its field advantage, which "
            f"must be one of {', '.join(SIGNALS)}."
        )
    needs = frozenset(SIGNALS[recipe.advantage].needs)
    targets = jax.jit(lambda x: value_targets(recipe, x)) if recipe.advantage in VALUE_TARGETS else None
    return Signal(recipe.advantage, needs, jax.jit(lambda x: advantages_of(recipe, x)), targets)


def user_signal(function: UserSignal, recipe: Recipe) -> Signal:
    """A signal of yours. It is given everything that costs no further model: the old policy's log-probs, entropies and
    collision probabilities; what of a reference or a critic it reads is seen by calling it on a small batch.

    Raises:
        ValueError: it fails on that batch, returns something else, or is not finite there.
    """
    name = getattr(function, "__name__", type(function).__name__)
    example = _example()
    try:
        tried = returned(function(example), example.response_mask.shape)
    except Exception as error:
        raise ValueError(f"The signal {name!r} fails on a small batch: {in_words(error)}") from error
    if not np.isfinite(np.stack(tried)[:, np.asarray(example.response_mask)]).all():
        raise ValueError(f"The signal {name!r} is not finite on a small batch of ordinary numbers; it must be.")
    needs = _inputs_read(function, example)
    targets = None
    if "values" in needs:
        # Monte Carlo returns by GAE: with the recipe's own numbers, whatever the signal makes of the values.
        critic = dataclasses.replace(recipe, advantage="gae")
        targets = jax.jit(lambda x: value_targets(critic, x))
    return Signal(name, needs, function, targets, reads_rewards=_reads_rewards(function, example))


def choose_signal(given: UserSignal | None, recipe: Recipe, objective: Objective) -> Signal:
    """The signal that was given; else the recipe's rule, where the objective reads advantages.

    Raises:
        ValueError: one is given to an objective that reads none, or it fails, or the recipe has no rule.
    """
    reads = "advantages" in objective.needs
    if given is None:
        return recipe_signal(recipe) if reads else NO_SIGNAL
    if not reads:
        raise ValueError(f"a signal is given, but the objective {objective.name!r} reads no advantages; leave it out.")
    return user_signal(given, recipe)


def refuse_unrecorded(objective: Objective, signal: Signal) -> None:
    """Nothing may read the sampler's log-probs where nobody recorded them.

    Raises:
        ValueError: objective or signal does.
    """
    for what, reader in (("objective", objective), ("signal", signal)):
        if "log_prob_behaviour" in reader.needs:
            raise ValueError(
                f"the {what} {reader.name!r} reads the log-probs of the policy that sampled, which this experience "
                "does not have; use one that does not, such as nll."
            )


def _inputs_read(function: UserSignal, example: SignalInputs) -> frozenset[str]:
    """Names of the inputs whose values a signal depends on: replaced by others, one at a time, they change it."""
    read = []
    for name in ("log_prob_behaviour", "entropy", "collision", "values", *OF_REFERENCE):
        value = vars(example)[name]
        if any(_changes(function, example, **{name: other}) for other in (None, value * 3 + 1)):
            read.append(name)
    return frozenset(read)


def _reads_rewards(function: UserSignal, example: SignalInputs) -> bool:
    # Squared, as a signal may take out scale and mean.
    return _changes(function, example, rewards=example.rewards**2, rewards_t=example.rewards_t**2)


def _changes(function: UserSignal, example: SignalInputs, **columns: Any) -> bool:
    """Whether a signal says something else with these inputs instead."""

    def outcome(inputs: SignalInputs) -> tuple[np.ndarray, ...]:
        try:
            said = returned(function(inputs), example.response_mask.shape)
            return tuple(np.nan_to_num(array, nan=-9e9) for array in said)
        except Exception:
            return ()

    before, after = outcome(example), outcome(dataclasses.replace(example, **columns))
    return len(after) != len(before) or any((a != b).any() for a, b in zip(after, before, strict=True))


def _example() -> SignalInputs:
    rows, columns = 4, 3
    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(columns) < np.array([[1], [3], [2], [3]]))

    def token(low: float, high: float) -> Array:
        return jnp.where(mask, jnp.asarray(rng.uniform(low, high, (rows, columns)), jnp.float32), 0)

    rewards = jnp.asarray([0.0, 1.0, 0.5, 1.0])
    last = jnp.asarray(np.arange(columns) == np.array([[0], [2], [1], [2]]))
    ids = jnp.where(mask, 0, -1)
    log_probs: dict[str, Any] = {
        name: token(-2, -0.1) for name in ("log_prob_old", "log_prob_behaviour", "log_prob_ref")
    }
    others: dict[str, Any] = {name: token(0.1, 0.9) for name in ("entropy", "collision", "kl_ref_t", "values")}
    return SignalInputs(
        response_mask=mask,
        rewards=rewards,
        rewards_t=jnp.where(last, rewards[:, None], 0),
        group_ids=jnp.asarray([0, 0, 1, 1]),
        step_ids=ids,
        actor_ids=ids,
        ended=jnp.ones(rows, bool),
        **log_probs,
        **others,
    )


def in_words(error: Exception) -> str:
    """The first line of an error; its kind too, unless it is one of ours, which are sentences."""
    said = next(iter(str(error).splitlines()), "")
    return said if type(error) is ValueError and said else f"{type(error).__name__}: {said}"


def returned(result: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and weights, each `[B, R]`, of what a signal returned.

    Raises:
        ValueError: other shapes, or negative weights.
    """
    parts = result if isinstance(result, tuple) else (result, 1.0)
    if len(parts) != 2:
        raise ValueError(f"it returned {len(parts)} things; it must return advantages, or (advantages, weights).")
    arrays = []
    for what, part in zip(("advantages", "weights"), parts, strict=True):
        try:
            array = np.asarray(part, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"its {what} are {type(part).__name__}; they must be numbers.") from error
        if what == "weights" and array.ndim == 0:
            array = np.broadcast_to(array, shape)
        if array.shape not in (shape, shape[:1]):
            raise ValueError(f"its {what} have shape {array.shape}; it must be {shape[:1]} or {shape}.")
        array = array if array.ndim == 2 else np.broadcast_to(array[:, None], shape)
        arrays.append(array)
    if (arrays[1] < 0).any():
        raise ValueError("it gave negative weights; they must be at least 0.")
    return arrays[0], arrays[1]


def signal_inputs(
    trajectories: Trajectories,
    actions: Actions,
    scored: Mapping[str, Float[np.ndarray, "B R"] | None],
    sound: Bool[np.ndarray, " B"],
) -> SignalInputs:
    """The record that signals read, of the sound rows.

    Args:
        trajectories: the batch, on the host.
        actions: its chosen tokens.
        scored: what models said of them: fields of `SignalInputs` by name.
        sound: which rows are compared.
    """
    steps = int(np.max(trajectories.step_ids, initial=0)) + 1
    behaviour = trajectories.log_prob_behaviour
    columns: dict[str, Any] = {
        "response_mask": actions.mask,
        "rewards": np.asarray(trajectories.returns, np.float32),
        "rewards_t": actions.take(trajectories.rewards),
        "group_ids": np.asarray(trajectories.group_ids),
        "step_ids": actions.take(trajectories.step_ids, fill=-1),
        "actor_ids": actions.take(trajectories.actor_ids, fill=-1),
        "ended": np.asarray(trajectories.ended),
        "log_prob_behaviour": None if behaviour is None else actions.take(behaviour),
        **scored,
    }
    # Steps to a power of two: few programs.
    chosen: dict[str, Any] = {
        name: None if column is None else jnp.asarray(column[sound]) for name, column in columns.items()
    }
    return SignalInputs(**chosen, steps=1 << (steps - 1).bit_length())


def sound_advantages(
    signal: Signal,
    trajectories: Trajectories,
    actions: Actions,
    scored: Mapping[str, Float[np.ndarray, "B R"] | None],
    sound: Bool[np.ndarray, " B"],
    *,
    per_sequence: bool = False,
) -> tuple[Float[np.ndarray, "B R"], Float[np.ndarray, "B R"], Float[np.ndarray, "B R"] | None]:
    """Advantages, weights and value targets of the sound rows; 0 for the others, which are compared with nothing.

    Args:
        signal: how they are made.
        trajectories, actions, scored, sound: as for `signal_inputs`.
        per_sequence: whether the objective reads one advantage per sequence.

    Raises:
        ValueError: the signal returned something else, or an advantage of a chosen token that is not finite.
    """
    shape = actions.mask.shape
    advantages, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    targets = None if signal.targets is None else np.zeros(shape, np.float32)
    if sound.any():
        some = signal_inputs(trajectories, actions, scored, sound)
        try:
            result = signal.advantages(some)
            given, weighed = returned(result, some.response_mask.shape)
        except Exception as error:
            raise ValueError(
                f"the signal {signal.name!r} fails on a batch of {int(sound.sum())} rows: {in_words(error)}"
            ) from error
        if per_sequence and any(np.ndim(part) > 1 for part in (result if isinstance(result, tuple) else (result,))):
            raise ValueError(
                f"the signal {signal.name!r} gives one advantage per token, and the objective reads one per sequence "
                "(as advantages[:, None] does); let it take either, or use another signal."
            )
        mask = np.asarray(some.response_mask)
        broken = ~np.isfinite(np.where(mask, given * weighed, 0))
        if broken.any():
            row = int(np.flatnonzero(sound)[np.argmax(broken.any(axis=1))])
            raise ValueError(
                f"the signal {signal.name!r} gave row {row} an advantage that is not finite ({int(broken.sum())} "
                "tokens in all), from inputs that are."
            )
        advantages[sound], weights[sound] = np.where(mask, given, 0), np.where(mask, weighed, 0)
        if targets is not None and signal.targets is not None:
            targets[sound] = np.asarray(signal.targets(some))
    return advantages, weights, targets
