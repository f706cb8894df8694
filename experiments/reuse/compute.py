"""What each part of `divergence_chain` computes, for all worlds of a kind in one program and in float64."""

import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reuse import exact
from experiments.reuse.arms import ARMS
from experiments.reuse.arms import Charge
from experiments.reuse.arms import Number
from experiments.reuse.exact import Batch
from experiments.reuse.exact import Measures
from experiments.reuse.exact import Table
from experiments.reuse.settings import ReuseSettings
from experiments.reuse.worlds import FAMILIES
from experiments.reuse.worlds import RANDOM
from experiments.reuse.worlds import World
from experiments.reuse.worlds import draw
from experiments.reuse.worlds import the_chain
from jaxrl_llm.typing import Array

ADVANTAGES = {"current": 1.0, "old": 0.0}
"""Whose advantages an update has: those of the current policy, or for ever those of the old one."""

MATCHED = ("none", "one_step", "two_terms", "truncated", "multi_step", "reverse_kl", "hellinger", "full_entropy")
"""Arms that are set to one drift. With a clip or the sign of total variation the drift jumps, and may miss it."""

LOWEST_KNOB = -7.0
"""Logarithm of the coefficient, or of what steps are divided by, from which on a drift is looked for."""

TRIES = 31
"""Of knobs: up by 1 until the drift is passed, then halves of the last interval, the last below a ten-thousandth."""


def worlds_of(settings: ReuseSettings) -> tuple[World, np.ndarray]:
    """All worlds, the same in every part, and of which kind each is, a number of `FAMILIES`."""
    generator = np.random.default_rng(settings.seed)
    drawn = [the_chain(settings.states)]
    drawn += [draw(name, states=settings.states, count=settings.worlds, generator=generator) for name in RANDOM]
    kinds = [list(FAMILIES).index(name) for name in RANDOM]
    family = np.array([list(FAMILIES).index("chain"), *np.repeat(kinds, settings.worlds)])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *drawn), family


@functools.lru_cache(maxsize=2)
def batches_of(settings: ReuseSettings) -> tuple[Batch, np.ndarray]:
    """What the old policy of every world saw, and of which kind each world is."""
    worlds, family = worlds_of(settings)
    return jax.jit(jax.vmap(lambda world: exact.gather(world, settings.discount)))(worlds), family


def charges_of(names: tuple[str, ...]) -> Charge:
    """The charges of some arms, stacked."""
    return jax.tree.map(lambda *numbers: jnp.asarray(numbers), *(ARMS[name].charge for name in names))


def per_world(program: Callable[..., dict[str, Any]], settings: ReuseSettings, advantages: str) -> Mapping[str, Any]:
    """What a compiled function of a batch finds in every world, and of which kind each world is; float64."""
    with jax.enable_x64(True):
        batches, family = batches_of(settings)
        return jax.device_get(program(batches, jnp.asarray(ADVANTAGES[advantages]))) | {"family": family}


