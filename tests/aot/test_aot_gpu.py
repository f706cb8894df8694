"""Real compiles for an H100 without one: the kernels spill no register and hold tiles instead of logits.

`make aot` runs them. h100_cuda13.txtpb describes the card to XLA.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_kernels import Reference
from jaxrl_kernels import dense_gradient
from jaxrl_kernels import dense_kl
from jaxrl_kernels import grouped_matmul
from jaxrl_kernels import token_statistics

pytestmark = [pytest.mark.aot, pytest.mark.requires_jax("0.11")]
pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin, which `make aot` installs")

CARD = Path(__file__).parent / "h100_cuda13.txtpb"
FOUR = ("log_prob", "entropy", "collision", "kl")
ALL = (*FOUR, "max_log_prob", "kl_reverse", "total_variation", "chi_square")
LARGE = (8192, 4096, 131072)


@pytest.fixture
def compiled(monkeypatch, capfd):
    """compile(function, *(shape, dtype)) -> (compiled program, bytes of temporaries); checks what ptxas says."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=CARD.read_text(), topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))

    def build(function, *arrays, kernels: int):
        arguments = [jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, P())) for x in arrays]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        said = "".join(capfd.readouterr())
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert len(spills) == kernels
        assert all(spill == ("0", "0") for spill in spills)
        assert "serialized" not in said  # what ptxas calls products that wait for one another
        return program.memory_analysis().temp_size_in_bytes

    # A program from the cache would not go through ptxas, so none of these goes into it.
    option, kept = "jax_persistent_cache_min_compile_time_secs", jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(option, 1e9)
    yield build
    jax.config.update(option, kept)


def statistics_of(axis, names, implementation, *, gradient=False, **options):
    def values(hidden, head, targets, *other):
        reference = Reference(*other) if other else None
        found = token_statistics(
            hidden,
            head,
            targets,
            reference=reference,
            vocabulary_axis=axis,
            statistics=names,
            implementation=implementation,
            **options,
        )
        return [getattr(found, name) for name in names]

    def total(*arguments):
        return sum(jnp.sum(x) for x in values(*arguments))

    return jax.grad(total, (0, 1)) if gradient else values


def arrays(size, axis, dtype, *, reference):
    rows, width, vocabulary = size
    head = (width, vocabulary) if axis == 1 else (vocabulary, width)
    policy = (((rows, width), dtype), (head, dtype))
    return (*policy, ((rows,), jnp.int32), *(policy if reference else ()))


@pytest.mark.parametrize(
    ("size", "axis", "names", "kernels"),
    [
        pytest.param(LARGE, 1, ("log_prob", "entropy"), 1, id="one-head"),
        pytest.param(LARGE, 0, FOUR, 1, id="reference-tied"),
        pytest.param((1001, 576, 50304), 1, ALL, 2, id="all-ragged"),
        # Eight steps of the width, which a compiler likes to unroll.
        pytest.param((2048, 512, 49152), 1, FOUR, 1, id="eight-steps"),
    ],
)
def test_forward_in_bfloat16(compiled, size, axis, names, kernels):
    function = statistics_of(axis, names, "pallas_mosaic_gpu")
    held = compiled(function, *arrays(size, axis, jnp.bfloat16, reference="kl" in names), kernels=kernels)
    # Rows that do not come in eights are copied with their hidden states.
    copies = 2 * size[0] * size[1] * 2 if size[0] % 8 else 0
    assert held < 0.02 * size[0] * size[2] * 4 + copies


@pytest.mark.parametrize(
    ("names", "options", "kernels"),
    [
        # A sweep over the policy alone first.
        pytest.param(("log_prob", "entropy"), {"log_min_p": -2.0}, 2, id="pruned"),
        pytest.param(FOUR, {"log_min_p": -2.0}, 2, id="pruned-reference"),
        pytest.param(("log_prob", "entropy"), {"soft_cap": 30.0}, 1, id="soft-cap"),
        pytest.param(FOUR, {"soft_cap": 30.0}, 1, id="soft-cap-reference"),
    ],
)
def test_forward_with_options(compiled, names, options, kernels):
    function = statistics_of(1, names, "pallas_mosaic_gpu", **options)
    held = compiled(function, *arrays(LARGE, 1, jnp.bfloat16, reference="kl" in names), kernels=kernels)
    assert held < 0.02 * LARGE[0] * LARGE[2] * 4


@pytest.mark.parametrize("axis", [1, 0])
def test_backward_in_bfloat16(compiled, axis):
    """The backward pass holds blocks of the logits' gradient and the cotangent of the hidden states in float32."""
    function = statistics_of(axis, ("log_prob", "entropy"), "pallas_mosaic_gpu", gradient=True)
    held = compiled(function, *arrays(LARGE, axis, jnp.bfloat16, reference=False), kernels=3)
    assert held < 0.6e9


def test_forward_in_float32(compiled):
    """Heads of any size, copied block by block in three parts: 7 % of the logits here, where the rows are few."""
    size = (2048, 576, 49155)
    function = statistics_of(1, FOUR, "pallas_mosaic_gpu")
    held = compiled(function, *arrays(size, 1, jnp.float32, reference=True), kernels=2)
    assert held < 0.1 * size[0] * size[2] * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dense_gradient(compiled, dtype):
    logits = ((8192, 131072), dtype)

    def both(z, z_ref):
        return dense_gradient(z, z_ref, implementation="pallas_mosaic_gpu")

    def pulled(z, z_ref):
        return jax.grad(lambda z: jnp.sum(dense_kl(z, z_ref, implementation="pallas_mosaic_gpu")))(z)

    for function in (both, pulled):
        held = compiled(function, logits, logits, kernels=2)
        assert held < 0.02 * 8192 * 131072 * 4


@pytest.mark.parametrize("gradient", [False, True])
def test_xla(compiled, gradient, monkeypatch):
    """Blocks of the size chosen on a GPU, 256 MiB of logits: wide enough for the chip, a few at a time."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    function = statistics_of(1, ("log_prob", "entropy"), "xla", gradient=gradient)
    held = compiled(function, *arrays(LARGE, 1, jnp.bfloat16, reference=False), kernels=0)
    assert held < 1.5e9


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((8192, 2048, 1024, 32), id="aligned"),
        pytest.param((1001, 200, 130, 8), id="ragged"),
        pytest.param((16, 2048, 1024, 32), id="few-rows"),
    ],
)
@pytest.mark.parametrize(("implementation", "kernels"), [("pallas_mosaic_gpu", 3), ("xla", 0)])
def test_grouped_matmul(compiled, implementation, kernels, size):
    """The kernels hold copies of what fills no tile; the blocks of "xla" copies of rows and weights, both twice."""
    rows, width, inner, experts = size

    def both(x, weights, dy, sizes):
        y, pull = jax.vjp(lambda *a: grouped_matmul(*a, sizes, implementation=implementation), x, weights)
        return y, pull(dy)

    shapes = ((rows, width), (experts, width, inner), (rows, inner))
    held = compiled(both, *((shape, jnp.bfloat16) for shape in shapes), ((experts,), jnp.int32), kernels=kernels)
    of_rows, of_weights = 2 * rows * (width + inner), 2 * experts * width * inner
    if kernels == 0:
        assert held < 8 * (of_weights + of_rows)
    else:
        assert held < (2**20 if rows % 8 == 0 else 4 * (of_weights + of_rows))
