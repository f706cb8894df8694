"""Linear mixture MDPs to explore: random ones, ones that need exploration, and priors of finitely many parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import require_positive
from jaxrl_llm.checks import require_sizes
from jaxrl_llm.tabular import LinearMixture
from jaxrl_llm.typing import PRNGKey

MEDIUM, GOOD, BAD = 0, 1, 2
"""The states of `risky_mixture`."""

STATE_REWARDS = (0.55, 1.0, 0.0)
CHANCES = (0.05, 0.95)
"""Probabilities of the good state that a base kernel of `risky_mixture` may give a risky action."""


def random_mixture(
    key: PRNGKey,
    *,
    states: int = 6,
    actions: int = 3,
    horizon: int = 5,
    dimension: int = 4,
    concentration: float = 0.3,
) -> LinearMixture:
    """Base kernels with rows from a Dirichlet law, rewards uniform in [0, 1], first state 0.

    Every action is informative here, so that an agent which never explores on purpose learns too.

    Args:
        key: random key.
        states, actions, horizon, dimension: S, A, H, d.
        concentration: of the Dirichlet law of each row; small is nearly deterministic.

    Returns:
        the mixture.

    Raises:
        ValueError: if a size is below 1 or the concentration is not a positive number.
    """
    require_sizes(states=states, actions=actions, horizon=horizon, dimension=dimension)
    require_positive("concentration", concentration)
    kernel_key, reward_key = jax.random.split(key)
    rows = jax.random.dirichlet(kernel_key, jnp.full(states, concentration), (dimension, states, actions))
    rewards = jax.random.uniform(reward_key, (horizon, states, actions))
    return LinearMixture(rows, rewards, jax.nn.one_hot(0, states, dtype=rows.dtype))


def risky_mixture(key: PRNGKey, *, actions: int = 6, horizon: int = 5, dimension: int = 4) -> LinearMixture:
    """A sure action against risky ones: what is not tried is not learned.

    Three states: medium (reward 0.55), good (1), bad (0); the reward of a state is paid at steps 2..H. Action 0 leads
    to the medium state surely, every other one to the good state with probability sum_i theta_{h,i} p_{i,s,a} and to
    the bad one otherwise, p_{i,s,a} 0.05 or 0.95 with equal chances. The first state is the medium one.

    Args:
        key: random key of p.
        actions, horizon, dimension: A, H, d.

    Returns:
        the mixture.

    Raises:
        ValueError: if a size is below 1, or there is no risky action.
    """
    require_sizes(horizon=horizon, dimension=dimension)
    if actions < 2:
        raise ValueError(f"actions is {actions}; it must be at least 2, a sure and a risky one.")
    states = len(STATE_REWARDS)
    good = jnp.asarray(CHANCES)[jax.random.randint(key, (dimension, states, actions - 1), 0, len(CHANCES))]
    risky = jnp.stack([jnp.zeros_like(good), good, 1 - good], axis=-1)
    sure = jnp.broadcast_to(jax.nn.one_hot(MEDIUM, states, dtype=good.dtype), (dimension, states, 1, states))
    paid = (jnp.arange(horizon) > 0).astype(good.dtype)[:, None, None]
    rewards = paid * jnp.broadcast_to(jnp.asarray(STATE_REWARDS)[None, :, None], (horizon, states, actions))
    initial = jax.nn.one_hot(MEDIUM, states, dtype=good.dtype)
    return LinearMixture(jnp.concatenate([sure, risky], axis=2), rewards, initial)


def simplex_atoms(
    key: PRNGKey, *, horizon: int, atoms: int, dimension: int, concentration: float = 0.5, width: ScalarLike = 1.0
) -> Float[Array, "H N D"]:
    """The support of a finite prior: Dirichlet draws for each step, drawn towards the centre of the simplex.

    Args:
        key: random key.
        horizon, atoms, dimension: H, N, d.
        concentration: of the Dirichlet law.
        width: c in (0, 1]; an atom is 1/d + c (draw - 1/d), so that prior covariances are multiplied by c^2.

    Returns:
        theta of each step and atom.

    Raises:
        ValueError: if a size is below 1, the concentration is not positive or the width not in (0, 1].
    """
    require_sizes(horizon=horizon, atoms=atoms, dimension=dimension)
    require_positive("concentration", concentration)
    if isinstance(width, (int, float)) and not 0 < width <= 1:
        raise ValueError(f"width is {width}; it must be above 0 and at most 1.")
    draws = jax.random.dirichlet(key, jnp.full(dimension, concentration), (horizon, atoms))
    return jnp.asarray(width, draws.dtype) * (draws - 1 / dimension) + 1 / dimension


def segment_atoms(key: PRNGKey, *, horizon: int, atoms: int, dimension: int) -> Float[Array, "H N D"]:
    """The support of a prior of rank 1: atoms on one segment between two corners of the simplex, a pair per step.

    Args, Returns, Raises as `simplex_atoms`; dimension must be at least 2.
    """
    require_sizes(horizon=horizon, atoms=atoms)
    if dimension < 2:
        raise ValueError(f"dimension is {dimension}; it must be at least 2.")
    corner_key, place_key = jax.random.split(key)
    order = jax.vmap(lambda k: jax.random.permutation(k, dimension))(jax.random.split(corner_key, horizon))
    corners = jax.nn.one_hot(order[:, :2], dimension, dtype=jnp.result_type(float))  # [H, 2, D]
    place = jax.random.uniform(place_key, (horizon, atoms, 1))
    return place * corners[:, None, 0] + (1 - place) * corners[:, None, 1]


def draw_parameters(key: PRNGKey, atoms: Float[Array, "H N D"], weights: Float[Array, "H N"]) -> Float[Array, "H D"]:
    """theta of a true MDP: one atom for each step, independently, with probability its weight."""
    chosen = jax.random.categorical(key, jnp.log(weights), axis=1)
    return jnp.take_along_axis(atoms, chosen[:, None, None], axis=1)[:, 0]
