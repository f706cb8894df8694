"""Block sizes of `xla` timed on this device in interleaved rounds; the fastest of each op and shape is written down."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics.xla_loss import tile_rows
from jaxrl_kernels.bench.cases import NAMES
from jaxrl_kernels.bench.cases import Inputs
from jaxrl_kernels.bench.cases import Shape
from jaxrl_kernels.bench.cases import loss
from jaxrl_kernels.bench.cases import make_inputs
from jaxrl_kernels.bench.measure import compile_all
from jaxrl_kernels.bench.measure import time_all

SHAPES = (Shape(2048, 576, 49152, "float32"), Shape(256, 576, 49152, "float32"))
BLOCKS = {"token_statistics": (256, 512, 1024), "token_loss": (512, 1024, 2048)}


def _run(inputs: Inputs, op: str, block: int):
    common = {
        "reference": Reference(inputs.hidden_ref, inputs.head_ref), "statistics": NAMES, "block": block,
        "implementation": "xla",
    }  # fmt: skip

    def total(hidden, head):
        if op == "token_loss":
            return token_loss(hidden, head, inputs.targets, loss, inputs.coefficients, **common)[0]
        return jnp.sum(loss(token_statistics(hidden, head, inputs.targets, **common), inputs.coefficients))

    return jax.value_and_grad(total, (0, 1))(inputs.hidden, inputs.head)


def tune(device: str, rounds: int) -> dict:
    """What belongs into tuned/<device>.json."""
    entries = []
    for shape in SHAPES:
        inputs = make_inputs(shape)
        for op, blocks in BLOCKS.items():
            programs = {str(block): partial(_run, op=op, block=block) for block in blocks}
            times = time_all(compile_all(programs, inputs), inputs, rounds)
            seconds = {block: float(str(found["cpu_seconds"])) for block, found in times.items()}
            best = min(seconds, key=lambda block: seconds[block])
            rows = shape.rows
            if op == "token_loss":
                rows = tile_rows(shape.rows, shape.vocabulary, jax.default_backend())
            entries.append(
                {"op": op, "rows": rows, "width": shape.width, "vocabulary": shape.vocabulary, "dtype": shape.dtype,
                 "block": int(best), "cpu_seconds": seconds}
            )  # fmt: skip
            print(f"{op} {shape.name}: {seconds}, best {best}", flush=True)
    return {"device": device, "jax": jax.__version__, "rounds": rounds, "entries": entries}
