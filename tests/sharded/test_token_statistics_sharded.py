"""With tokens, vocabulary or both sharded over eight devices, values and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from tests.kernels import head_oracle as oracle

ROWS = 48


def functions():
    """Summed losses through either op, as functions of arrays that may be sharded."""

    def score(values, weight):
        total = values.log_prob + values.entropy**2 + values.kl + values.collision + values.total_variation
        return weight * total

    def by_statistics(hidden, head, hidden_ref, head_ref, targets, weight):
        values = token_statistics(
            hidden, head, targets, reference=Reference(hidden_ref, head_ref), implementation="xla", block=64
        )
        return jnp.sum(score(values, weight)), jnp.sum(jnp.ones_like(weight))

    def by_loss(hidden, head, hidden_ref, head_ref, targets, weight):
        return token_loss(
            hidden,
            head,
            targets,
            score,
            weight,
            reference=Reference(hidden_ref, head_ref),
            implementation="xla",
            block=64,
        )

    return {"token_statistics": by_statistics, "token_loss": by_loss}


def case():
    inputs = oracle.make_inputs(rows=ROWS)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(ROWS), jnp.float32)
    return (*inputs.arrays(), inputs.tokens, weight)


def mesh():
    assert jax.device_count() == 8
    return Mesh(np.array(jax.devices()), ("data",))


SPECS = (P("data"), P(), P("data"), P(), P("data"), P("data"))


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_compiler_sharding(op):
    arguments = case()
    function = functions()[op]
    gradient = jax.value_and_grad(function, (0, 1), has_aux=True)
    wanted = jax.jit(gradient)(*arguments)
    assert jnp.abs(wanted[1][1]).max() > 0.1
    devices = mesh()
    placed = [jax.device_put(x, NamedSharding(devices, spec)) for x, spec in zip(arguments, SPECS, strict=True)]
    actual = jax.jit(gradient)(*placed)
    assert actual[1][0].sharding.is_equivalent_to(NamedSharding(devices, P("data")), 2)
    for value, right in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert oracle.error(value, right) < 1e-5


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_shard_map(op):
    arguments = case()
    function = functions()[op]
    wanted = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(*arguments)

    def local(*arrays):
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), function(*arrays))

    spread = jax.shard_map(local, mesh=mesh(), in_specs=SPECS, out_specs=(P(), P()))
    actual = jax.jit(jax.value_and_grad(spread, (0, 1), has_aux=True))(*arguments)
    for value, right in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert oracle.error(value, right) < 1e-5


CASES = [
    pytest.param((1, 8), {"log_min_p": -2.0}, id="vocabulary-pruned"),
    pytest.param((2, 4), {"soft_cap": 4.0}, id="both-soft-cap"),
]
NAMES = ("log_prob", "entropy", "collision", "max_log_prob", "kl", "total_variation", "chi_square", "top_k_mass")


def split_vocabulary(op, mesh_axis, options):
    """Sum of a loss of all statistics, in which only the vocabulary's axis is special; and the statistics or count."""
    names = NAMES if "log_min_p" in options else (*NAMES, "kl_reverse")

    def score(values, weight):
        # A pruned target has log_prob -inf.
        log_prob = jnp.maximum(values.log_prob, -50.0)
        smooth = values.entropy**2 + values.kl**2 + values.collision + values.total_variation + values.top_k_mass
        return weight * (log_prob + smooth + (0.0 if values.kl_reverse is None else values.kl_reverse))

    def run(hidden, head, hidden_ref, head_ref, targets, weight):
        common = {
            "reference": Reference(hidden_ref, head_ref), "statistics": names, "top_k": 5, "block": 16,
            "implementation": "xla", "vocabulary_mesh_axis": mesh_axis, **options,
        }  # fmt: skip
        if op == "token_loss":
            return token_loss(hidden, head, targets, score, weight, **common)
        values = token_statistics(hidden, head, targets, **common)
        return jnp.sum(score(values, weight)), values

    return run


@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_split_vocabulary(op, options, shape):
    inputs = oracle.make_inputs(rows=16, vocabulary=304, near=0.5, scale=2.0)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(16), jnp.float32)
    arguments = (*inputs.arrays(), inputs.tokens, weight)
    alone = split_vocabulary(op, None, options)
    (wanted, wanted_extra), slopes = jax.jit(jax.value_and_grad(alone, (0, 1), has_aux=True))(*arguments)

    def local(*arrays):
        total, extra = split_vocabulary(op, "vocabulary", options)(*arrays)
        return jax.lax.psum(total, "data"), extra if op == "token_statistics" else jax.lax.psum(extra, "data")

    devices = Mesh(np.array(jax.devices()).reshape(shape), ("data", "vocabulary"))
    head, row = P(None, "vocabulary"), P("data")
    spread = jax.shard_map(
        local, mesh=devices, in_specs=(row, head, row, head, row, row),
        out_specs=(P(), row if op == "token_statistics" else P()),
    )  # fmt: skip
    (total, extra), gradients = jax.jit(jax.value_and_grad(spread, (0, 1), has_aux=True))(*arguments)
    assert jnp.abs(slopes[1]).max() > 0.01
    found, right = (jax.tree.leaves(tree) for tree in ((total, extra, gradients), (wanted, wanted_extra, slopes)))
    for value, expected in zip(found, right, strict=True):
        assert oracle.error(value, expected) < 2e-5
    for value, expected in zip(gradients, slopes, strict=True):
        assert oracle.error(-np.asarray(value), expected) > 0.5


def test_top_k_of_a_split_vocabulary():
    """More tokens than one device's part holds; the vocabulary size that bounds them is that of all parts."""
    inputs = oracle.make_inputs(rows=8, vocabulary=304, scale=2.0)
    hidden, head = inputs.arrays()[:2]

    def mass(hidden, head, targets, top_k, axis=None):
        options = {"top_k": top_k, "vocabulary_mesh_axis": axis, "statistics": ("top_k_mass",), "block": 16}
        return token_statistics(hidden, head, targets, implementation="xla", **options).top_k_mass

    def split(top_k):
        devices, specs = Mesh(np.array(jax.devices()), ("vocabulary",)), (P(), P(None, "vocabulary"), P())

        def local(*arrays):
            return mass(*arrays, top_k, "vocabulary")

        return jax.jit(jax.shard_map(local, mesh=devices, in_specs=specs, out_specs=P()))(hidden, head, inputs.tokens)

    p = np.sort(np.asarray(jax.nn.softmax(hidden @ head)), axis=1)[:, ::-1]
    for top_k in (38, 39, 100, 304):
        np.testing.assert_allclose(split(top_k), p[:, :top_k].sum(1), rtol=3e-6)
        np.testing.assert_allclose(split(top_k), mass(hidden, head, inputs.tokens, top_k), rtol=3e-6)
    assert np.min(p[:, :100].sum(1) - p[:, :38].sum(1)) > 1e-3
    with pytest.raises(ValueError, match="top_k is 305; it must lie between 1 and the vocabulary size 304"):
        split(305)


def test_the_axis_must_be_one_of_a_shard_map():
    inputs = oracle.make_inputs(rows=2, vocabulary=24)
    with pytest.raises(ValueError, match="vocabulary_mesh_axis is 'vocabulary', which is no axis of a surrounding"):
        token_statistics(*inputs.arrays()[:2], inputs.tokens, vocabulary_mesh_axis="vocabulary")
