"""Finite MDPs as arrays: of a fixed horizon their types, exact planning and evaluation; discounted ones, solved.

Steps are numbered h = 1..H in formulas and 0..H-1 in arrays; V_{H+1} = 0. A discounted MDP has the same P(s'|s, a) at
every step and no end. Everything is jit-, vmap- and grad-able.
"""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.checks import require_rank

SUM_TOLERANCE = 1e-4
"""How far from 1 a sum of probabilities may be."""


class TabularMdp(NamedTuple):
    """A finite MDP whose transitions and rewards may differ from step to step.

    Attributes:
        transitions: P_h(s'|s, a) [H, S, A, S].
        rewards: r_h(s, a) [H, S, A], known and without noise.
        initial: law of the first state [S].
    """

    transitions: Float[Array, "H S A S"]
    rewards: Float[Array, "H S A"]
    initial: Float[Array, " S"]


class LinearMixture(NamedTuple):
    """MDPs of the form P_h(s'|s, a) = sum_i theta_{h, i} phi_i(s'|s, a), for all theta.

    Attributes:
        kernels: phi_i(s'|s, a) [D, S, A, S].
        rewards: r_h(s, a) [H, S, A].
        initial: law of the first state [S].
    """

    kernels: Float[Array, "D S A S"]
    rewards: Float[Array, "H S A"]
    initial: Float[Array, " S"]

    def transitions(self, parameters: Float[Array, "H D"]) -> Float[Array, "H S A S"]:
        """The transitions of one theta."""
        return jnp.einsum("hd,dsat->hsat", parameters, self.kernels)

    def mdp(self, parameters: Float[Array, "H D"]) -> TabularMdp:
        """The MDP of one theta."""
        return TabularMdp(self.transitions(parameters), self.rewards, self.initial)


class Plan(NamedTuple):
    """A deterministic policy with the values that it was chosen by, those of the MDP it was planned in.

    Attributes:
        policy: action of each step and state [H, S].
        action_values: Q_h(s, a) [H, S, A].
        values: V_h(s) = max_a Q_h(s, a) [H + 1, S]; the last row is 0.
    """

    policy: Int[Array, "H S"]
    action_values: Float[Array, "H S A"]
    values: Float[Array, "_ S"]


def value_ranges(horizon: int) -> Float[Array, " H"]:
    """R_h = H - h, what rewards in [0, 1] can still add up to after step h."""
    return jnp.arange(horizon - 1, -1, -1, dtype=jnp.result_type(float))


def first_maxima(values: Float[Array, "*batch A"]) -> Int[Array, "*batch"]:
    """The smallest index of the largest value along the last axis, as argmax; A - 1 where a value is NaN. A < 2^24.

    XLA compiles argmax for CPU as a loop over single numbers; two maxima of floats take an eighth of its time. The
    second one is of how many values follow, which is faster than the minimum of integer indices.
    """
    last = values.shape[-1] - 1
    follow = jnp.broadcast_to(jnp.arange(last, -1, -1, dtype=jnp.float32), values.shape)
    reached = values == jnp.max(values, axis=-1, keepdims=True)
    return last - jnp.max(jnp.where(reached, follow, 0.0), axis=-1).astype(int)


def as_plan(action_values: Float[Array, "H S A"]) -> Plan:
    """The plan that is greedy in the given Q_h(s, a)."""
    values = jnp.max(action_values, axis=-1)
    return Plan(first_maxima(action_values), action_values, jnp.concatenate([values, jnp.zeros_like(values[:1])]))


def backward_induction(
    backup: Callable[[Any, Float[Array, " S"]], Float[Array, "S A"]], steps: Any, *, states: int
) -> Plan:
    """Q_h = backup(what is known of step h, V_{h+1}), V_h = max_a Q_h, from the last step to the first.

    Args:
        backup: (leaf slice of `steps`, V_{h+1} [S]) -> Q_h [S, A].
        steps: pytree of arrays with a leading axis of H steps.
        states: S.

    Returns:
        the plan that is greedy in Q.
    """

    def step(values: Array, known: Any) -> tuple[Array, Array]:
        action_values = backup(known, values)
        return jnp.max(action_values, axis=-1), action_values

    last = jnp.zeros(states, jax.tree.leaves(steps)[0].dtype)
    _, action_values = jax.lax.scan(step, last, steps, reverse=True)
    return as_plan(action_values)


def plan(transitions: Float[Array, "H S A S"], rewards: Float[Array, "H S A"]) -> Plan:
    """The optimal plan: Q_h(s, a) = r_h(s, a) + sum_s' P_h(s'|s, a) V_{h+1}(s').

    Args:
        transitions: P.
        rewards: r.

    Returns:
        an optimal policy (of equal actions the first) with Q* and V*.

    Raises:
        ValueError: if an argument has the wrong number of axes.
    """
    require_rank(4, "H S A S", transitions=transitions)
    require_rank(3, "H S A", rewards=rewards)
    return backward_induction(
        lambda known, values: known[1] + known[0] @ values, (transitions, rewards), states=rewards.shape[1]
    )


