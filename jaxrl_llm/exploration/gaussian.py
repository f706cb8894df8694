"""The posterior of linear-Gaussian regression, and the factor A that hypermodels keep beside it.

y = <x, theta> + sigma eps with theta ~ N(mu_0, Sigma_0). A hypermodel keeps A_t in R^{d x M} with A_t A_t^T near
Sigma_t, so that mu_t + A_t xi is a draw from nearly the posterior at the price of M numbers.
Source: Ensemble++ (arXiv 2407.13195), incremental update; the rank-one form is derived from it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_positive
from jaxrl_llm.exploration.inputs import require_width

HIGHEST = jax.lax.Precision.HIGHEST
"""A covariance that shrinks by rank-one steps does not forgive the rounding of shorter products. On CPU, products are
also a multiple faster than sums over an axis when seeds are mapped."""


class Gaussian(NamedTuple):
    """N(mean, covariance) of the parameter.

    Attributes:
        mean: mu_t [D].
        covariance: Sigma_t [D, D].
    """

    mean: Float[Array, " D"]
    covariance: Float[Array, "D D"]


class Hypermodel(NamedTuple):
    """The posterior with its factor.

    Attributes:
        posterior: mean and covariance; the covariance is only used by updates.
        factor: A_t [D, M]; mu + A xi is what is acted with.
    """

    posterior: Gaussian
    factor: Float[Array, "D M"]


def isotropic_prior(dimension: int, prior_scale: float) -> Gaussian:
    """N(0, prior_scale^2 I).

    Raises:
        ValueError: if prior_scale is not positive.
    """
    require_positive("prior_scale", prior_scale)
    return Gaussian(jnp.zeros(dimension), prior_scale**2 * jnp.eye(dimension))


def _gain(
    covariance: Float[Array, "D D"], features: Float[Array, " F"], noise_scale: float
) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    """(g, Sigma x) with g = Sigma x / (sigma^2 + x^T Sigma x)."""
    require_positive("noise_scale", noise_scale)
    require_width("features", features, covariance.shape[0])
    along = jnp.matmul(covariance, features, precision=HIGHEST)
    return along / (noise_scale**2 + jnp.sum(features * along)), along


def posterior_update(
    posterior: Gaussian, features: Float[Array, " D"], reward: Float[Array, ""], *, noise_scale: float
) -> Gaussian:
    """One exact Bayes update: g = Sigma x / (sigma^2 + x^T Sigma x), Sigma - g (Sigma x)^T, mu + g (y - x^T mu).

    Args:
        posterior: before the datum.
        features: x.
        reward: y.
        noise_scale: sigma, the standard deviation of a reward.

    Returns:
        the posterior after the datum.

    Raises:
        ValueError: if noise_scale is not positive or features have the wrong width.
    """
    gain, along = _gain(posterior.covariance, features, noise_scale)
    return _applied(posterior, features, reward, gain, along)


def _applied(posterior: Gaussian, features: Array, reward: Array, gain: Array, along: Array) -> Gaussian:
    innovation = reward - jnp.sum(features * posterior.mean)
    return Gaussian(posterior.mean + gain * innovation, posterior.covariance - gain[:, None] * along[None, :])


def hypermodel_update(
    model: Hypermodel,
    features: Float[Array, " D"],
    reward: Float[Array, ""],
    perturbation: Float[Array, " M"],
    *,
    noise_scale: float,
) -> Hypermodel:
    """The rank-one (Kalman) form: as `posterior_update`, and A + g (sigma z^T - x^T A). O(d^2 + d M).

    If the prior factor satisfies E A_0 A_0^T = Sigma_0, and z is centred, of E|z|^2 = 1 and independent of the
    features, then E A_t A_t^T = Sigma_t.

    Args:
        model: before the datum.
        features: x.
        reward: y.
        perturbation: z, drawn once for this datum.
        noise_scale: sigma.

    Returns:
        the model after the datum.

    Raises:
        ValueError: if noise_scale is not positive or a width is wrong.
    """
    require_width("perturbation", perturbation, model.factor.shape[1])
    gain, along = _gain(model.posterior.covariance, features, noise_scale)
    innovation = noise_scale * perturbation - jnp.matmul(features, model.factor, precision=HIGHEST)
    return Hypermodel(
        _applied(model.posterior, features, reward, gain, along),
        model.factor + gain[:, None] * innovation[None, :],
    )


def hypermodel_update_inverse_form(
    model: Hypermodel,
    features: Float[Array, " D"],
    reward: Float[Array, ""],
    perturbation: Float[Array, " M"],
    *,
    noise_scale: float,
) -> Hypermodel:
    """The same update as it is printed, with inverses: the oracle of the rank-one form. O(d^3).

    Sigma_t^-1 = Sigma^-1 + x x^T / sigma^2; mu_t = Sigma_t (Sigma^-1 mu + x y / sigma^2);
    A_t = Sigma_t (Sigma^-1 A + x z^T / sigma).

    Args, Returns as `hypermodel_update`.
    """
    mean, covariance = model.posterior
    precision = jnp.linalg.inv(covariance)
    following = precision + features[:, None] * features[None, :] / noise_scale**2
    mean = jnp.linalg.solve(following, precision @ mean + features * reward / noise_scale**2)
    factor = jnp.linalg.solve(
        following, precision @ model.factor + features[:, None] * perturbation[None, :] / noise_scale
    )
    return Hypermodel(Gaussian(mean, jnp.linalg.inv(following)), factor)
