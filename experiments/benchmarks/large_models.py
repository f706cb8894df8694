"""The whole update step of large models, compiled for accelerators that are not here: does it compile, does it fit?

    python -m experiments.benchmarks.large_models --model glm-4.5 --topology v5p:8x8x8 --tokens 4096

The program is this project's own `Update`: loss of DAPO (GRPO without a reference), forward and backward pass with
layers recomputed and scanned, experts without dropped tokens, the loss of the layer for further tokens, statistics of
the whole vocabulary, Muon with AdamW, router biases. Nothing is allocated; what is printed is what the compiler says.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from experiments.benchmarks.collectives import Collective
from experiments.benchmarks.collectives import collectives
from jaxrl_llm.models import trainable
from jaxrl_llm.models.architectures import glm45
from jaxrl_llm.models.architectures import glm45_air
from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.sharding import MESH_AXES
from jaxrl_llm.models.sharding import batch_axes
from jaxrl_llm.models.sharding import shardings
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.training import Heads
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import TrainState
from jaxrl_llm.training import Update
from jaxrl_llm.training import UpdateBatch
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import make_optimizer
from jaxrl_llm.training import split_policy
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.objective import get_objective
from jaxrl_llm.training.text.routers import router_biases
from jaxrl_llm.training.text.routers import with_router_bias

GIBIBYTE = 2**30


def llama_3_8b() -> TransformerConfig:
    """Llama 3.1 8B, by its public configuration: 8,030,261,248 parameters."""
    return TransformerConfig(
        vocab_size=128_256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14_336,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(),
        tie_embeddings=False,
        max_positions=131_072,
    )


def qwen2_5_32b() -> TransformerConfig:
    """Qwen2.5-32B, by its public configuration: 32,763,876,352 parameters."""
    return TransformerConfig(
        vocab_size=152_064,
        hidden_size=5120,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=27_648,
        rope_theta=1_000_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        max_positions=131_072,
        qkv_bias=True,
    )


def tiny_twin() -> TransformerConfig:
    """GLM-4.5 in everything but size."""
    return dataclasses.replace(
        glm45(),
        vocab_size=1024,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=256,
        experts=ExpertsConfig(count=8, chosen=2, width=128, shared=1, dense_layers=2, scale=2.5),
    )


MODELS = {
    "tiny": tiny_twin,
    "llama-3-8b": llama_3_8b,
    "qwen2.5-32b": qwen2_5_32b,
    "glm-4.5-air": glm45_air,
    "glm-4.5": glm45,
}


def mesh_of(devices: Any, config: TransformerConfig, expert: int | None = None) -> Mesh:
    """All devices as fsdp x expert; of the latter as many as given, or the most up to 16 that divide both."""
    count = len(devices)
    if expert is None:
        shared = 1 if config.experts is None else math.gcd(config.experts.count, count)
        expert = max(size for size in range(1, 17) if shared % size == 0)
    sizes = {"data": 1, "fsdp": count // expert, "expert": expert, "tensor": 1}
    grid = np.array(devices).reshape([sizes[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract(tree: Any, layouts: Any) -> Any:
    """Shapes with layouts in the place of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    laid = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x, at in zip(leaves, layouts, strict=True)]
    return jax.tree.unflatten(structure, laid)


