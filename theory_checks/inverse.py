"""The inverse problem: at the largest divergence that a target allows, the bound is the target."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import bound_inputs_from_scalars
from jaxrl_llm.bounds import largest_max_kl
from theory_checks.check import Check
from theory_checks.check import Sides
from theory_checks.check import World

HORIZON = 32


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    return [(jnp.asarray(np.exp(generator.uniform(np.log(1e-3), np.log(0.9), max(count // 10, 10)))),)]


def _measure(target: jax.Array) -> dict[str, jax.Array]:
    deltas = [largest_max_kl(bound, target=target, horizon=HORIZON) for bound in SHARP.values()]

    def values(factor):
        scaled = [bound_inputs_from_scalars(max_kl=factor * delta, horizon=HORIZON) for delta in deltas]
        return jnp.stack([bound(inputs) for bound, inputs in zip(SHARP.values(), scaled, strict=True)])

    return {"target": jnp.broadcast_to(target, (len(deltas),)), "there": values(1.0), "beyond": values(1.5)}


WORLD = World(name="inverse", draw=_draw, measure=_measure)

CHECKS = [
    Check(
        name="inverse.round_trip",
        paper="derived (docs/theory.md)",
        statement="a sharp bound at the largest delta for a target = the target, for every bound",
        functions=("bounds.inverse.largest_max_kl",),
        world=WORLD,
        sides=lambda m: Sides(m["there"], m["target"]),
        wrong=lambda m: Sides(m["beyond"], m["target"]),
        equality=True,
        tolerance=1e-9,
    )
]
