"""How large must an index be? Walks of A_t A_t^T against Sigma_t, simulated, and the M at which 5 % of them fail.

A run fails when (1/2) Sigma_t <= A_t A_t^T <= (3/2) Sigma_t breaks at some t <= T. Features are unit vectors, prior and
noise are 1; with d = 1 this is the sequential projection with eps = 1/2. Given the features, X^T Z of a block of
rounds is Gaussian for Gaussian perturbations, so a walk jumps from check to check without loss; it is checked at every
round up to 50 and at rounds 2 % apart later.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

FAILURE = 0.05
BAND = 0.5
SHARE = 0.02
"""Of a round, between two checks of a long walk."""


@dataclass(frozen=True, kw_only=True)
class Walks:
    """Runs of the factor beside the covariance it should track.

    Attributes:
        dimension: d.
        sizes: M of the rows.
        failed_at: round of the first failure of every run and size, infinite where there was none [runs, sizes].
    """

    dimension: int
    sizes: np.ndarray
    failed_at: np.ndarray

    def rates(self, rounds: int) -> np.ndarray:
        """Share of runs that failed by then, for every size."""
        return (self.failed_at <= rounds).mean(0)

    def needed(self, rounds: int, *, resample: np.random.Generator | None = None) -> float:
        """The size with FAILURE failures by then, between two sizes by the logarithm of the rate; NaN if outside."""
        failed = self.failed_at <= rounds
        if resample is not None:
            failed = failed[resample.integers(len(failed), size=len(failed))]
        rates = np.log(np.maximum(failed.mean(0), 0.5 / len(failed)))
        level, place = np.log(FAILURE), int(np.argmax(rates <= np.log(FAILURE)))
        if place == 0:
            return float("nan")
        share = (rates[place - 1] - level) / (rates[place - 1] - rates[place])
        return float(self.sizes[place - 1] + share * (self.sizes[place] - self.sizes[place - 1]))


def checked_rounds(rounds: int, share: float) -> np.ndarray:
    """Every round up to 1 / share, then rounds that share apart, ending with the last one."""
    times = [0]
    while times[-1] < rounds:
        times.append(min(rounds, times[-1] + max(1, int(times[-1] * share))))
    return np.asarray(times)


def _precisions(generator: np.random.Generator, dimension: int, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of X^T X of every block [K, d, d], and the whitening of I + X^T X up to its end."""
    grams = np.empty((len(times), dimension, dimension))
    grams[0] = np.eye(dimension)
    for place, length in enumerate(np.diff(times), start=1):
        rows = generator.normal(size=(length, dimension))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        grams[place] = rows.T @ rows
    values, vectors = np.linalg.eigh(grams)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    return roots, np.linalg.inv(np.linalg.cholesky(np.cumsum(grams, axis=0)))


def _outside(ratio: jax.Array) -> jax.Array:
    """Whether an eigenvalue of Sigma^-1/2 A A^T Sigma^-1/2 leaves 1 -+ BAND."""
    eye = jnp.eye(ratio.shape[-1], dtype=ratio.dtype)
    gaps = jnp.stack([ratio - (1 - BAND) * eye, (1 + BAND) * eye - ratio])
    # A Cholesky factor of what is not positive definite is NaN.
    return jnp.any(jnp.isnan(jnp.linalg.cholesky(gaps)), axis=(0, -2, -1))


@functools.partial(jax.jit, static_argnames=("sizes", "runs"))
def _first_failures(key: jax.Array, roots: jax.Array, whitenings: jax.Array, sizes: tuple[int, ...], runs: int):
    """Place of the first failed check; M columns of one walk are the walk of that size."""
    dimension = roots.shape[-1]
    edges = (0, *sizes)

    def check(carry, block):
        natural, first = carry
        place, root, whitening = block
        normal = jax.random.normal(jax.random.fold_in(key, place), (runs, dimension, sizes[-1]), natural.dtype)
        natural = natural + root @ normal
        white = whitening @ natural
        parts = [white[..., low:high] for low, high in itertools.pairwise(edges)]
        squares = jnp.cumsum(jnp.stack([part @ part.mT for part in parts], 1), axis=1)
        failed = _outside(squares / jnp.asarray(sizes, natural.dtype)[:, None, None])
        return (natural, jnp.where(failed, jnp.minimum(first, place), first)), None

    start = jnp.zeros((runs, dimension, sizes[-1]), roots.dtype), jnp.full((runs, len(sizes)), len(roots))
    return jax.lax.scan(check, start, (jnp.arange(len(roots)), roots, whitenings))[0][1]


def walks(*, seed: int, dimension: int, rounds: int, sizes: Sequence[int], runs: int, share: float = SHARE) -> Walks:
    """Simulate the walks of one dimension, of all sizes at once."""
    generator, times = np.random.default_rng(seed), checked_rounds(rounds, share)
    blocks = (jnp.asarray(block, jnp.float32) for block in _precisions(generator, dimension, times))
    places = np.asarray(_first_failures(jax.random.key(seed), *blocks, tuple(sizes), runs))
    failed_at = np.append(times, np.inf)[places]
    return Walks(dimension=dimension, sizes=np.asarray(sizes), failed_at=failed_at)
