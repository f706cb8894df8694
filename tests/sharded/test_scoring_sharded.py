"""Statistics of a batch on a mesh are those of one device, with the vocabulary split and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import Reference
from jaxrl_llm.models.sharding import make_mesh
from jaxrl_llm.rollouts import score_hidden

NAMES = ("log_prob", "entropy", "kl")


@pytest.mark.parametrize(
    ("shape", "vocabulary", "axis"),
    [({"fsdp": 2, "expert": 2, "tensor": 2}, 48, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 47, 0)],
    ids=["vocabulary over tensor", "tied and odd"],
)
def test_values_and_gradients_are_those_of_one_device(shape, vocabulary, axis):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, other = (jax.random.normal(key, (4, 6, 16)) for key in keys[:2])
    sizes = (16, vocabulary) if axis == 1 else (vocabulary, 16)
    head, head_ref = (jax.random.normal(key, sizes) for key in keys[2:4])
    targets = jax.random.randint(keys[4], (4, 6), 0, vocabulary)

    def loss(hidden, head):
        reference = Reference(other, head_ref)
        found = score_hidden(hidden, head, targets, vocabulary_axis=axis, reference=reference, statistics=NAMES)
        values = [getattr(found, name) for name in NAMES]
        return sum(jnp.sum(jnp.sin(value)) for value in values), values

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    expected = step(hidden, head)
    with jax.set_mesh(make_mesh(**shape)):
        got = step(hidden, head)
    for one, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, theirs, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())))
