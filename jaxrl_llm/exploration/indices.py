"""Laws of the index vectors of hypermodels, each with its three roles.

A hypermodel f(x, xi) turns a random index xi in R^M into a random value. The same family of laws serves three roles:
the reference index is drawn to act, the perturbation is stored with each datum once and for ever, the update indices
are those over which a training loss takes its expectation. Scalings are those of Ensemble++ (arXiv 2407.13195) and its
public code: E xi xi^T = I for the reference (except where a law says otherwise), E|z|^2 = 1 for the perturbation.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_choice
from jaxrl_llm.typing import PRNGKey

SPARSE_COORDINATES = 2
"""Coordinates of a sparse index that are not 0."""

LARGEST_UPDATE_SET = 2**16
"""Update sets are refused beyond this many vectors."""

Draw = Callable[[PRNGKey, tuple[int, ...]], Float[Array, "*shape"]]
"""(key, shape) -> independent index vectors along the last axis of that shape."""


class IndexLaw(NamedTuple):
    """A law of index vectors in its three roles.

    Attributes:
        name: one of `LAWS`.
        reference: (key, [..., M]) -> xi, to act with.
        perturbation: (key, [..., M]) -> z, to be stored with a datum; centred but for one_hot, E|z|^2 = 1.
        update_size: M -> how many vectors the update set has; None where updates take fresh draws of the reference.
        update_set: M -> all vectors [U, M] over which the loss takes its exact mean; None as above.
    """

    name: str
    reference: Draw
    perturbation: Draw
    update_size: Callable[[int], int] | None = None
    update_set: Callable[[int], np.ndarray] | None = None


def _gaussian(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape)


def _sphere(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    # Sums over the first axis are sums of vectors, several times faster than sums within a short last axis.
    normal = jax.random.normal(key, (shape[-1], *shape[:-1]))
    return jnp.moveaxis(normal * jax.lax.rsqrt(jnp.sum(jnp.square(normal), axis=0, keepdims=True)), 0, -1)


def _cube(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    return jax.random.rademacher(key, shape, dtype=jnp.result_type(float))


def _one_hot(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    return jax.nn.one_hot(jax.random.randint(key, shape[:-1], 0, shape[-1]), shape[-1], dtype=jnp.result_type(float))


def _coordinate(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    place, sign = jax.random.split(key)
    return _one_hot(place, shape) * _cube(sign, (*shape[:-1], 1))


def _support(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    """1 on two coordinates that differ: the second one is the first plus a step of 1..M-1 around the circle."""
    first, step = jax.random.split(key)
    size = shape[-1]
    if size < SPARSE_COORDINATES:
        raise ValueError(f"index_dimension is {size}; a sparse index needs at least {SPARSE_COORDINATES}.")
    place = jax.random.randint(first, shape[:-1], 0, size)
    other = (place + jax.random.randint(step, shape[:-1], 1, size)) % size
    dtype = jnp.result_type(float)
    return jax.nn.one_hot(place, size, dtype=dtype) + jax.nn.one_hot(other, size, dtype=dtype)


def _sparse(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    place, sign = jax.random.split(key)
    return _support(place, shape) * _cube(sign, shape)


def _sparse_consistent(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    place, sign = jax.random.split(key)
    return _support(place, shape) * _cube(sign, (*shape[:-1], 1))


def _scaled(draw: Draw, scale: Callable[[int], float]) -> Draw:
    return lambda key, shape: draw(key, shape) * scale(shape[-1])


def _cube_set(size: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=size)))


def _coordinate_set(size: int) -> np.ndarray:
    return math.sqrt(size) * np.concatenate([np.eye(size), -np.eye(size)])


def _sparse_set(size: int, *, consistent: bool) -> np.ndarray:
    signs = [(1.0, 1.0), (-1.0, -1.0)] + ([] if consistent else [(1.0, -1.0), (-1.0, 1.0)])
    rows = []
    for places in itertools.combinations(range(size), SPARSE_COORDINATES):
        for pair in signs:
            row = np.zeros(size)
            row[list(places)] = pair
            rows.append(row)
    return math.sqrt(size / SPARSE_COORDINATES) * np.array(rows)


def _inverse_root(size: int) -> float:
    return 1 / math.sqrt(size)


def _sparse_scale(size: int) -> float:
    return math.sqrt(size / SPARSE_COORDINATES)


GAUSSIAN = IndexLaw("gaussian", _gaussian, _scaled(_gaussian, _inverse_root))
"""xi ~ N(0, I); z ~ N(0, I / M), of norm about 1 only."""

SPHERE = IndexLaw("sphere", _scaled(_sphere, math.sqrt), _sphere)
"""xi uniform on the sphere of radius sqrt(M); z on the unit sphere."""

CUBE = IndexLaw("cube", _cube, _scaled(_cube, _inverse_root), lambda size: 2**size, _cube_set)
"""xi uniform on {-1, 1}^M; z = xi / sqrt(M); updates take all 2^M sign vectors."""

COORDINATE = IndexLaw(
    "coordinate", _scaled(_coordinate, math.sqrt), _coordinate, lambda size: 2 * size, _coordinate_set
)
"""xi uniform on +-sqrt(M) e_i; z = xi / sqrt(M); updates take all 2 M of them."""

SPARSE = IndexLaw(
    "sparse",
    _scaled(_sparse, _sparse_scale),
    _scaled(_sparse, lambda size: 1 / math.sqrt(SPARSE_COORDINATES)),
    lambda size: 4 * math.comb(size, SPARSE_COORDINATES),
    lambda size: _sparse_set(size, consistent=False),
)
"""sqrt(M / 2) times independent signs on two coordinates; z has unit norm."""

SPARSE_CONSISTENT = IndexLaw(
    "sparse_consistent",
    _scaled(_sparse_consistent, _sparse_scale),
    _scaled(_sparse_consistent, lambda size: 1 / math.sqrt(SPARSE_COORDINATES)),
    lambda size: 2 * math.comb(size, SPARSE_COORDINATES),
    lambda size: _sparse_set(size, consistent=True),
)
"""As sparse, with one sign for both. Not isotropic: E xi_i xi_j = 1 / (M - 1) for i != j (errata F9.3)."""

ONE_HOT = IndexLaw("one_hot", _one_hot, _one_hot, lambda size: size, np.eye)
"""xi = e_i: an ensemble, whose members are the columns. Neither centred nor isotropic."""

LAWS = {law.name: law for law in (GAUSSIAN, SPHERE, CUBE, COORDINATE, SPARSE, SPARSE_CONSISTENT, ONE_HOT)}
"""All laws by name."""

CENTRED_ISOTROPIC = (GAUSSIAN, SPHERE, CUBE, COORDINATE, SPARSE)
"""The five with E xi = 0 and E xi xi^T = I, which the theory asks for."""


def get_law(name: str) -> IndexLaw:
    """The law of that name.

    Raises:
        ValueError: if there is none, naming the nearest one.
    """
    require_choice("law", name, LAWS)
    return LAWS[name]


def switched_law(number: Int[Array, ""], laws: tuple[IndexLaw, ...] = CENTRED_ISOTROPIC) -> IndexLaw:
    """The law `laws[number]` for a number that is only known at run time, so that one program serves all of them.

    Args:
        number: which law; an array, which may be traced.
        laws: the laws to choose from.

    Returns:
        a law without an update set.
    """

    def draw(branches: list[Draw]) -> Draw:
        return lambda key, shape: jax.lax.switch(number, [lambda k, f=f: f(k, shape) for f in branches], key)

    return IndexLaw("switched", draw([law.reference for law in laws]), draw([law.perturbation for law in laws]))


def update_indices(law: IndexLaw, key: PRNGKey, index_dimension: int, *, draws: int) -> Float[Array, "U M"]:
    """The indices over which a training loss takes its mean: the whole update set, or fresh draws where there is none.

    Args:
        law: law of the update indices.
        key: random key, not used where the set is finite.
        index_dimension: M.
        draws: how many draws, where draws are taken.

    Returns:
        one index per row.

    Raises:
        ValueError: if M is below 1 or the set is larger than `LARGEST_UPDATE_SET`.
    """
    require_at_least("index_dimension", index_dimension, 1)
    if law.update_set is None or law.update_size is None:
        return law.reference(key, (draws, index_dimension))
    size = law.update_size(index_dimension)
    if size > LARGEST_UPDATE_SET:
        raise ValueError(
            f"index_dimension is {index_dimension}, for which the update set of {law.name} has {size} vectors; it must "
            f"have at most {LARGEST_UPDATE_SET}."
        )
    return jnp.asarray(law.update_set(index_dimension), jnp.result_type(float))
