"""Bandits whose mean reward is not linear in the features of the actions: quadratic forms and a random network.

Source of the rewards: experiments of Ensemble++ (arXiv 2407.13195). It does not say how features and parameters are
drawn; here features are uniform on the unit sphere, as in the neural bandit literature (Zhou et al. 2020, arXiv
1911.04462), whose quadratic rewards these are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_positive
from jaxrl_llm.checks import require_sizes
from jaxrl_llm.typing import PRNGKey

NEURAL_UNITS = (50, 50)
"""Hidden layers of the network behind the rewards of `neural_bandit`."""


class GaussianBandit(NamedTuple):
    """A bandit with a finite set of actions and Gaussian noise.

    Attributes:
        features: of each action [X, D].
        mean_rewards: of each action [X].
        noise_scale: standard deviation of a reward given its action.
    """

    features: Float[Array, "X D"]
    mean_rewards: Float[Array, " X"]
    noise_scale: float

    def draw_noise(self, key: PRNGKey, rounds: int) -> Float[Array, " T"]:
        """What `observe` needs of that many rounds: N(0, noise_scale^2)."""
        return self.noise_scale * jax.random.normal(key, (rounds,), self.mean_rewards.dtype)

    def observe(self, mean: Float[Array, ""], noise: Float[Array, ""]) -> Float[Array, ""]:
        """mean + noise."""
        return mean + noise


class BernoulliBandit(NamedTuple):
    """A bandit with a finite set of actions and rewards 0 or 1.

    Attributes:
        features: of each action [X, D].
        mean_rewards: probability of 1 of each action [X].
    """

    features: Float[Array, "X D"]
    mean_rewards: Float[Array, " X"]

    def draw_noise(self, key: PRNGKey, rounds: int) -> Float[Array, " T"]:
        """What `observe` needs of that many rounds: uniform on [0, 1)."""
        return jax.random.uniform(key, (rounds,), self.mean_rewards.dtype)

    def observe(self, mean: Float[Array, ""], noise: Float[Array, ""]) -> Float[Array, ""]:
        """1 where noise < mean, else 0."""
        return (noise < mean).astype(mean.dtype)


def _on_sphere(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    normal = jax.random.normal(key, shape)
    return normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)


def quadratic_bandit(
    key: PRNGKey, *, dimension: int = 100, actions: int = 1000, noise_scale: float = 0.1
) -> GaussianBandit:
    """Mean 10^-2 x^T Theta Theta^T x, the entries of Theta [D, D] independent N(0, 1).

    Args:
        key: random key.
        dimension: D.
        actions: how many.
        noise_scale: standard deviation of a reward.

    Returns:
        the bandit; means are near D / 100.

    Raises:
        ValueError: if a size is below 1 or noise_scale is not positive.
    """
    require_sizes(dimension=dimension, actions=actions)
    require_positive("noise_scale", noise_scale)
    feature_key, parameter_key = jax.random.split(key)
    features = _on_sphere(feature_key, (actions, dimension))
    theta = jax.random.normal(parameter_key, (dimension, dimension))
    return GaussianBandit(features, 1e-2 * jnp.sum(jnp.square(features @ theta), axis=1), noise_scale)


def vector_quadratic_bandit(
    key: PRNGKey, *, dimension: int = 100, actions: int = 1000, noise_scale: float = 0.1
) -> GaussianBandit:
    """Mean 10 <x, theta>^2, theta uniform on the unit sphere.

    Args, Returns, Raises as `quadratic_bandit`; means are near 10 / D.
    """
    require_sizes(dimension=dimension, actions=actions)
    require_positive("noise_scale", noise_scale)
    feature_key, parameter_key = jax.random.split(key)
    features = _on_sphere(feature_key, (actions, dimension))
    theta = _on_sphere(parameter_key, (dimension,))
    return GaussianBandit(features, 10 * jnp.square(features @ theta), noise_scale)


def neural_bandit(
    key: PRNGKey, *, dimension: int = 100, actions: int = 1000, temperature: float = 0.1
) -> BernoulliBandit:
    """Rewards 1 with probability softmax(logits / temperature)[1]: two hidden layers of 50 ReLU units, two logits.

    Weights are N(0, 2 / fan_in), biases 0.

    Args:
        key: random key.
        dimension: D.
        actions: how many.
        temperature: of the softmax.

    Returns:
        the bandit.

    Raises:
        ValueError: if a size is below 1 or temperature is not positive.
    """
    require_sizes(dimension=dimension, actions=actions)
    require_positive("temperature", temperature)
    feature_key, *layer_keys = jax.random.split(key, 4)
    features = units = _on_sphere(feature_key, (actions, dimension))
    widths = (dimension, *NEURAL_UNITS, 2)
    for number, (layer_key, before, after) in enumerate(zip(layer_keys, widths[:-1], widths[1:], strict=True)):
        units = units @ ((2 / before) ** 0.5 * jax.random.normal(layer_key, (before, after)))
        units = jax.nn.relu(units) if number < len(NEURAL_UNITS) else units
    return BernoulliBandit(features, jax.nn.softmax(units / temperature, axis=1)[:, 1])
