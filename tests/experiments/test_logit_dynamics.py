"""Logit changes of learners against the formula: exact where logits are parameters, through the kernel elsewhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import main
from experiments.dynamics import numbers
from experiments.dynamics.follow import follow
from experiments.dynamics.learner import moved
from experiments.dynamics.learner import policy_gradient
from experiments.dynamics.learner import scaled
from experiments.dynamics.learner import token_steps
from experiments.dynamics.probe import batch_probe
from experiments.dynamics.probe import choose_tokens
from experiments.dynamics.probe import eigenvalue_range
from experiments.dynamics.probe import kernel
from experiments.dynamics.probe import largest_eigenvalue
from experiments.dynamics.probe import token_probe
from experiments.dynamics.rooms import table_learner
from experiments.dynamics.rooms import transformer_learner
from experiments.run_folder import RunFolder
from jaxrl_llm import categorical
from jaxrl_llm.bounds import logit_dynamics
from jaxrl_llm.environments.worlds import Rooms

WORLD = Rooms(2, 2, extra=1, turns=10)
RATE = 2.0


@pytest.fixture(scope="module")
def table():
    """(learner, table, batch) with rewards that differ."""
    learner = table_learner(WORLD, tasks=8, group_size=8)
    params = jax.random.normal(jax.random.key(1), learner.init(jax.random.key(0))[0].shape)
    batch = jax.jit(learner.sample)(params, None, jax.random.key(2))
    assert 0 < float(batch.reward) < 1
    return learner, params, batch


@pytest.fixture(scope="module")
def agent():
    """(learner, parameters, batch); the advantages are set, as an untrained agent earns nothing."""
    learner = transformer_learner(WORLD, tasks=3, group_size=2, width=8, layers=1, imitation_steps=0)
    params, _ = learner.init(jax.random.key(0))
    batch = learner.sample(params, None, jax.random.key(1))
    return learner, params, batch._replace(advantages=jnp.array([1.0, -0.5, 0.7, -1.0, 0.0, 0.3]))


def _alone(learner, params, batch, rate, place):
    first = jnp.zeros_like(learner.logits(params, None, batch.texts))
    return jax.jit(lambda place: token_probe(learner, params, None, batch, first, place, learning_rate=rate))(
        jnp.asarray(place)
    )


def test_a_table_moves_by_the_formula_and_its_others_by_its_signs(table):
    learner, params, batch = table
    for place in choose_tokens(batch, 5, jax.random.key(3)):
        found = _alone(learner, params, batch, RATE, place)
        assert bool(found["real"])
        np.testing.assert_allclose(found["first"], found["predicted"], rtol=2e-6)
        np.testing.assert_allclose(found["realised"], found["predicted"], atol=2e-6)
        np.testing.assert_allclose([found["kernel_low"], found["kernel_high"]], 1.0, rtol=1e-5)
        assert float(found["agreeing"]) == 1.0
        assert float(found["rising"]) == float(found["rising_formula"])


def test_the_update_of_a_table_is_the_sum_of_its_tokens_and_a_flipped_sign_is_not(table):
    learner, params, batch = table
    change = scaled(policy_gradient(learner, params, None, batch), RATE)
    p = jax.nn.softmax(learner.logits(params, None, batch.texts))
    residual = jax.nn.one_hot(batch.actions, p.shape[-1]) - p
    each = jnp.where(batch.mask[..., None], token_steps(batch, RATE)[..., None] * residual, 0.0)
    summed = jnp.zeros_like(params).at[batch.texts].add(each)
    np.testing.assert_allclose(change, summed, atol=1e-6)
    assert float(jnp.abs(change + summed).max()) > 0.1
    whole, first = batch_probe(learner, params, None, batch, change, RATE)
    np.testing.assert_allclose(first, summed[batch.texts], atol=1e-6)
    np.testing.assert_allclose(whole["first"], jnp.linalg.norm(summed[batch.texts], axis=-1), atol=1e-6)
    # Against the gradient the others move the other way.
    descent, _ = batch_probe(learner, params, None, batch, scaled(change, -1.0), RATE)
    np.testing.assert_allclose(descent["first"], whole["first"], rtol=1e-6)
    np.testing.assert_allclose((whole["agreeing"] + descent["agreeing"])[whole["first"] > 1e-3], 1.0, atol=1e-5)


def test_one_token_moves_a_network_by_its_kernel(agent):
    learner, params, batch = agent
    row, column = 2, 3
    texts = batch.texts[row : row + 1]

    def logits(params):
        return learner.logits(params, None, texts)[0, column]

    jacobian = jnp.concatenate(
        [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jax.jacrev(logits)(params))], axis=1
    )
    dense = np.asarray(jacobian @ jacobian.T, np.float64)
    product = kernel(logits, params)
    vector = jax.random.normal(jax.random.key(5), (len(dense),))
    np.testing.assert_allclose(product(vector), dense @ vector, rtol=1e-4, atol=1e-4)
    low, high = (float(x) for x in eigenvalue_range(product, len(dense)))
    np.testing.assert_allclose([low, high], np.linalg.eigvalsh(dense)[[0, -1]], rtol=1e-3)
    powered = [float(largest_eigenvalue(product, vector, count)) for count in (2, 40)]
    assert powered[0] < powered[1] <= high * (1 + 1e-4)
    np.testing.assert_allclose(powered[1], high, rtol=1e-2)
    action = batch.actions[row, column]
    residual = jax.grad(categorical.log_prob)(logits(params), action)
    found = _alone(learner, params, batch, 1e-2, row * batch.mask.shape[1] + column)
    step = 1e-2 / 6
    np.testing.assert_allclose(found["first"], step * np.linalg.norm(dense @ residual), rtol=1e-4)
    p = jax.nn.softmax(logits(params))
    np.testing.assert_allclose(
        found["predicted"], logit_dynamics.update_norm(p[action], jnp.sum(p * p), step=step), rtol=1e-5
    )
    assert low <= float(found["first"] / found["predicted"]) <= high


def test_the_realised_change_becomes_that_of_first_order(agent):
    learner, params, batch = agent
    gradient = policy_gradient(learner, params, None, batch)

    def curvature(rate):
        change = scaled(gradient, rate)
        _, first = batch_probe(learner, params, None, batch, change, rate)
        after, before = (learner.logits(at, None, batch.texts) for at in (moved(params, change), params))
        return float(jnp.linalg.norm(after - before - first) / jnp.linalg.norm(first)), after - before, first

    large, small = curvature(1e-2), curvature(1e-3)
    assert small[0] < 0.02
    assert large[0] > 3 * small[0]
    # What is realised is the ascent of the gain; the opposite sign is twice as far away as no change.
    assert float(jnp.linalg.norm(small[1] + small[2]) / jnp.linalg.norm(small[2])) > 1.9


def test_numbers_of_sizes_that_are_known():
    generator = np.random.default_rng(0)
    shape = (3, 2, 5, 40)
    step = 0.1 * generator.normal(size=shape)
    unit = generator.uniform(0.1, 1.2, size=shape)
    predicted = np.abs(step) * unit
    part = {
        "batch_mask": np.ones(shape, bool),
        "batch_step": step,
        "batch_unit": unit,
        "batch_predicted": predicted,
        "batch_first": 50 * predicted,
        "batch_rounding": np.full(shape, 1e-9),
        "batch_realised": 50 * predicted,
    }
    for name, value in (
        ("rank_correlation", 1),
        ("slope", 1),
        ("partial_correlation", 1),
        ("spread", 1),
        ("ratio", 50),
    ):
        found = numbers.interval(part, numbers.BATCH, name)
        np.testing.assert_allclose([found.mean, found.half], [value, 0], atol=1e-6)
    # Sizes that know |A| alone order as the formula in part, and not beyond it.
    blind = part | {"batch_realised": np.abs(step) * np.exp(0.1 * generator.normal(size=shape))}
    assert numbers.interval(blind, numbers.BATCH, "rank_correlation").low > 0.5
    assert not numbers.interval(blind, numbers.BATCH, "partial_correlation").mean > 0.1
    squared = part | {"batch_realised": predicted**2}
    np.testing.assert_allclose(numbers.interval(squared, numbers.BATCH, "slope").mean, 2, rtol=1e-6)


def test_a_table_that_learns_is_confident_and_its_steps_shrink():
    learner = table_learner(WORLD, tasks=8, group_size=4)
    found = dict(follow(learner, seeds=2, key=jax.random.key(0), steps=80, points=2, tokens=8, learning_rate=4.0))
    assert found["reward"][:, -10:].mean() > found["reward"][:, :10].mean() + 0.2
    assert (numbers.fall(numbers.formula_per_advantage(found)) < 0.9).all()
    assert numbers.exactness(found)["first_order_relative_error"] < 1e-4
    assert numbers.kernel_range_kept(found) == 1.0


def test_a_tiny_run_leaves_numbers_and_a_page(tmp_path):
    run = ["run", "logit_dynamics_training", "--tiny", "--runs-folder", str(tmp_path)]
    assert main([*run, "--id", "one"]) == 0
    folder = RunFolder(tmp_path / "logit_dynamics_training" / "one")
    summary = json.loads(folder.summary.read_text())
    assert summary["claim_met"] is None
    assert summary["table"]["first_order_relative_error"] < 1e-4
    assert summary["agent"]["kernel_range_kept"] == 1.0
    page = folder.report.read_text()
    for text in ("Does the size follow the formula?", "Self-regulation", "Do other actions rise"):
        assert text in page


def test_settings_that_cannot_be_are_refused(capsys, tmp_path):
    run = ["run", "logit_dynamics_training", "--tiny", "--runs-folder", str(tmp_path)]
    for words, sentence in (
        (["--language-task", "sums"], "--language-task is 'sums'; it must be one of"),
        (["--tasks", "1000"], "--tasks is 1000; these rooms have"),
        (["--turns", "2"], "turns is 2; the longest task"),
        (["--tokens", "3"], "--tokens is 3; it must be at least 8"),
    ):
        assert main([*run, *words]) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))
