"""How large an index must be: A_t A_t^T simulated beside Sigma_t, and the smallest M of which few runs leave its band.

A run fails when (1/2) Sigma_t <= A_t A_t^T <= (3/2) Sigma_t breaks at some t <= T: features on the unit sphere, prior
and noise 1, Gaussian perturbations. With P_t = Sigma_t^-1 and N_t = P_t A_t = N_0 + sum x z^T that is P_t / 2 <=
N_t N_t^T <= 3 P_t / 2, and only G = M N N^T is needed. Given the features, a block of rounds with X^T X = R R^T adds
R Z to sqrt(M) N, Z [D, M] standard normal. Turn the M columns so that sqrt(M) N = (L, 0), L L^T = G: then Z splits into
d columns beside L and the others, whose square is a Wishart matrix of M - d degrees. O(d^3) for every M, exact in law.
Blocks are single rounds up to 1 / SHARE, and later that share of the rounds so far.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds.regret import covariance_tracking_dimension

FAILURE, BAND, SHARE = 0.05, 0.5, 0.05
DIMENSIONS, ROUNDS, HORIZONS, AT = (1, 2, 4, 8, 16), 1000, (100, 100_000), 4
"""Dimensions at ROUNDS rounds; further horizons in dimension AT."""


class Needed(NamedTuple):
    """The smallest sufficient index.

    Attributes:
        dimension: d.
        rounds: T.
        size: the smallest M found with at most FAILURE failures, to three per cent.
        failures: their share at that M.
    """

    dimension: int
    rounds: int
    size: int
    failures: float


def blocks(seed: int, dimension: int, rounds: int) -> tuple[jax.Array, jax.Array]:
    """R of every block [K, D, D], the first one of the prior, and W with W P W^T = I at its end."""
    times = [0]
    while times[-1] < rounds:
        times.append(min(rounds, times[-1] + max(1, int(times[-1] * SHARE))))
    rows = np.random.default_rng(seed).normal(size=(rounds, dimension))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    grams = [np.eye(dimension)] + [rows[a:b].T @ rows[a:b] for a, b in itertools.pairwise(times)]
    values, vectors = np.linalg.eigh(np.stack(grams))
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    whitenings = np.linalg.inv(np.linalg.cholesky(np.cumsum(grams, axis=0)))
    # Failures are counted: float32 is enough, and twice as fast.
    return jnp.asarray(roots, jnp.float32), jnp.asarray(whitenings, jnp.float32)


@functools.partial(jax.jit, static_argnames="runs")
def failures(key: jax.Array, roots: jax.Array, whitenings: jax.Array, size: jax.Array, runs: int) -> jax.Array:
    """Share of runs whose A A^T leaves (1 -+ BAND) Sigma at the end of some block; size is M, more than 2 d."""
    shape, kind = roots.shape[1:], roots.dtype
    eye = jnp.eye(shape[0], dtype=kind)
    # Bartlett: chi variables of M - d, M - d - 1, ... degrees on the diagonal, normal ones below it.
    degrees = size - shape[0] - jnp.arange(shape[0], dtype=kind)

    def step(
        carry: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        lower, failed = carry
        step_key, root, whitening = block
        beside, below, chi = jax.random.split(step_key, 3)
        first = lower + root @ jax.random.normal(beside, shape, kind)
        squares = 2 * jax.random.gamma(chi, degrees / 2, dtype=kind)
        rest = root @ (jnp.tril(jax.random.normal(below, shape, kind), -1) + jnp.diag(jnp.sqrt(squares)))
        total = first @ first.T + rest @ rest.T
        white = whitening @ total @ whitening.T / size
        # A Cholesky factor of what is not positive definite is NaN.
        gaps = jnp.linalg.cholesky(jnp.stack([white - (1 - BAND) * eye, (1 + BAND) * eye - white]))
        return (jnp.linalg.cholesky(total), failed | jnp.any(jnp.isnan(gaps))), None

    def run(run_key: jax.Array) -> jax.Array:
        keys = jax.random.split(run_key, len(roots))
        start = jnp.zeros(shape, kind), jnp.asarray(False)
        return jax.lax.scan(step, start, (keys, roots, whitenings))[0][1]

    return jnp.mean(jax.vmap(run)(jax.random.split(key, runs)).astype(float))


def needed(seed: int, dimension: int, rounds: int, *, runs: int = 300) -> Needed:
    """The smallest sufficient M by bisection, the same draws at every M."""
    known = blocks(seed, dimension, rounds)

    def share(size: int) -> float:
        return float(failures(jax.random.key(seed), *known, jnp.asarray(size, jnp.float32), runs))

    low, high = 2 * dimension, 64 + 16 * dimension
    while (found := share(high)) > FAILURE:
        low, high = high, 2 * high
    while high - low > max(1, high // 32):
        middle = (low + high) // 2
        at_middle = share(middle)
        if at_middle > FAILURE:
            low = middle
        else:
            high, found = middle, at_middle
    return Needed(dimension, rounds, high, found)


def needed_sizes(seed: int) -> list[Needed]:
    """At every dimension, and in one dimension at further horizons."""
    pairs = [(dimension, ROUNDS) for dimension in DIMENSIONS] + [(AT, rounds) for rounds in HORIZONS]
    return [needed(seed, dimension, rounds) for dimension, rounds in pairs]


def lemma_size(found: Needed) -> float:
    """The M of the lemma for the same promise."""
    return float(covariance_tracking_dimension(dimension=found.dimension, rounds=found.rounds, failure=FAILURE))
