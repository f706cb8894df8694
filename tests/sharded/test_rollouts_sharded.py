"""A mesh changes where a rollout is computed, never what is sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.sharding import make_mesh
from jaxrl_llm.models.sharding import shard
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.generate import make_generate
from jaxrl_llm.rollouts.sampling import SamplingSettings


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_the_same_tokens_on_every_mesh(sizes: dict[str, int]):
    model = Transformer(tiny(), rngs=nnx.Rngs(0))
    model.final_norm.scale[...] = 8 * model.final_norm.scale[...]
    graphdef, state = nnx.split(model)
    generate = make_generate(
        graphdef,
        max_new_tokens=5,
        group_size=2,
        sampling=SamplingSettings(temperature=0.8, min_p=0.02),
        eos_id=tuple(range(0, 64, 9)),
        pad_id=0,
    )
    tokens = jax.random.randint(jax.random.key(1), (8, 4), 1, 64)
    mask = jnp.arange(4) >= jnp.arange(8)[:, None] % 3
    rest = (jax.random.key(2), 3, jnp.arange(8))
    expected = generate(state, tokens, mask, *rest)
    mesh = make_mesh(**sizes)
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        got = generate(shard(state, mesh), *jax.device_put((tokens, mask), rows), *rest)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.response_mask, expected.response_mask)
    np.testing.assert_allclose(got.log_prob_behaviour, expected.log_prob_behaviour, atol=1e-5)
    assert not expected.response_mask[:, 4:].all()
