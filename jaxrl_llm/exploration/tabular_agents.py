"""Tabular agents that know neither rewards nor structure: HyperAgent in closed form, and epsilon-greedy Q-learning.

Source: HyperAgent (arXiv 2402.10228), its tabular form; with finite horizon H and one table per step.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_positive
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration.episodes import Episode
from jaxrl_llm.exploration.episodes import EpisodicAgent
from jaxrl_llm.exploration.indices import IndexLaw
from jaxrl_llm.tabular import Plan
from jaxrl_llm.tabular import as_plan
from jaxrl_llm.tabular import backward_induction
from jaxrl_llm.typing import PRNGKey


class HyperTable(NamedTuple):
    """The state of `tabular_hyperagent`, sums over the visits of each cell (h, s, a).

    Attributes:
        following: how often each state followed [H, S, A, S].
        rewards: sum of rewards [H, S, A].
        perturbations: sigma sum z + beta sigma_0 z_0 [H, S, A, M]; divided by N + beta it is m.
    """

    following: Float[Array, "H S A S"]
    rewards: Float[Array, "H S A"]
    perturbations: Float[Array, "H S A M"]


def tabular_hyperagent(
    *,
    horizon: int,
    states: int,
    actions: int,
    index_dimension: int = 4,
    noise_scale: float = 1.0,
    prior_scale: float = 1.0,
    prior_mean: float = 0.0,
    reference: IndexLaw = indices.GAUSSIAN,
    perturbation: IndexLaw = indices.SPHERE,
) -> EpisodicAgent:
    """Randomised value iteration whose spread is carried by M stored numbers per cell.

    Q_h(s, a) = (beta mu_0 + sum (r + V_{h+1}(s'))) / (N + beta) + <m, xi_h(s)>, with beta = sigma^2 / sigma_0^2 and m =
    (sigma sum z + beta sigma_0 z_0) / (N + beta), so that E|m|^2 = sigma^2 / (N + beta). An index xi_h(s) is drawn for
    each step and state, once per episode. m minimises sum_i |sigma z_i - m|^2 + beta |m - sigma_0 z_0|^2, which is what
    training by gradient descent tends to.

    Args:
        horizon, states, actions: H, S, A.
        index_dimension: M.
        noise_scale: sigma.
        prior_scale: sigma_0.
        prior_mean: mu_0, what a cell that was never visited is thought to be worth.
        reference: law of xi.
        perturbation: law of z and z_0.

    Returns:
        the agent; its state is a `HyperTable`.

    Raises:
        ValueError: if a size is below 1, a scale is not positive or prior_mean not finite.
    """
    sizes = {"horizon": horizon, "states": states, "actions": actions, "index_dimension": index_dimension}
    for name, size in sizes.items():
        require_at_least(name, size, 1)
    require_positive("noise_scale", noise_scale)
    require_positive("prior_scale", prior_scale)
    if not math.isfinite(prior_mean):
        raise ValueError(f"prior_mean is {prior_mean}; it must be a finite number.")
    beta = noise_scale**2 / prior_scale**2
    steps = jnp.arange(horizon)

    def init(key: PRNGKey) -> HyperTable:
        drawn = perturbation.perturbation(key, (horizon, states, actions, index_dimension))
        return HyperTable(
            jnp.zeros((horizon, states, actions, states)),
            jnp.zeros((horizon, states, actions)),
            beta * prior_scale * drawn,
        )

    def act(state: HyperTable, key: PRNGKey) -> Plan:
        index = reference.reference(key, (horizon, states, index_dimension))
        count = jnp.sum(state.following, axis=-1) + beta
        spread = jnp.einsum("hsam,hsm->hsa", state.perturbations, index)
        fixed = (beta * prior_mean + state.rewards + spread) / count

        def backup(known: tuple[Array, Array, Array], values: Array) -> Array:
            following, constant, visits = known
            return constant + following @ values / visits

        return backward_induction(backup, (state.following, fixed, count), states=states)

    def update(state: HyperTable, key: PRNGKey, plan: Plan, episode: Episode) -> HyperTable:
        drawn = perturbation.perturbation(key, (horizon, index_dimension))
        cells = steps, episode.states[:-1], episode.actions
        return HyperTable(
            state.following.at[(*cells, episode.states[1:])].add(1.0),
            state.rewards.at[cells].add(episode.rewards),
            state.perturbations.at[cells].add(noise_scale * drawn),
        )

    return EpisodicAgent(init, act, update)


def q_learning(
    *, horizon: int, states: int, actions: int, epsilon: float = 0.1, learning_rate: float = 1.0
) -> EpisodicAgent:
    """Epsilon-greedy Q-learning from 0, ties broken at random; each episode is learned from its last step backwards.

    Q_h(s, a) += learning_rate (r + max_a' Q_{h+1}(s', a') - Q_h(s, a)).

    Args:
        horizon, states, actions: H, S, A.
        epsilon: probability of a uniformly random action, in each step.
        learning_rate: in (0, 1]; 1 is exact where nothing is random.

    Returns:
        the agent; its state is Q [H, S, A].

    Raises:
        ValueError: if a size is below 1, epsilon not in [0, 1] or learning_rate not in (0, 1].
    """
    for name, size in {"horizon": horizon, "states": states, "actions": actions}.items():
        require_at_least(name, size, 1)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; it must lie in [0, 1].")
    if not 0 < learning_rate <= 1:
        raise ValueError(f"learning_rate is {learning_rate}; it must be above 0 and at most 1.")

    def act(table: Array, key: PRNGKey) -> Plan:
        explore_key, tie_key = jax.random.split(key)
        order = jax.random.uniform(tie_key, table.shape)
        best = table == jnp.max(table, axis=-1, keepdims=True)
        explores = jax.random.bernoulli(explore_key, epsilon, table.shape[:2])
        # A cell is met at most once per episode, so whether it explores can be drawn before.
        chosen = as_plan(jnp.where(best | explores[:, :, None], order, -1.0)).policy
        values = jnp.max(table, axis=-1)
        return Plan(chosen, table, jnp.concatenate([values, jnp.zeros_like(values[:1])]))

    def update(table: Array, key: PRNGKey, plan: Plan, episode: Episode) -> Array:
        def step(known: tuple[Array, Array], met: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            table, following_value = known
            step, state, action, reward = met
            moved = learning_rate * (reward + following_value - table[step, state, action])
            table = table.at[step, state, action].add(moved)
            return (table, jnp.max(table[step, state])), None

        met = (jnp.arange(horizon), episode.states[:-1], episode.actions, episode.rewards)
        (table, _), _ = jax.lax.scan(step, (table, jnp.zeros((), table.dtype)), met, reverse=True)
        return table

    return EpisodicAgent(lambda key: jnp.zeros((horizon, states, actions)), act, update)
