"""Agents for linear mixture MDPs: PSRL, its greedy twin, UCRL-VTR, and randomised least squares on the table.

All know the rewards, which must lie in [0, 1], and plan exactly by backward induction.
Source: Li and Luo 2024 (arXiv 2403.11175); UCRL-VTR: Ayoub et al. 2020; RLSVI: Osband et al. 2019.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.regret import self_normalised_width
from jaxrl_llm.checks import require_not_negative
from jaxrl_llm.checks import require_positive
from jaxrl_llm.exploration.episodes import Episode
from jaxrl_llm.exploration.episodes import EpisodicAgent
from jaxrl_llm.exploration.posteriors import Posterior
from jaxrl_llm.exploration.posteriors import value_targets
from jaxrl_llm.tabular import LinearMixture
from jaxrl_llm.tabular import Plan
from jaxrl_llm.tabular import backward_induction
from jaxrl_llm.tabular import require_mdp
from jaxrl_llm.tabular import require_probabilities
from jaxrl_llm.tabular import require_rewards
from jaxrl_llm.tabular import value_ranges
from jaxrl_llm.typing import PRNGKey


def _require_fit(posterior: Posterior, rewards: Float[Array, "*shape"]) -> None:
    """Rewards must be in [0, 1], where they are known, and of the shape that the posterior is for."""
    shape = jax.eval_shape(lambda: posterior.mean(posterior.init())).shape[:3]
    if rewards.shape != shape:
        raise ValueError(f"rewards has shape {rewards.shape}; it must be {shape}, as the posterior is for.")
    require_rewards(rewards, 0.0, 1.0)


def _clipped_plan(transitions: Float[Array, "H S A S"], rewards: Float[Array, "H S A"]) -> Plan:
    """Q_h = r_h + clip(P_h V_{h+1}, 0, H - h): what `tabular.plan` does, where P_h are probabilities."""

    def backup(known: tuple[Array, Array, Array], values: Array) -> Array:
        moves, reward, largest = known
        return reward + jnp.clip(moves @ values, 0.0, largest)

    steps = (transitions, rewards, value_ranges(rewards.shape[0]).astype(rewards.dtype))
    return backward_induction(backup, steps, states=rewards.shape[1])


def psrl(posterior: Posterior, rewards: Float[Array, "H S A"]) -> EpisodicAgent:
    """Posterior sampling: in each episode, the optimal policy of one MDP drawn from the posterior.

    Values after step h are clipped to [0, H - h], which changes nothing unless a draw has left the probabilities.

    Args:
        posterior: of the transitions.
        rewards: r_h(s, a) in [0, 1].

    Returns:
        the agent; its state is that of the posterior.

    Raises:
        ValueError: if rewards have another shape than the posterior is for, or (where known) are not in [0, 1].
    """
    _require_fit(posterior, rewards)

    def act(state: object, key: PRNGKey) -> Plan:
        return _clipped_plan(posterior.sample(state, key), rewards)

    return _posterior_agent(posterior, act)


def greedy_in_the_mean(posterior: Posterior, rewards: Float[Array, "H S A"]) -> EpisodicAgent:
    """In each episode, the optimal policy of the posterior mean: never explores on purpose.

    Args, Returns, Raises as `psrl`.
    """
    _require_fit(posterior, rewards)

    def act(state: object, key: PRNGKey) -> Plan:
        return _clipped_plan(posterior.mean(state), rewards)

    return _posterior_agent(posterior, act)


def _posterior_agent(posterior: Posterior, act) -> EpisodicAgent:
    def update(state: object, key: PRNGKey, plan: Plan, episode: Episode) -> object:
        return posterior.update(state, episode, plan.values)

    return EpisodicAgent(lambda key: posterior.init(), act, update)


class Regression(NamedTuple):
    """The state of `ucrl_vtr`, in units of R_h = H - h: X / R_h and y / R_h.

    Attributes:
        inverse: (lambda I + sum X X^T / R_h^2)^-1 [H, D, D].
        moment: sum X y / R_h^2 [H, D].
        log_determinant: log det(Lambda_h / lambda) [H].
    """

    inverse: Float[Array, "H D D"]
    moment: Float[Array, "H D"]
    log_determinant: Float[Array, " H"]


def ucrl_vtr(
    mixture: LinearMixture,
    *,
    failure: float = 0.05,
    ridge: float = 1.0,
    parameter_norm: float = 1.0,
    bonus_scale: ScalarLike = 1.0,
) -> EpisodicAgent:
    """Optimism by value-targeted regression: Q_h = r_h + clip(<X, theta_hat> + beta_h |X|_{Lambda^-1}, 0, H - h).

    beta_h is `bounds.regret.self_normalised_width` with failure / H, so that with bonus_scale = 1 all values are
    optimistic in all episodes together with probability 1 - failure.

    Args:
        mixture: base kernels and rewards.
        failure: delta.
        ridge: lambda, of X / (H - h).
        parameter_norm: B >= |theta_h|; 1 on the simplex.
        bonus_scale: factor on the bonus; an array is not checked, so that one program can serve many.

    Returns:
        the agent; its state is a `Regression`.

    Raises:
        ValueError: if shapes do not fit, ridge or parameter_norm is not positive, failure not in (0, 1), bonus_scale
            negative, or rewards (where known) not in [0, 1].
    """
    require_mdp(mixture)
    require_rewards(mixture.rewards, 0.0, 1.0)
    require_positive("ridge", ridge)
    require_positive("parameter_norm", parameter_norm)
    if not 0 < failure < 1:
        raise ValueError(f"failure is {failure}; it must lie between 0 and 1.")
    if isinstance(bonus_scale, (int, float)):
        require_not_negative("bonus_scale", bonus_scale)
    horizon, dimension = mixture.rewards.shape[0], mixture.kernels.shape[0]
    ranges = value_ranges(horizon).astype(mixture.rewards.dtype)
    unit = jnp.maximum(ranges, 1.0)  # at the last step X = 0, whatever it is divided by

    def init(key: PRNGKey) -> Regression:
        inverse = jnp.broadcast_to(jnp.eye(dimension)[None] / ridge, (horizon, dimension, dimension))
        return Regression(inverse, jnp.zeros((horizon, dimension)), jnp.zeros(horizon))

    def act(state: Regression, key: PRNGKey) -> Plan:
        estimate = jnp.einsum("hij,hj->hi", state.inverse, state.moment)
        width = self_normalised_width(
            state.log_determinant, failure=failure / horizon, ridge=ridge, parameter_norm=parameter_norm
        )

        def backup(known: tuple[Array, ...], values: Array) -> Array:
            reward, inverse, mean, bonus, largest = known
            features = jnp.einsum("dsat,t->sad", mixture.kernels, values)
            spread = jnp.sqrt(jnp.maximum(jnp.einsum("sai,ij,saj->sa", features, inverse, features), 0.0))
            return reward + jnp.clip(features @ mean + bonus * spread, 0.0, largest)

        steps = (mixture.rewards, state.inverse, estimate, bonus_scale * width, ranges)
        return backward_induction(backup, steps, states=mixture.rewards.shape[1])

    def update(state: Regression, key: PRNGKey, plan: Plan, episode: Episode) -> Regression:
        features, targets = value_targets(mixture, episode, plan.values)
        features, targets = features / unit[:, None], targets / unit
        along = jnp.einsum("hij,hj->hi", state.inverse, features)
        growth = jnp.sum(features * along, axis=1)
        return Regression(
            state.inverse - along[:, :, None] * along[:, None, :] / (1 + growth)[:, None, None],
            state.moment + features * targets[:, None],
            state.log_determinant + jnp.log1p(growth),
        )

    return EpisodicAgent(init, act, update)


def rlsvi(
    rewards: Float[Array, "H S A"], prior_transitions: Float[Array, "*shape"], *, noise: ScalarLike = 1.0
) -> EpisodicAgent:
    """Randomised least-squares value iteration on the table, knowing rewards but not that kernels are mixtures.

    Q_h = r_h + clip( (sum over visits of V_{h+1}(s') + P0 V_{h+1}) / (n + 1) + N(0, c^2 (H - h)^2 / (4 (n + 1))), 0,
    H - h ), n visits of (h, s, a): the spread of a mean of n + 1 values in [0, H - h].

    Args:
        rewards: r_h(s, a) in [0, 1].
        prior_transitions: P0 [H, S, A, S], which counts as one visit.
        noise: c; an array is not checked, so that one program can serve many.

    Returns:
        the agent; its state is the table of visits [H, S, A, S].

    Raises:
        ValueError: if noise is not positive, shapes do not fit or (where values are known) P0 is not probabilities or
            rewards are not in [0, 1].
    """
    if isinstance(noise, (int, float)):
        require_positive("noise", noise)
    if prior_transitions.shape != (*rewards.shape, rewards.shape[1]):
        raise ValueError(
            f"prior_transitions has shape {prior_transitions.shape}; it must be {(*rewards.shape, rewards.shape[1])}."
        )
    require_probabilities(prior_transitions=prior_transitions)
    require_rewards(rewards, 0.0, 1.0)
    horizon, states, _ = rewards.shape
    ranges = value_ranges(horizon).astype(rewards.dtype)
    steps = jnp.arange(horizon)

    def act(visits: Array, key: PRNGKey) -> Plan:
        normal = jax.random.normal(key, rewards.shape, rewards.dtype)

        def backup(known: tuple[Array, ...], values: Array) -> Array:
            reward, met, prior, drawn, largest = known
            count = jnp.sum(met, axis=-1) + 1
            mean = (met @ values + prior @ values) / count
            return reward + jnp.clip(mean + noise * largest / 2 * drawn / jnp.sqrt(count), 0.0, largest)

        return backward_induction(backup, (rewards, visits, prior_transitions, normal, ranges), states=states)

    def update(visits: Array, key: PRNGKey, plan: Plan, episode: Episode) -> Array:
        return visits.at[steps, episode.states[:-1], episode.actions, episode.states[1:]].add(1.0)

    return EpisodicAgent(lambda key: jnp.zeros_like(prior_transitions), act, update)
