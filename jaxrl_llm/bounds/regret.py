"""Regret bounds of posterior sampling, as functions of their arguments.

PSRL: Li and Luo 2024 (arXiv 2403.11175), time-inhomogeneous linear mixture MDPs; the prior-dependent form is derived in
docs/theory.md and has the rate O(d sqrt(H^3 T log T)) of the paper, T = K H. HyperAgent and Ensemble++: arXiv
2402.10228 and 2407.13195. R_h = H - h is the range of the value after step h; steps with R_h = 0 do not contribute.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.inputs import safe_sqrt
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.checks import require_rank
from jaxrl_llm.tabular import value_ranges

ANTI_CONCENTRATION = {"gaussian": 0.0856, "sphere": 0.0664, "cube": 7 / 64}
"""Lower bounds on P(<xi, v> >= 1) for a unit vector v, by the law of the index xi (coordinate: 1 / (2 M)).

The cube is often quoted with 7/32, the bound on both sides together (errata F9.2).
"""

SMALLEST = 1e-30
"""The least probability that an argument may be: their logarithms and reciprocals are taken."""


@checked
def psrl_potential(
    prior_covariances: Float[Array, "H D D"], *, episodes: ScalarLike, feature_ratio: ScalarLike = 1.0
) -> Float[Array, " H"]:
    """(1/2) log det( I + K ratio^2 Gamma_h ) + 1 per step: what the posterior variances sum to, in units of R_h^2.

    sum_k E[X^T Gamma_k X] <= R_h^2 times this, by a log-det potential with eps = 1 / (K ratio^2).

    Args:
        prior_covariances: Gamma_h = Cov(theta_h) under the prior, one matrix per step.
        episodes: K.
        feature_ratio: L_h / R_h with |X| <= L_h: 1 in the unit-norm convention, sqrt(d) on the simplex.

    Returns:
        one number per step.

    Raises:
        ValueError: if prior_covariances does not have three axes.
    """
    require_rank(3, "H D D", prior_covariances=prior_covariances)
    identity = jnp.eye(prior_covariances.shape[-1], dtype=prior_covariances.dtype)[None]
    matrices = identity + episodes * jnp.square(feature_ratio) * prior_covariances
    return jnp.linalg.slogdet(matrices)[1] / 2 + 1


@checked
def psrl_bayes_regret(
    prior_covariances: Float[Array, "H D D"], *, episodes: ScalarLike, feature_ratio: ScalarLike = 1.0
) -> Float[Array, ""]:
    """BR(K) <= sum_h R_h sqrt( d K [ (1/2) log det( I + K ratio^2 Gamma_h ) + 1 ] ), prior-dependent.

    For priors under which theta_1..theta_H are independent; with dependence the derivation costs a factor 2. The prior
    enters through log det Gamma_h alone; d may be replaced by the rank of Gamma_h.

    Args, Raises as `psrl_potential`.

    Returns:
        a bound on the Bayes regret after K episodes, in units of reward (rewards in [0, 1] per step).
    """
    horizon, dimension = prior_covariances.shape[:2]
    potential = psrl_potential(prior_covariances, episodes=episodes, feature_ratio=feature_ratio)
    return jnp.sum(
        value_ranges(horizon).astype(potential.dtype)
        * safe_sqrt(potential * dimension * jnp.asarray(episodes, potential.dtype))
    )


def psrl_bayes_regret_prior_free(
    *,
    dimension: int,
    horizon: int,
    episodes: ScalarLike,
    parameter_norm: ScalarLike = 1.0,
    feature_ratio: ScalarLike = 1.0,
) -> Float[Array, ""]:
    """BR(K) <= (H (H - 1) / 2) d sqrt( K [ (1/2) log(1 + K B^2 ratio^2 / d) + 1/d ] ), for every prior with |theta| <=
    B.

    From the prior-dependent form by log det(I + c Gamma) <= d log(1 + c tr Gamma / d) and tr Gamma <= B^2.

    Args:
        dimension: d.
        horizon: H.
        episodes: K.
        parameter_norm: B.
        feature_ratio: L_h / R_h.

    Returns:
        a bound on the Bayes regret after K episodes, in units of reward.
    """
    require_numbers(1, math.inf, dimension=dimension, horizon=horizon)
    k = jnp.asarray(episodes, jnp.result_type(float))
    log_term = jnp.log1p(k * jnp.square(parameter_norm) * jnp.square(feature_ratio) / dimension)
    return horizon * (horizon - 1) / 2 * dimension * jnp.sqrt(k * (log_term / 2 + 1 / dimension))


@checked
def psrl_potential_at(
    prior_covariances: Float[Array, "H D D"],
    *,
    eps: ScalarLike,
    episodes: ScalarLike,
    feature_ratio: ScalarLike = 1.0,
) -> Float[Array, " H"]:
    """(1/2) log det( I + Gamma_h / eps ) + eps ratio^2 K per step: `psrl_potential` for any eps, not one alone.

    Each eps gives a bound on sum_k E[X^T Gamma_k X] / R_h^2; `psrl_potential` takes eps = 1 / (K ratio^2).

    Args:
        prior_covariances, episodes, feature_ratio: as `psrl_potential`.
        eps: any positive number.

    Returns:
        one number per step.

    Raises:
        ValueError: if prior_covariances does not have three axes.
    """
    require_rank(3, "H D D", prior_covariances=prior_covariances)
    identity = jnp.eye(prior_covariances.shape[-1], dtype=prior_covariances.dtype)[None]
    log_det = jnp.linalg.slogdet(identity + prior_covariances / eps)[1]
    return log_det / 2 + eps * jnp.square(feature_ratio) * episodes


@checked
def psrl_potential_sharp(
    prior_covariances: Float[Array, "H D D"], *, episodes: ScalarLike, feature_ratio: ScalarLike = 1.0
) -> Float[Array, " H"]:
    """min over eps of (1/4) log det( I + Gamma_h / eps ) + eps ratio^2 K, at most K / 4 and ratio^2 K tr Gamma_h.

    Derived here, with half the logarithm of `psrl_potential`: the best linear estimator divides by the whole variance
    of the target, E Var(y|theta) + X^T Gamma X = Var(y) <= R_h^2 / 4, not by R_h^2 / 4 + X^T Gamma X. Goes to
    0 with the prior covariance, and is 0 without episodes. On the simplex a constant may be added to V without moving
    X^T Gamma X, so ratio = sqrt(d) / 2 will do.

    Args, Raises as `psrl_potential`.

    Returns:
        a bound on sum_k E[X^T Gamma_k X] / R_h^2, one number per step.
    """
    require_rank(3, "H D D", prior_covariances=prior_covariances)
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(prior_covariances), 0.0)
    length = jnp.square(jnp.asarray(feature_ratio, eigenvalues.dtype)) * episodes
    # Every eps gives a bound; around its best value the sum is flat. Without episodes or features there is no sum.
    some = jnp.where(length > 0, length, jnp.ones((), length.dtype))
    eps = jnp.geomspace(1e-3, 1e3, 121, dtype=eigenvalues.dtype)[:, None] / some
    log_det = jnp.sum(jnp.log1p(eigenvalues[None] / eps[:, :, None]), axis=-1)
    largest = jnp.minimum(jnp.asarray(episodes, eigenvalues.dtype) / 4, length * jnp.sum(eigenvalues, axis=-1))
    return jnp.minimum(jnp.min(log_det / 4 + eps * length, axis=0), largest)


@checked
def psrl_bayes_regret_sharp(
    prior_covariances: Float[Array, "H D D"], *, rank: int, episodes: ScalarLike, feature_ratio: ScalarLike = 1.0
) -> Float[Array, ""]:
    """BR(K) <= sum_h R_h sqrt( r K potential_h ), with `psrl_potential_sharp` and the rank r in place of d.

    Args:
        prior_covariances, episodes, feature_ratio: as `psrl_potential`.
        rank: r >= rank Gamma_h for all h; d - 1 for every prior on the simplex.

    Returns:
        a bound on the Bayes regret after K episodes, in units of reward.

    Raises:
        ValueError: if prior_covariances does not have three axes, or rank is not in 1..d.
    """
    horizon, dimension = prior_covariances.shape[0], prior_covariances.shape[-1]
    if not 1 <= rank <= dimension:
        raise ValueError(f"rank is {rank}; it must be at least 1 and at most the dimension {dimension}.")
    potential = psrl_potential_sharp(prior_covariances, episodes=episodes, feature_ratio=feature_ratio)
    return jnp.sum(
        value_ranges(horizon).astype(potential.dtype)
        * safe_sqrt(potential * rank * jnp.asarray(episodes, potential.dtype))
    )


@checked
def self_normalised_width(
    log_determinant: Float[Array, "*batch"],
    *,
    failure: ScalarLike,
    ridge: ScalarLike = 1.0,
    parameter_norm: ScalarLike = 1.0,
) -> Float[Array, "*batch"]:
    """beta = (1/2) sqrt( log det(Lambda / lambda) + 2 log(1/delta) ) + sqrt(lambda) B, for targets in [0, 1].

    With probability 1 - delta, |theta_hat - theta|_Lambda <= beta at all times together, for ridge regression of
    adaptive data: a target of range 1 is 1/2-sub-Gaussian. UCRL-VTR uses it for values divided by H - h, where it is at
    most the closed form sqrt( (d log(1 + k/lambda) + 2 log(H K)) / 2 ) + sqrt(lambda) B, for |X| <= 1 and delta of 1 /
    (H K).
    Source: self-normalised bound of Abbasi-Yadkori et al. 2011.

    Args:
        log_determinant: log det(Lambda / lambda).
        failure: delta.
        ridge: lambda.
        parameter_norm: B >= |theta|.

    Returns:
        beta.
    """
    logs = log_determinant - 2 * jnp.log(jnp.asarray(failure, log_determinant.dtype))
    return safe_sqrt(logs) / 2 + jnp.sqrt(jnp.asarray(ridge, logs.dtype)) * parameter_norm


def sequential_projection_dimension(
    *,
    accuracy: ScalarLike,
    failure: ScalarLike,
    rounds: ScalarLike,
    largest_square: ScalarLike = 1.0,
    initial_square: ScalarLike = 1.0,
    sub_gaussian: ScalarLike = 1.0,
) -> Float[Array, ""]:
    """M >= 16 c0 (1 + eps) / eps^2 [ log(1/delta) + log(1 + c_x T / s^2) ]: index dimension for one adaptive random
    walk.

    With it, all T partial sums |s + sum x_i z_i|^2 stay within a factor 1 -+ eps of s^2 + sum x_i^2, with probability 1
    - delta.
    Source: sequential random projection, HyperAgent workshop version, theorem G.1.

    Args:
        accuracy: eps in (0, 1).
        failure: delta.
        rounds: T.
        largest_square: c_x >= x_t^2.
        initial_square: s^2.
        sub_gaussian: c0, the constant of the perturbations (1 for Gaussian, sphere and cube).

    Returns:
        the sufficient M (round up).
    """
    require_numbers(SMALLEST, 1, accuracy=accuracy, failure=failure)
    eps = jnp.asarray(accuracy, jnp.result_type(float))
    logs = -jnp.log(jnp.asarray(failure, eps.dtype)) + jnp.log1p(
        largest_square * jnp.asarray(rounds, eps.dtype) / initial_square
    )
    return logs * 16 * (1 + eps) / jnp.square(eps) * jnp.asarray(sub_gaussian, eps.dtype)


def covariance_tracking_dimension(
    *,
    dimension: int,
    rounds: ScalarLike,
    failure: ScalarLike,
    smallest: ScalarLike = 1.0,
    largest: ScalarLike = 1.0,
) -> Float[Array, ""]:
    """M >= 320 [ d log(1 + 48/s_min sqrt(s_max^2 + T)) + log(2/delta) + log(1 + T/s_min^2) ], Ensemble++ lemma 4.2.

    With it, Sigma_t / 2 <= A_t A_t^T <= 3 Sigma_t / 2 for all t <= T with probability 1 - delta (given an initial
    condition of order d + log(1/delta)). The constants are reconstructed from the proof and loose: far smaller M works
    in practice.

    Args:
        dimension: d.
        rounds: T.
        failure: delta.
        smallest: s_min; s_min^2 is the smallest eigenvalue of the prior precision.
        largest: s_max; s_max^2 is the largest one.

    Returns:
        the sufficient M (round up).
    """
    require_numbers(SMALLEST, 1, failure=failure)
    require_numbers(1, math.inf, dimension=dimension)
    t = jnp.asarray(rounds, jnp.result_type(float))
    covering = dimension * jnp.log1p(48 / smallest * jnp.sqrt(jnp.square(largest) + t))
    return 320 * (covering + jnp.log(2 / jnp.asarray(failure, t.dtype)) + jnp.log1p(t / jnp.square(smallest)))


def confidence_width(
    *, dimension: int, rounds: ScalarLike, failure: ScalarLike, ridge: ScalarLike = 1.0
) -> Float[Array, ""]:
    """beta_T = sqrt(lambda) + sqrt( 2 log(1/delta) + d log(1 + T / (lambda d)) ), for |theta|, |x| <= 1 unit noise."""
    require_numbers(SMALLEST, 1, failure=failure)
    require_numbers(1, math.inf, dimension=dimension)
    t = jnp.asarray(rounds, jnp.result_type(float))
    log_det = dimension * jnp.log1p(t / (ridge * dimension))
    return jnp.sqrt(ridge) + jnp.sqrt(-2 * jnp.log(jnp.asarray(failure, t.dtype)) + log_det)


def ensemble_linear_regret(
    *,
    dimension: int,
    rounds: ScalarLike,
    failure: ScalarLike,
    index_radius: ScalarLike,
    anti_concentration: ScalarLike,
    ridge: ScalarLike = 1.0,
) -> Float[Array, ""]:
    """(1 + 1/p) 2 rho beta_T sqrt( 2 d T log(1 + T / (lambda d)) ): inflated Ensemble++ on linear bandits, lambda >= 1.

    From R(T) <= sum_t (1 + 1/p)(U_t - L_t)(X_t) with half-width rho beta_t |x|_{Sigma_{t-1}} and the elliptical
    potential. The proof needs P(<v, xi> >= sqrt 2) where the paper cites the bound at 1: treat the constants as
    indicative (errata F9.1).

    Args:
        dimension: d.
        rounds: T.
        failure: delta.
        index_radius: rho: sqrt(M) for compact action sets, sqrt(log(|X| / delta)) for finite ones; take the smaller.
        anti_concentration: p, see `ANTI_CONCENTRATION`.
        ridge: lambda.

    Returns:
        the bound, in units of reward.
    """
    t = jnp.asarray(rounds, jnp.result_type(float))
    width = index_radius * confidence_width(dimension=dimension, rounds=t, failure=failure, ridge=ridge)
    potential = 2 * dimension * jnp.log1p(t / (ridge * dimension))
    return (1 + 1 / jnp.asarray(anti_concentration, t.dtype)) * 2 * width * jnp.sqrt(t * potential)


def hyperagent_bayes_regret(
    *, states: int, actions: int, horizon: int, episodes: ScalarLike, prior_mass: ScalarLike = 3.0
) -> Float[Array, ""]:
    """18 H^2 sqrt( beta X A K log+(1 + X A H K) ) log+(1 + K / (X A)), log+ = max(1, log): tabular HyperAgent.

    Source: HyperAgent (arXiv 2402.10228): Dirichlet priors of total mass beta >= 3, M of order log(X A H K), X states
    per step.

    Args:
        states: X, states per step.
        actions: A.
        horizon: H.
        episodes: K.
        prior_mass: beta.

    Returns:
        a bound on the Bayes regret after K episodes, in units of reward.

    Raises:
        ValueError: if prior_mass is a number smaller than 3.
    """
    require_numbers(1, math.inf, states=states, actions=actions, horizon=horizon)
    require_numbers(3, math.inf, prior_mass=prior_mass)
    k = jnp.asarray(episodes, jnp.result_type(float))
    cells = states * actions
    first = jnp.maximum(jnp.log1p(cells * horizon * k), 1)
    second = jnp.maximum(jnp.log1p(k / cells), 1)
    return 18 * horizon**2 * jnp.sqrt(prior_mass * cells * k * first) * second
