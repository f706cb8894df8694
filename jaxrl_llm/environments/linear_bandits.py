"""Bandits whose mean reward is linear in known features of the actions."""

from typing import NamedTuple

import jax
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_positive
from jaxrl_llm.checks import require_sizes
from jaxrl_llm.typing import PRNGKey


class LinearBandit(NamedTuple):
    """A linear bandit with a fixed finite set of actions.

    Attributes:
        features: of each action [X, D].
        parameter: theta [D].
        noise_scale: standard deviation of a reward given its action.
    """

    features: Float[Array, "X D"]
    parameter: Float[Array, " D"]
    noise_scale: float = 1.0

    @property
    def mean_rewards(self) -> Float[Array, " X"]:
        """<x, theta> of each action."""
        return self.features @ self.parameter


def box_bandit(
    key: PRNGKey,
    *,
    dimension: int,
    actions: int,
    prior_scale: float = 10**0.5,
    noise_scale: float = 1.0,
    half_width: float | None = None,
) -> LinearBandit:
    """Features uniform in [-c, c]^d, theta ~ N(0, prior_scale^2 I).

    Source: Ensemble++ (arXiv 2407.13195): theta ~ N(0, 10 I) and unit noise; c = 1 / sqrt(d) in its main text, 1 /
    sqrt(5) in its appendix.

    Args:
        key: random key.
        dimension: d.
        actions: how many.
        prior_scale: standard deviation of each coordinate of theta.
        noise_scale: standard deviation of a reward.
        half_width: c; 1 / sqrt(d) where None, so that no action is longer than 1.

    Returns:
        the bandit.

    Raises:
        ValueError: if a size is below 1 or a scale is not positive.
    """
    require_sizes(dimension=dimension, actions=actions)
    width = dimension**-0.5 if half_width is None else half_width
    for name, scale in (("prior_scale", prior_scale), ("noise_scale", noise_scale), ("half_width", width)):
        require_positive(name, scale)
    feature_key, parameter_key = jax.random.split(key)
    features = jax.random.uniform(feature_key, (actions, dimension), minval=-width, maxval=width)
    return LinearBandit(features, prior_scale * jax.random.normal(parameter_key, (dimension,)), noise_scale)
