"""A real compile of cuDNN's attention for an H100 without one; `make aot-cudnn` runs it where cuDNN (0.9 GB) is."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend

pytestmark = [pytest.mark.aot, pytest.mark.requires_jax("0.11")]

CARD = Path(__file__).parent / "h100_cuda13.txtpb"


def test_packed_answers_forward_and_backward():
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=CARD.read_text(), topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    rows, length, heads = 4, 2001, 8

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def total(query, keys, values, see):
        return jnp.sum(attend(query, keys, values, see, implementation="cudnn").astype(jnp.float32))

    places = array((rows, length), jnp.int32)
    keys = array((rows, heads // 2, length, 64))
    arguments = (array((rows, length, heads, 64)), keys, keys, Visibility(array((rows, length), bool), places, places))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    assert compiled.as_text().count("cudnn$fmha") == 2
    # Most of it is the mask as a bias, 2 rows T^2 bytes, made from a boolean one.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 4 * rows * heads * length**2
