"""How fast does the error grow with the horizon? The worst worlds found for a fixed divergence per token, to T = 4096.

Two adversaries, both with KL(mu || pi) <= delta in every context and the worst reward for their policies. One draws
independent tokens, token 1 rarely; the probability is the best of a grid and the error of any reward of the whole
response is exact, by counts. The other is a chain of a few states, whose policies are moved by gradient ascent through
the forward recursion. The theorem |Error| <= T delta is what neither can beat.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import PRINTED
from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import BoundInputs
from theory_checks import chain_worlds as chains

DELTAS = (1e-6, 1e-4, 1e-2)
"""Largest KL of a context [nats]."""

SHORT, LONG = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Horizons of the default run and of `--full`."""

STATES = 8


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst worlds found for one divergence per token and one horizon.

    Attributes:
        delta: largest KL of a context [nats].
        horizon: T.
        independent: largest error among independent tokens.
        searched: largest error among the chains that were searched.
        printed: name -> bound with the printed constant, in the worst world of independent tokens.
        sharp: name -> the sharp one there.
    """

    delta: float
    horizon: int
    independent: float
    searched: float
    printed: dict[str, float]
    sharp: dict[str, float]

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(self.independent, self.searched)

    @property
    def ratio(self) -> float:
        """|Error| / (T delta), at most 1 by the theorem."""
        return self.error / (self.horizon * self.delta)


def exponent(found: Sequence[Worst]) -> float:
    """The slope of log error against log T, by least squares."""
    return float(np.polyfit(np.log([one.horizon for one in found]), np.log([one.error for one in found]), 1)[0])


def by_delta(found: Sequence[Worst]) -> dict[float, list[Worst]]:
    """The same, by divergence, in order of the horizon."""
    deltas = sorted({one.delta for one in found})
    return {d: sorted((one for one in found if one.delta == d), key=lambda one: one.horizon) for d in deltas}


def worst_independent(delta: float, horizon: int) -> tuple[float, BoundInputs]:
    """The largest error of independent tokens, over a grid of probabilities, and the inputs of the bounds there."""
    q = np.geomspace(1e-5 / horizon, 0.999, 400)
    best, inputs = 0.0, None
    for upwards in (True, False):
        p = chains.shifted_probability(q, delta, upwards=upwards)
        counts = chains.independent_tokens(q, p, horizon)
        top = int(counts.worst.argmax())
        if inputs is None or counts.worst[top] > best:
            best, tv = float(counts.worst[top]), abs(p - q)[top]
            numbers = (delta, tv, horizon * delta, counts.sequence_tv[top], np.full(horizon, tv))
            inputs = BoundInputs(*(jnp.asarray(x) for x in numbers))
    assert inputs is not None
    return best, inputs


def _binary_kl(q: jax.Array, p: jax.Array) -> jax.Array:
    return q * (jnp.log(q) - jnp.log(p)) + (1 - q) * (jnp.log1p(-q) - jnp.log1p(-p))


def _at_divergence(q: jax.Array, delta: jax.Array, upwards: jax.Array) -> jax.Array:
    """The p on the given side of q with KL(q || p) = delta; bisection, then one Newton step that carries the slope."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = (_binary_kl(q, middle) < delta) == upwards
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.where(upwards, q, 1e-300), jnp.where(upwards, 1 - 1e-12, q)
    low, high = jax.lax.fori_loop(0, 60, halve, jax.lax.stop_gradient(ends))
    p = jax.lax.stop_gradient((low + high) / 2)
    slope = jax.lax.stop_gradient((p - q) / (p * (1 - p)))
    return jnp.clip(p - (_binary_kl(q, p) - delta) / slope, 1e-300, 1 - 1e-12)


def _chain(parameters: dict[str, jax.Array], fixed: dict[str, jax.Array], delta: jax.Array) -> chains.Chain:
    # Probabilities stay away from 0 and 1, where float64 no longer resolves the divergence.
    q = 1e-7 + (1 - 2e-7) * jax.nn.sigmoid(parameters["mu"])
    budget = delta * (1e-3 + (1 - 1e-3) * jax.nn.sigmoid(parameters["budget"]))
    p = _at_divergence(q, budget, fixed["upwards"])
    mu, pi = (jnp.stack([jnp.log1p(-x), jnp.log(x)], -1) for x in (q, p))
    return chains.Chain(pi, mu, fixed["move"])


@functools.partial(jax.jit, static_argnames=("horizon", "steps"))
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None))
def _ascend(w, fixed, delta, horizon: int, steps: int):
    """Adam on the log of the error; the largest error seen."""

    def objective(parameters):
        error = chains.measure(_chain(parameters, fixed, delta), horizon=horizon).worst
        return jnp.log(error + 1e-300), error

    def step(carry, index):
        w, first, second, best = carry
        (_, error), slope = jax.value_and_grad(objective, has_aux=True)(w)
        slope = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), slope)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, slope)
        size = 0.1 * (1 - index / steps)
        w = jax.tree.map(lambda x, m, v: x + size * m / (jnp.sqrt(v) + 1e-12), w, first, second)
        # A comparison with a NaN is false, so that one can never be the best.
        return (w, first, second, jnp.where(error > best, error, best)), None

    zeros = jax.tree.map(jnp.zeros_like, w)
    return jax.lax.scan(step, (w, zeros, zeros, jnp.zeros(())), jnp.arange(steps, dtype=jnp.float64))[0][3]


def _starts(generator: np.random.Generator, restarts: int, horizon: int) -> tuple[dict, dict]:
    """Half of the starts count rare tokens, which is what the worst independent tokens do; half are random maps."""
    move = np.eye(STATES)[generator.integers(STATES, size=(restarts, STATES, 2))]
    move[: restarts // 2] = chains.counter(STATES)
    probability = np.exp(generator.uniform(np.log(0.3 / horizon), np.log(0.5), (restarts, STATES)))
    probability[: restarts // 2] = np.exp(generator.uniform(np.log(0.3), np.log(3.0), (restarts // 2, 1))) / horizon
    upwards = generator.random((restarts, STATES)) < 0.5
    upwards[: restarts // 2] = True
    parameters = {"mu": np.log(probability / (1 - probability)), "budget": np.full((restarts, STATES), 2.0)}
    fixed = {"move": move, "upwards": upwards}
    return jax.tree.map(jnp.asarray, parameters), jax.tree.map(jnp.asarray, fixed)


def worst_chain(generator: np.random.Generator, delta: float, horizon: int, *, restarts: int, steps: int) -> float:
    """The largest error that gradient ascent through the recursion finds, over policies of chains of a few states."""
    parameters, fixed = _starts(generator, restarts, horizon)
    return float(np.max(_ascend(parameters, fixed, jnp.asarray(delta), horizon, steps)))


def growth(
    *,
    seed: int,
    horizons: tuple[int, ...] = SHORT,
    deltas: tuple[float, ...] = DELTAS,
    restarts: int = 16,
    steps: int = 60,
) -> list[Worst]:
    """The worst worlds found at every divergence and horizon."""
    found, generator = [], np.random.default_rng(seed)
    # One horizon after the other: every divergence uses the program that was compiled for it.
    for horizon in horizons:
        for delta in deltas:
            independent, inputs = worst_independent(delta, horizon)
            found.append(
                Worst(
                    delta=delta,
                    horizon=horizon,
                    independent=independent,
                    searched=worst_chain(generator, delta, horizon, restarts=restarts, steps=steps),
                    printed={name: float(bound(inputs)) for name, bound in PRINTED.items()},
                    sharp={name: float(bound(inputs)) for name, bound in SHARP.items()},
                )
            )
    return found
