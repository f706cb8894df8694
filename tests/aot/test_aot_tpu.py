"""Real compiles for TPU v5e and v5p without one: the kernels fit, and hold tiles instead of logits.

`make aot` runs them. A matrix whose last axis is no multiple of 128 seems to be laid out transposed by XLA and copied
for the kernel: hidden states 576 wide cost 7.3 MiB on v5p, and in float32 a head [512, 50257] costs 297 MiB, while
[50257, 512] does not.
"""

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
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend

pytestmark = [pytest.mark.aot, pytest.mark.requires_jax("0.11")]
pytest.importorskip("libtpu", reason="needs libtpu, which `make aot` installs")

FOUR = ("log_prob", "entropy", "collision", "kl")
SHAPES = [
    pytest.param(2048, 576, 49152, 1, id="2048x576x49152"),
    pytest.param(1024, 1024, 151552, 0, id="1024x1024x151552-tied"),
]


def temporaries(topology, rows, width, vocabulary, axis, dtype, statistics) -> int:
    """Bytes that the compiled forward and backward pass holds beyond its arguments and results."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))

    def array(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def total(hidden, head, hidden_ref, head_ref, targets, weight):
        values = token_statistics(
            hidden,
            head,
            targets,
            reference=Reference(hidden_ref, head_ref),
            vocabulary_axis=axis,
            statistics=statistics,
            implementation="pallas_tpu",
        )
        return sum(jnp.sum(weight * getattr(values, name)) for name in statistics)

    hidden, head = array((rows, width)), array((width, vocabulary) if axis == 1 else (vocabulary, width))
    arguments = (hidden, head, hidden, head, array((rows,), jnp.int32), array((rows,), jnp.float32))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(total, (0, 1))).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert "token_statistics_head_cotangent" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(("rows", "width", "vocabulary", "axis"), SHAPES)
def test_bfloat16_forward_and_backward(topology, rows, width, vocabulary, axis):
    held = temporaries(topology, rows, width, vocabulary, axis, jnp.bfloat16, FOUR)
    assert held <= 10 * 2**20
    assert held < 0.02 * rows * vocabulary * 4


def test_float32_ragged_all_statistics():
    """Rows and columns that fill no tile, full-precision products, the sweep of the total variation."""
    held = temporaries("v5e:2x2", 1000, 512, 50257, 0, jnp.float32, (*FOUR, "kl_reverse", "total_variation"))
    assert held < 0.02 * 1000 * 50257 * 4


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("rows", "vocabulary"), [(2048, 131072), (1000, 50257)])
def test_dense_gradient(topology, dtype, rows, vocabulary):
    """Logits that exist: whole tiles, and rows and columns that fill none."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    logits = jax.ShapeDtypeStruct((rows, vocabulary), dtype, sharding=NamedSharding(mesh, P()))

    def both(z, z_ref):
        return dense_gradient(z, z_ref, implementation="pallas_tpu")

    def pulled(z, z_ref):
        return jax.grad(lambda z: jnp.sum(dense_kl(z, z_ref, implementation="pallas_tpu")))(z)

    for function in (both, pulled):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(function).trace(logits, logits).lower(lowering_platforms=("tpu",)).compile()
        assert compiled.as_text().count("tpu_custom_call") >= 2
        assert compiled.memory_analysis().temp_size_in_bytes < 0.02 * rows * vocabulary * 4


@pytest.mark.parametrize("implementation", ["pallas_tpu", "xla"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param((8192, 2048, 1024, 32), jnp.bfloat16, id="bfloat16"),
        pytest.param((8192, 2048, 1024, 32), jnp.float32, id="float32"),
        pytest.param((1000, 200, 130, 8), jnp.float32, id="ragged"),
    ],
)
def test_grouped_matmul(implementation, size, dtype):
    """Forward and both gradients are kernels, of JAX or of the compiler, and no group is multiplied with all rows."""
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    rows, width, inner, experts = size

    def array(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def both(x, weights, dy, sizes):
        y, pull = jax.vjp(lambda *a: grouped_matmul(*a, sizes, implementation=implementation), x, weights)
        return y, pull(dy)

    arguments = (
        array((rows, width)),
        array((experts, width, inner)),
        array((rows, inner)),
        array((experts,), jnp.int32),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(both).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3
    held = compiled.memory_analysis().temp_size_in_bytes
    # The compiler's own kernel wants the weights transposed for the gradient of the rows, and in parts for float32.
    weights = experts * width * inner * dtype.dtype.itemsize
    assert held < (3.1 * weights if implementation == "xla" else 3 * rows * max(width, inner) * 4)


@pytest.mark.parametrize(("shared_prompt", "kernels"), [(False, 3), (True, 2)])
def test_splash_attention(shared_prompt, kernels):
    """One kernel forward and two backward; behind a shared prompt two forward, and blocks backward."""
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    rows, length, heads = 4, 2000, 9

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def total(query, keys, values, see):
        return jnp.sum(attend(query, keys, values, see, implementation="splash").astype(jnp.float32))

    places = array((rows, length), jnp.int32)
    see = Visibility(array((rows, length), bool), places, places if shared_prompt else None)
    keys = array((rows, heads // 3, length, 64))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(array((rows, length, heads, 64)), keys, keys, see)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") == kernels
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * rows * heads * length**2
