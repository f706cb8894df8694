"""Interleaved timing in CPU seconds, XLA's temporaries, and errors against float64."""

import math
import resource
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import TokenStatistics
from jaxrl_kernels.bench.cases import NAMES
from jaxrl_kernels.bench.cases import Inputs
from jaxrl_kernels.bench.cases import from_logits
from jaxrl_kernels.bench.cases import loss

CHECKED_ROWS = 32
"""Rows whose statistics and hidden-state gradients are also computed in float64."""


FEWEST_ROUNDS = 3
"""Rounds that are made however long they take."""


def compile_all(programs: Mapping[str, Callable[[Any], object]], inputs: Any) -> dict[str, jax.stages.Compiled]:
    """Each program compiled for these inputs."""
    return {name: jax.jit(program).lower(inputs).compile() for name, program in programs.items()}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def time_all(
    compiled: dict[str, jax.stages.Compiled], inputs: Any, rounds: int, limit: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Seconds of each program: every round runs each once, in turn, after one round of warm-up.

    Interleaving lets whatever else the machine does fall on all of them alike. CPU seconds are those of the process,
    all threads. No round after the third begins once `limit` seconds are over.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in compiled}
    began = time.perf_counter()
    for index in range(rounds + 1):
        if index > FEWEST_ROUNDS and time.perf_counter() - began > limit:
            break
        for name, program in compiled.items():
            cpu, wall = _cpu_seconds(), time.perf_counter()
            jax.block_until_ready(program(inputs))
            if index:
                times[name].append((_cpu_seconds() - cpu, time.perf_counter() - wall))
    return {name: summary(pairs) for name, pairs in times.items()}


def summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Median and spread of (CPU, wall) seconds."""
    cpu, wall = zip(*pairs, strict=True)
    return {
        "rounds": len(pairs),
        "cpu_seconds": round(statistics.median(cpu), 4),
        "cpu_seconds_range": [round(min(cpu), 4), round(max(cpu), 4)],
        "wall_seconds": round(statistics.median(wall), 4),
    }


def temporaries(compiled: jax.stages.Compiled) -> float:
    """MiB that XLA allocates besides arguments and results."""
    analysis = compiled.memory_analysis()
    return math.nan if analysis is None else round(analysis.temp_size_in_bytes / 2**20, 2)


def errors(inputs: Inputs, values: TokenStatistics, d_hidden: jax.Array) -> dict[str, float]:
    """Largest error over the first rows: relative to the largest value of each statistic, log_prob in nats."""
    rows = min(CHECKED_ROWS, inputs.hidden.shape[0])
    with jax.enable_x64(True):
        hidden, hidden_ref = (jnp.asarray(x[:rows], jnp.float64) for x in (inputs.hidden, inputs.hidden_ref))
        head, head_ref = (jnp.asarray(x, jnp.float64) for x in (inputs.head, inputs.head_ref))
        coefficients = jnp.asarray(inputs.coefficients[:rows], jnp.float64)
        z_ref = hidden_ref @ head_ref

        def total(hidden: jax.Array):
            wide = from_logits(hidden @ head, z_ref, inputs.targets[:rows])
            return jnp.sum(loss(wide, coefficients)), wide

        wanted_gradient, wanted = jax.grad(total, has_aux=True)(hidden)
        wanted_gradient, wanted = jax.tree.map(np.asarray, (wanted_gradient, wanted))
    found: dict[str, float] = {}
    for name in NAMES:
        right = getattr(wanted, name)
        difference = np.abs(np.asarray(getattr(values, name)[:rows], np.float64) - right)
        found[name] = float(difference.max() if name == "log_prob" else difference.max() / np.abs(right).max())
    difference = np.abs(np.asarray(d_hidden[:rows].astype(jnp.float32), np.float64) - wanted_gradient)
    found["hidden_gradient"] = float(difference.max() / np.abs(wanted_gradient).max())
    return {name: float(f"{value:.2g}") for name, value in found.items()}