def batch_of(mesh: Mesh, rows: int, tokens: int) -> UpdateBatch:
    """Rows of `tokens` tokens, of which the first quarter is a prompt."""
    grid = Grid(prompt_length=tokens // 4, slots=1, response_length=tokens - tokens // 4 + 1)
    chosen = (rows, 1, grid.response_length)

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        spec = PartitionSpec(batch_axes(mesh)) if shape[0] % mesh.size == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    whole = (rows, grid.width)
    ids, flags = array(whole, jnp.int32), array(whole, jnp.bool_)
    targets = array((rows, grid.chosen), jnp.int32)
    return UpdateBatch(
        rows=Rows(ids, flags, ids, targets, segments=None, prefixes=None, sources=None, places=None, layout=grid),
        response_mask=array(chosen, jnp.bool_),
        group_ids=array((rows, 1), jnp.int32),
        step_ids=array(chosen, jnp.int32),
        rewards=array((rows, 1)),
        advantages=array(chosen),
        log_prob_old=array(chosen),
        log_prob_behaviour=array(chosen),
    )


def whole_update(
    config: TransformerConfig, mesh: Mesh, *, rows: int, tokens: int, attention: str | None, optimizer: str
) -> tuple[Update, tuple[Any, ...]]:
    """The update of a model in bfloat16, and shapes of its arguments.

    Args:
        config: of the model.
        mesh: where it lives.
        rows: texts of a step.
        tokens: of each.
        attention: implementation.
        optimizer: of `OptimizerSettings`.
    """
    dtypes = {"param_dtype": jnp.bfloat16, "compute_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), attention=attention, **dtypes))
    further = config.mtp_layers > 0
    policy, params, frozen = split_policy(model, trainable.full(further=further))
    settings = UpdateSettings(
        minibatches=1,
        remat=True,
        scan_layers=True,
        mtp_weight=0.3 if further else 0.0,
        router_bias_rate=0.001 if config.experts is not None else 0.0,
    )
    chosen = OptimizerSettings(learning_rate=1e-6, weight_decay=0.1, optimizer=optimizer)  # pyright: ignore[reportArgumentType]
    transformation = make_optimizer(chosen, total_steps=100, scan=True)
    if router_biases(params):
        transformation = with_router_bias(transformation, rate=settings.router_bias_rate)
    update = Update(policy, get_objective(None, get_recipe("dapo")), transformation, settings=settings)
    state = jax.eval_shape(lambda params: TrainState.create(params, transformation, 0), params)
    state, frozen = (abstract(tree, jax.tree.leaves(shardings(tree, mesh))) for tree in (state, frozen))
    index = jax.ShapeDtypeStruct((1, rows), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return update, (state, frozen, batch_of(mesh, rows, tokens), Heads(), index, count)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of an update step; bytes are those of one chip."""

    model: str
    topology: str
    chips: int
    mesh: dict[str, int]
    parameters: int
    texts: int
    tokens: int
    optimizer: str
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    aliased_bytes: int
    gigaflops_loops_once: float | None
    collectives: dict[str, Collective]
    lower_seconds: float
    compile_seconds: float

    @property
    def held_bytes(self) -> int:
        """At the most: arguments, and what is neither they nor given back in their place."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.aliased_bytes


def compile_update(
    name: str, topology: str, *, tokens: int, rows_per_chip: int = 1, expert: int | None = None, optimizer: str = "muon"
) -> Compiled:
    """Compile the update of a model for a topology such as "v5p:8x8x8"."""
    config = MODELS[name]()
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = mesh_of(devices, config, expert)
    rows = rows_per_chip * len(devices)
    options = {"rows": rows, "tokens": tokens, "attention": "splash", "optimizer": optimizer}
    update, arguments = whole_update(config, mesh, **options)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = update.jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
        between = time.perf_counter()
        print(f"{name} for {topology}: lowered in {between - start:.0f} s", flush=True)
        compiled = lowered.compile()
    end = time.perf_counter()
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    flops = cost.get("flops") if isinstance(cost, dict) else None
    return Compiled(
        model=name,
        topology=topology,
        chips=len(devices),
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        parameters=num_parameters(config),
        texts=rows,
        tokens=tokens,
        optimizer=optimizer,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        gigaflops_loops_once=None if flops is None else flops / 1e9,
        collectives=collectives(text),
        lower_seconds=between - start,
        compile_seconds=end - between,
    )


def markdown(results: list[Compiled]) -> str:
    """A table with a row for each."""
    head = ("model", "parameters", "chips", "mesh", "texts x tokens", "arguments", "temporaries", "held")
    head += ("collectives a step", "lower + compile")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in results:
        sizes = [f"{size / GIBIBYTE:.2f} GiB" for size in (one.argument_bytes, one.temporary_bytes, one.held_bytes)]
        sent = ", ".join(f"{kind} {x.count} ({x.bytes / GIBIBYTE:.2f} GiB)" for kind, x in one.collectives.items())
        mesh = ", ".join(f"{axis} {size}" for axis, size in one.mesh.items())
        cells = [one.model, f"{one.parameters:,}", f"{one.topology} ({one.chips})", mesh, f"{one.texts} x {one.tokens}"]
        cells += [*sizes, sent, f"{one.lower_seconds:.0f} + {one.compile_seconds:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compile what is asked for, print a table, and write all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["tiny"])
    parser.add_argument("--topology", nargs="+", default=["v5p:2x2x1"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows-per-chip", type=int, default=1)
    parser.add_argument("--expert", type=int, help="devices that share the experts")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    options = {"tokens": given.tokens, "rows_per_chip": given.rows_per_chip}
    options |= {"expert": given.expert, "optimizer": given.optimizer}
    results = []
    for name in given.model:
        for topology in given.topology:
            results.append(compile_update(name, topology, **options))
            print(markdown(results[-1:]), flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps([dataclasses.asdict(one) for one in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
