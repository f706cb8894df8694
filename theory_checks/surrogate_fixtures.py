"""Numbers printed in Trust Region Masking (arXiv 2512.23075) or made by hand, as checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import bound_inputs_from_scalars
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.bounds.surrogate_error import pinsker_marginal_kl_closed_form
from theory_checks import token_trees as trees
from theory_checks.check import Check
from theory_checks.check import Measured
from theory_checks.check import Sides
from theory_checks.check import World

PAPER = "arXiv 2512.23075"


def one(generator: np.random.Generator, count: int) -> list[tuple[jax.Array]]:
    """A single instance: nothing is random in a fixture."""
    del generator, count
    return [(jnp.zeros(1),)]


_TABLE = {
    # name: (value, half a unit of the last digit) for KL alone, and for KL and TV.
    "classical": ((1677.3, 0.05), (838.7, 0.05)),
    "coupling": ((113.84, 0.005), (79.91, 0.005)),
    "pinsker_marginal_kl": ((34.946, 0.0005), (34.946, 0.0005)),
    "pinsker_marginal_tv": ((34.946, 0.0005), (24.711, 0.0005)),
    "mixed_kl": ((8.192, 0.0005), (8.192, 0.0005)),
    "mixed_tv": ((8.192, 0.0005), (4.096, 0.0005)),
    "adaptive": ((34.946, 0.0005), (24.711, 0.0005)),
}
"""The paper's table for T = 4096, delta = 1e-4, D_KL = 0.01; eps = 5e-3 and D_TV = 0.05 in the second column."""


def _measure_table(unused: jax.Array) -> dict[str, jax.Array]:
    common = {"max_kl": 1e-4, "horizon": 4096, "sequence_kl": 0.01}
    columns = (
        bound_inputs_from_scalars(**common),
        bound_inputs_from_scalars(max_tv=5e-3, sequence_tv=0.05, **common),
    )
    bounds = [surrogate_error_bounds(inputs).printed for inputs in columns]
    values = [[column[name] for name in _TABLE] for column in bounds]
    closed = pinsker_marginal_kl_closed_form(columns[0])
    return {"values": jnp.asarray(values) + 0 * unused, "closed": closed + 0 * unused}


def _table_sides(m: Measured, *, factor: float = 1.0) -> Sides:
    expected = np.array([[_TABLE[name][column] for name in _TABLE] for column in (0, 1)])
    miss = np.abs(factor * m["values"][0] - expected[..., 0]).ravel()
    closed = np.abs(factor * m["closed"].ravel() - 34.953)
    return Sides(np.append(miss, closed)[:, None], np.append(expected[..., 1].ravel(), 0.0005)[:, None])


_HAND = {
    "gain": 0.17,
    "surrogate": 0.15,
    "error": 0.02,
    "max_tv": 0.2,
    "max_kl": 0.0871767,
    "sequence_kl": 0.0639993,
    "sequence_tv": 0.17,
    "coupling": 0.16,
    "pinsker_marginal_kl": 0.174353,
    "pinsker_marginal_tv": 0.167023,
    "mixed_kl": 0.298778,
    "mixed_tv": 0.272,
    "adaptive": 0.08,
}


def _measure_hand(unused: jax.Array) -> dict[str, jax.Array]:
    mu = [jnp.zeros((1, 2)), jnp.zeros((2, 2))]
    pi = [jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.7, 0.3], [0.5, 0.5]]))]
    gain, surrogate, error = trees.error_of_surrogate(pi, mu, jnp.array([1.0, 0.0, 0.0, 0.0]))
    inputs = trees.bound_inputs(pi, mu)
    numbers = {"gain": gain, "surrogate": surrogate, "error": error}
    numbers |= {name: getattr(inputs, name) for name in ("max_tv", "max_kl", "sequence_kl", "sequence_tv")}
    numbers |= surrogate_error_bounds(inputs).printed
    return {"values": jnp.stack([numbers[name] for name in _HAND]) + 0 * unused}


def _hand_sides(m: Measured, *, factor: float = 1.0) -> Sides:
    return Sides(factor * m["values"].T, np.array(list(_HAND.values()))[:, None])


FIXTURES = [
    Check(
        name="surrogate_error.table_4096",
        paper=PAPER,
        statement="the table for T = 4096 to all printed digits, and the closed form 34.953",
        functions=tuple(f"bounds.surrogate_error.{name}_printed" for name in _TABLE),
        world=World(name="table_4096", draw=one, measure=_measure_table),
        sides=_table_sides,
        wrong=functools.partial(_table_sides, factor=0.5),
    ),
    Check(
        name="surrogate_error.hand_fixture",
        paper="by hand",
        statement="two tokens, two steps: gain .17 = L' .15 + Error .02, and every bound by hand",
        functions=("bounds.surrogate_error.surrogate_error_bounds",),
        world=World(name="hand_fixture", draw=one, measure=_measure_hand),
        sides=_hand_sides,
        wrong=functools.partial(_hand_sides, factor=-1.0),
        equality=True,
        tolerance=1e-6,
    ),
]