def for_all_worlds(one: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Compile a function of (batch, whose advantages) for many worlds."""
    return jax.jit(jax.vmap(one, in_axes=(0, None)))


@functools.lru_cache(maxsize=2)
def _curves(settings: ReuseSettings) -> Callable[..., dict[str, Any]]:
    discount, coefficient = settings.discount, settings.coefficient

    def one(batch: Batch, current: Array) -> dict[str, Any]:
        best = exact.optimum(batch, discount=discount, coefficient=coefficient)

        def of_arm(charge: Charge) -> tuple[Measures, Any]:
            path = exact.reuse(
                batch,
                charge,
                discount=discount,
                coefficient=coefficient,
                rates=jnp.full(settings.reuses, settings.step / settings.reuses),
                current=current,
            )
            away = jax.vmap(
                lambda logits: exact.distance(logits, best, batch, discount=discount, coefficient=coefficient)
            )
            return jax.vmap(lambda logits: exact.measure(logits, batch, discount))(path), away(path)

        found, away = jax.vmap(of_arm)(charges_of(tuple(ARMS)))
        optimum = {f"best_{name}": value for name, value in exact.measure(best, batch, discount)._asdict().items()}
        return found._asdict() | {"distance": away} | optimum

    return for_all_worlds(one)


def curves(advantages: str, settings: ReuseSettings) -> Mapping[str, Any]:
    """Every measure after every reuse, all steps of one size, [worlds, arms, reuses]; and that of the optimum."""
    return per_world(_curves(settings), settings, advantages)


def shared_step(settings: ReuseSettings) -> Mapping[str, Any]:
    """After n reuses that share one whole step, for n = 1, 2, 4, ...; [worlds, arms, numbers of reuses]."""

    def one(batch: Batch, current: Array) -> dict[str, Any]:

        def of_arm(charge: Charge, reuses: Any) -> Measures:
            path = exact.reuse(
                batch,
                charge,
                discount=settings.discount,
                coefficient=settings.coefficient,
                # Steps of size 0 stand for updates that are not made: one program for all numbers of reuses.
                rates=jnp.where(jnp.arange(settings.reuses) < reuses, settings.step / reuses, 0.0),
                current=current,
            )
            return exact.measure(path[-1], batch, settings.discount)

        by_number = jax.vmap(of_arm, in_axes=(None, 0))
        numbers = jnp.asarray(doublings(settings))
        return jax.vmap(by_number, in_axes=(0, None))(charges_of(tuple(ARMS)), numbers)._asdict()

    return per_world(for_all_worlds(one), settings, "current")


def doublings(settings: ReuseSettings) -> list[int]:
    """1, 2, 4, ... up to the number of reuses."""
    return [2**power for power in range(settings.reuses.bit_length()) if 2**power <= settings.reuses]


@functools.lru_cache(maxsize=2)
def _at_equal_drift(settings: ReuseSettings) -> Callable[..., dict[str, Any]]:
    def one(batch: Batch, current: Array) -> dict[str, Any]:

        def end(charge: Charge, knob: Number) -> Measures:
            turned = jnp.exp(knob)
            size = settings.step / settings.reuses / jnp.where(charge.weight > 0, 1.0, turned)
            path = exact.reuse(
                batch,
                charge,
                discount=settings.discount,
                coefficient=turned,
                rates=jnp.full(settings.reuses, size),
                current=current,
            )
            return exact.measure(path[-1], batch, settings.discount)

        def of_arm(charge: Charge) -> tuple[Measures, Any, Any]:
            # All tries are one loop, the first of which has no divergence and says which drift is looked for. Going up
            # from below finds the first knob: a large coefficient makes steps overshoot, and the drift grows again.
            def attempt(known: tuple[Any, ...], number: Any) -> tuple[tuple[Any, ...], tuple[Measures, Any]]:
                low, high, target = known
                first = number == 0
                knob = jnp.where(jnp.isinf(high), low + 1, (low + high) / 2)
                found = end(charge._replace(weight=charge.weight * ~first), jnp.where(first, 0.0, knob))
                above = found.states > target
                later = jnp.where(above, knob, low), jnp.where(above, high, knob), target
                begun = low, high, settings.drift * found.states
                return jax.tree.map(lambda one, other: jnp.where(first, one, other), begun, later), (found, knob)

            start = jnp.asarray(LOWEST_KNOB), jnp.asarray(jnp.inf), jnp.asarray(0.0)
            (_, _, target), tries = jax.lax.scan(attempt, start, jnp.arange(TRIES))
            found, knob = jax.tree.map(lambda values: values[-1], tries)
            return found, knob, jnp.abs(found.states - target) < 1e-3 * target

        found, knob, reached = jax.vmap(of_arm)(charges_of(MATCHED))
        return found._asdict() | {"knob": jnp.exp(knob), "reached": reached}

    return for_all_worlds(one)


def at_equal_drift(advantages: str, settings: ReuseSettings) -> Mapping[str, Any]:
    """Arms set so that the states drift alike after the last reuse, by bisection, [worlds, arms of `MATCHED`].

    The drift is a share of what it is without divergence. What is set is the coefficient, and of the arm without
    divergence the size of its steps. `reached` says where the drift was met.
    """
    return per_world(_at_equal_drift(settings), settings, advantages)


def policy_gradient(logits: Table, charge: Charge, batch: Batch, discount: Number, states: Array) -> Table:
    """E_{states, pi}[D grad log pi], D what an arm charges."""
    fixed = states[:, None] * jax.nn.softmax(logits) * exact.charged(logits, batch, charge, discount)
    fixed = jax.lax.stop_gradient(fixed)
    return jax.grad(lambda moving: jnp.sum(fixed * jax.nn.log_softmax(moving)))(logits)


GRADIENTS = {
    "multi_step": "multi-step",
    "one_step": "one step",
    "two_terms": "two terms (cD = 0)",
    "truncated": "truncated sum (cD = 1)",
    "old_states": "multi-step, on the states of the batch",
    "full_entropy": "full entropy, with log d/d_old",
    "full_dropped": "full entropy, log d/d_old dropped",
}
"""Policy gradients that are held against autodiff: the first five against D_F, the others against KL(mu || mu_old)."""


def gradients(settings: ReuseSettings) -> Mapping[str, Any]:
    """|found - exact| / |exact| of the gradients of both divergences, at the optimum of the objective, [worlds]."""
    discount = settings.discount

    def one(batch: Batch, current: Array) -> dict[str, Any]:
        logits = exact.optimum(batch, discount=discount, coefficient=settings.coefficient)
        conditional = jax.grad(exact.divergence)(logits, batch, discount)
        full = jax.grad(exact.full_divergence)(logits, batch, discount)
        names = ("multi_step", "one_step", "two_terms", "truncated", "full_entropy", "multi_step")
        now = exact.occupancy(logits, batch.world, discount)
        laws = jnp.stack([*[now] * 5, batch.states])
        by_charge = jax.vmap(lambda charge, law: policy_gradient(logits, charge, batch, discount, law))
        found: dict[str, Any] = dict(zip((*names[:5], "old_states"), by_charge(charges_of(names), laws), strict=True))
        found["full_dropped"] = found["multi_step"]
        right = {name: full if name.startswith("full") else conditional for name in found}
        return {name: jnp.linalg.norm(found[name] - right[name]) / jnp.linalg.norm(right[name]) for name in found}

    return per_world(for_all_worlds(one), settings, "current")
