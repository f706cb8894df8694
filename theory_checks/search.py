"""How tight can a bound be? Gradient ascent on policies that maximises |Error| / bound, from many starts.

Everything that is differentiated is the exact enumeration of a token tree. The reward is the worst one for its policies
throughout, which is known in closed form: |Error| = E_mu max(0, 1 + sum_t (rho_t - 1) - prod_t rho_t), at R = 1 where
that is positive. A ratio above 1 would be a counterexample.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import SHARP
from theory_checks import token_trees as trees

SHAPES = ((2, 2), (2, 4), (3, 3))
"""(vocabulary, horizon) of the trees that are searched."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The tightest world found for one bound and one shape.

    Attributes:
        bound: name of the sharp bound.
        vocabulary: of the tree.
        horizon: of the tree.
        ratio: largest |Error| / bound over restarts and steps.
        median: median over restarts of the last ratio.
        eps: largest TV of a context in the tightest world.
    """

    bound: str
    vocabulary: int
    horizon: int
    ratio: float
    median: float
    eps: float


def _ratios(world) -> tuple[jax.Array, jax.Array]:
    pi, mu = world
    inputs = trees.bound_inputs(pi, mu)
    error = trees.worst_error(pi, mu)
    # Below 1e-4 the ratio would be one of rounding errors.
    return jnp.stack([error / jnp.maximum(bound(inputs), 1e-4) for bound in SHARP.values()]), inputs.max_tv


def _ascend(world, which: jax.Array, *, steps: int, rate: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam on log of the ratio; the largest ratio seen, the last one, and eps where it was largest."""

    def objective(w):
        ratios, eps = _ratios(w)
        return jnp.log(ratios[which] + 1e-12), (ratios[which], eps)

    def step(carry, index):
        w, first, second, best, best_eps = carry
        (_, (ratio, eps)), slope = jax.value_and_grad(objective, has_aux=True)(w)
        # A maximum over contexts, or an absolute value at 0, has no derivative where it ties.
        slope = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), slope)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, slope)
        decay = rate * (1 - index / steps)
        w = jax.tree.map(lambda x, m, v: x + decay * m / (jnp.sqrt(v) + 1e-9), w, first, second)
        better = ratio > best
        carry = (w, first, second, jnp.where(better, ratio, best), jnp.where(better, eps, best_eps))
        return carry, ratio

    zeros = jax.tree.map(jnp.zeros_like, world)
    start = (world, zeros, zeros, jnp.zeros(()), jnp.zeros(()))
    carry, ratios = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.float64))
    return carry[3], ratios[-1], carry[4]


def search(
    *, seed: int, restarts: int = 48, steps: int = 600, rate: float = 0.1, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> list[Found]:
    """The tightest world found for each sharp bound and each shape."""
    found, generator, names = [], np.random.default_rng(seed), list(SHARP)
    for vocabulary, horizon in shapes:
        count = restarts * len(names)
        pi, mu, _ = trees.draw(
            generator,
            worlds=count,
            vocabulary=vocabulary,
            horizon=horizon,
            noise=np.geomspace(0.05, 3.0, restarts).repeat(len(names)),
            share=np.ones(count),
            kind=np.zeros(count),
        )
        which = jnp.asarray(np.tile(np.arange(len(names)), restarts))
        ascend = jax.jit(jax.vmap(lambda world, index: _ascend(world, index, steps=steps, rate=rate)))
        best, last, eps = (np.asarray(x).reshape(restarts, -1) for x in ascend((pi, mu), which))
        for column, name in enumerate(names):
            top = int(best[:, column].argmax())
            found.append(
                Found(
                    bound=name,
                    vocabulary=vocabulary,
                    horizon=horizon,
                    ratio=float(best[top, column]),
                    median=float(np.median(last[:, column])),
                    eps=float(eps[top, column]),
                )
            )
    return found