def evaluate(mdp: TabularMdp, policy: Int[Array, "H S"]) -> Float[Array, "_ S"]:
    """V_h(s) of a deterministic policy, exactly; the last row is 0.

    Args:
        mdp: the MDP.
        policy: action of each step and state.

    Returns:
        the values.
    """
    rewards = jnp.take_along_axis(mdp.rewards, policy[:, :, None], axis=2)[:, :, 0]
    moves = jnp.take_along_axis(mdp.transitions, policy[:, :, None, None], axis=2)[:, :, 0]

    def step(values: Array, known: tuple[Array, Array]) -> tuple[Array, Array]:
        here = known[1] + known[0] @ values
        return here, here

    last = jnp.zeros(rewards.shape[1], rewards.dtype)
    _, values = jax.lax.scan(step, last, (moves, rewards), reverse=True)
    return jnp.concatenate([values, last[None]])


def start_value(mdp: TabularMdp, values: Float[Array, "_ S"]) -> Float[Array, ""]:
    """The mean of V_1 over the first state."""
    return mdp.initial @ values[0]


def discounted_sums(
    transitions: Float[Array, "S A S"],
    policy: Float[Array, "S A"],
    per_state: Float[Array, " S"],
    *,
    discount: ScalarLike,
) -> Float[Array, " S"]:
    """x(s) = c(s) + discount sum_a pi(a|s) sum_s' P(s'|s, a) x(s'): what a policy adds up without an end.

    Args:
        transitions: P, the same at every step.
        policy: pi; weights that sum to less than 1 in a state stop there with what is missing.
        per_state: c, what is met in each state; sum_a pi r for the values of a policy.
        discount: per step, below 1.

    Returns:
        x.
    """
    moves = jnp.einsum("sa,sat->st", policy, transitions)
    return jnp.linalg.solve(jnp.eye(len(per_state), dtype=per_state.dtype) - discount * moves, per_state)


def discounted_occupancy(
    transitions: Float[Array, "S A S"],
    policy: Float[Array, "S A"],
    initial: Float[Array, " S"],
    *,
    discount: ScalarLike,
) -> Float[Array, " S"]:
    """d(s) = (1 - discount) sum_t discount^t P(s_t = s), a law over states.

    Args:
        transitions: P, the same at every step.
        policy: pi.
        initial: law of the first state.
        discount: per step, below 1.

    Returns:
        d.
    """
    moves = jnp.einsum("sa,sat->ts", policy, transitions)
    return (1 - discount) * jnp.linalg.solve(jnp.eye(len(initial), dtype=initial.dtype) - discount * moves, initial)


def require_probabilities(**arrays: Float[Array, "..."]) -> None:
    """Every array must hold probabilities along its last axis; a tracer is skipped, its values are not known.

    Raises:
        ValueError: naming the array and its first row that is negative, or does not sum to 1.
    """
    for name, array in arrays.items():
        if isinstance(array, Tracer):
            continue
        rows = np.asarray(array, np.float64).reshape(-1, array.shape[-1])
        off = np.abs(rows.sum(axis=1) - 1)
        bad = ~(off <= SUM_TOLERANCE) | (rows < 0).any(axis=1)
        if bad.any():
            row = rows[int(np.argmax(bad))]
            raise ValueError(
                f"{name} has a row (number {int(np.argmax(bad))}) with sum {row.sum():.6g} and smallest entry "
                f"{row.min():.3g}; probabilities must be at least 0 and sum to 1."
            )


def require_rewards(rewards: Float[Array, "..."], low: float = -math.inf, high: float = math.inf) -> None:
    """Every reward must be a finite number in [low, high]; a tracer is skipped, its values are not known.

    Raises:
        ValueError: giving the smallest and the largest one.
    """
    if isinstance(rewards, Tracer):
        return
    known = np.asarray(rewards, np.float64)
    if not np.isfinite(known).all() or (known < low - SUM_TOLERANCE).any() or (known > high + SUM_TOLERANCE).any():
        wanted = "be finite numbers" if math.isinf(high) else f"lie in [{low:g}, {high:g}]"
        raise ValueError(f"rewards run from {known.min():.6g} to {known.max():.6g}; they must {wanted}.")


def require_mdp(mdp: TabularMdp | LinearMixture) -> None:
    """The arrays of an MDP must fit each other, hold probabilities and finite rewards, where their values are known.

    Raises:
        ValueError: naming what does not fit.
    """
    moves = mdp.transitions if isinstance(mdp, TabularMdp) else mdp.kernels
    name = "transitions" if isinstance(mdp, TabularMdp) else "kernels"
    require_rank(4, "H S A S" if isinstance(mdp, TabularMdp) else "D S A S", **{name: moves})
    require_rank(3, "H S A", rewards=mdp.rewards)
    states, actions = moves.shape[1:3]
    if moves.shape[3] != states:
        raise ValueError(f"{name} leads from {states} states to {moves.shape[3]}; the two must be equal.")
    if mdp.rewards.shape[1:] != (states, actions):
        raise ValueError(
            f"rewards are for {mdp.rewards.shape[1:]} states and actions and {name} for {(states, actions)}; "
            "they must be equal."
        )
    if isinstance(mdp, TabularMdp) and mdp.rewards.shape[0] != moves.shape[0]:
        raise ValueError(f"rewards have {mdp.rewards.shape[0]} steps and transitions {moves.shape[0]}; must be equal.")
    if mdp.initial.shape != (states,):
        raise ValueError(
            f"initial has shape {mdp.initial.shape}; it must be one probability for each of {states} states."
        )
    require_probabilities(**{name: moves}, initial=mdp.initial)
    require_rewards(mdp.rewards)
