"""One optimiser step: its gradient against the objective written out, micro-batches, skipping, donation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.trainable import combine
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.run.state import state_hash
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import pack
from jaxrl_llm.training.text.objective import recipe_objective
from jaxrl_llm.training.text.policy import head_copy
from jaxrl_llm.training.text.policy import split_policy
from jaxrl_llm.training.text.scoring import Scorer
from jaxrl_llm.training.text.update import Heads
from jaxrl_llm.training.text.update import Update
from jaxrl_llm.training.text.update import UpdateBatch

PROMPT, RESPONSE, GROUP, PROMPTS = 4, 3, 2, 4
SEQUENCES = PROMPTS * GROUP


@dataclasses.dataclass
class World:
    """A model, a batch its own policy did not quite sample, and everything an update takes."""

    policy: object
    params: object
    frozen: object
    batch: UpdateBatch
    heads: Heads
    tokens: np.ndarray
    mask: np.ndarray

    def state(self, optimizer: optax.GradientTransformation) -> TrainState:
        return TrainState.create(self.params, optimizer, 0)


def make_world(choice: trainable.Trainable, slots: int = GROUP) -> World:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 64, (SEQUENCES, PROMPT + RESPONSE)).astype(np.int32)
    tokens[:, :PROMPT] = np.repeat(tokens[::GROUP, :PROMPT], GROUP, axis=0)
    mask = np.ones_like(tokens, bool)
    mask[:GROUP, :2] = False
    for row, length in enumerate(rng.integers(1, RESPONSE + 1, SEQUENCES)):
        mask[row, PROMPT + length :] = False
    model = choice.prepare(Transformer(tiny(), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    if choice.adapters is not None:  # b = 0 at the start would hide the gradient of a
        graphdef, state = nnx.split(model)
        noisy = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
        model = nnx.merge(graphdef, noisy)
    policy, params, frozen = split_policy(model, choice)
    layout = Grid(PROMPT, slots, RESPONSE)
    packed = jax.tree.map(jnp.asarray, pack(tokens, mask, np.repeat(np.arange(PROMPTS), GROUP), layout))
    shape = (SEQUENCES // slots, slots, RESPONSE)
    # The old policy is another one, so that ratios and divergences are not trivial.
    moved = jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    scores = Scorer(policy).score(moved, frozen, packed)
    real = jnp.asarray(mask[:, PROMPT:]).reshape(shape)
    per_sequence = jnp.asarray(rng.normal(size=shape[:2]), jnp.float32)
    batch = UpdateBatch(
        rows=packed,
        response_mask=real,
        group_ids=jnp.repeat(jnp.arange(PROMPTS, dtype=jnp.int32), GROUP).reshape(shape[:2]),
        step_ids=jnp.where(real, 0, -1),
        rewards=jnp.zeros(shape[:2]),
        advantages=jnp.broadcast_to(per_sequence[:, :, None], shape),
        log_prob_behaviour=scores.log_prob + 0.1,
        log_prob_old=scores.log_prob,
        hidden_old=scores.hidden,
        trunk=scores.trunk,
    )
    return World(policy, params, frozen, batch, Heads(head_copy(policy, policy.model(moved, frozen))), tokens, mask)


def rows(*lists: list[int]) -> jax.Array:
    return jnp.asarray(lists, jnp.int32)


def in_the_middle(world: World) -> float:
    """A threshold that half of the sequences keep: between their largest exact KL(old || current) of a token. [nats]"""
    shift = Scorer(world.policy).shift(world.params, world.frozen, world.batch, world.heads)
    kl = np.asarray(shift.kl).reshape(SEQUENCES, RESPONSE)
    largest = np.sort(np.where(world.mask[:, PROMPT:], kl, 0).max(axis=1))
    return float(largest[SEQUENCES // 2 - 1 : SEQUENCES // 2 + 1].mean())


def written_out(world: World, recipe: Recipe):
    """The objective on the whole texts, one sequence a row, with logits and nothing shared: loss and gradient."""
    tokens, mask = jnp.asarray(world.tokens), jnp.asarray(world.mask)
    real = mask[:, PROMPT:]
    old = world.batch.log_prob_old.reshape(SEQUENCES, RESPONSE)
    behaviour = world.batch.log_prob_behaviour.reshape(SEQUENCES, RESPONSE)
    advantage = world.batch.advantages[:, :, :1].reshape(-1, 1)
    old_hidden = world.batch.hidden_old.reshape(SEQUENCES, RESPONSE, -1)

    def loss(params):
        model = world.policy.model(params, world.frozen)
        hidden = model(tokens, mask)[:, PROMPT - 1 : -1]
        log_p = jax.nn.log_softmax(model.logits(hidden))
        log_prob = jnp.take_along_axis(log_p, tokens[:, PROMPT:, None], axis=-1)[..., 0]
        if recipe.name == "dapo":
            ratio = jnp.exp(log_prob - old)
            each = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
            return jnp.sum(jnp.where(real, each, 0)) / jnp.sum(real)
        head = model.head()[0] if world.heads.old is None else world.heads.old
        log_q = jax.nn.log_softmax(old_hidden @ head.T)
        kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        accepted = jax.lax.stop_gradient(jnp.max(jnp.where(real, kl, 0), axis=1) <= recipe.mask_maximum)
        each = -jnp.where(accepted[:, None], advantage * jnp.exp(log_prob - behaviour), 0)
        return jnp.sum(jnp.where(real, each, 0)) / SEQUENCES

    return jax.jit(jax.value_and_grad(loss))(world.params)


def assert_close(got, expected, tolerance: float = 2e-5):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(b))) + 1e-9)

    jax.tree.map(close, got, expected)


CHOICES = {
    "full": trainable.full(),
    "top": trainable.top_layers(1),
    "lora": trainable.lora(2, top=1),
    "lora_everywhere": trainable.lora(2),
}


@pytest.mark.parametrize(
    ("choice", "name", "slots"),
    [
        ("full", "trm_max", 2),
        ("top", "trm_max", 1),
        ("lora", "dapo", 2),
        ("lora_everywhere", "dapo", 1),
    ],
)
def test_gradient_is_that_of_the_objective_written_out(choice, name, slots):
    world = make_world(CHOICES[choice], slots)
    recipe = dataclasses.replace(RECIPES[name], mask_maximum=in_the_middle(world))
    update = Update(world.policy, recipe_objective(recipe), optax.sgd(1.0))
    everything = jnp.arange(SEQUENCES // slots, dtype=jnp.int32)[None]
    gradient, terms = jax.jit(update.gradient)(world.params, world.frozen, world.batch, world.heads, everything, 1)
    loss, expected = written_out(world, recipe)
    if name == "trm_max":
        rejected, total = terms.metrics["rejected_sequences"]
        assert rejected == total / 2, "the mask must decide something here"
    np.testing.assert_allclose(terms.loss[0] / terms.loss[1], loss, rtol=1e-5)
    assert_close(gradient, expected)
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    with pytest.raises(AssertionError):
        assert_close(zeros, expected)


@pytest.mark.parametrize("name", ["dapo", "trm_max"])
def test_micro_batches_equal_the_batch(name):
    world = make_world(trainable.top_layers(1))
    recipe = dataclasses.replace(RECIPES[name], mask_maximum=in_the_middle(world))
    update = Update(world.policy, recipe_objective(recipe), optax.sgd(1.0))
    gradient = jax.jit(update.gradient)
    arguments = (world.params, world.frozen, world.batch, world.heads)
    whole, terms = gradient(*arguments, rows([0, 1, 2]), 1)
    # Answers have different lengths; the last micro-batch is half empty and one more is not computed at all.
    parts, part_terms = gradient(*arguments, rows([2, 0], [1, -1], [3, 3]), 2)
    assert_close(parts, whole)
    for a, b in zip(jax.tree.leaves(part_terms), jax.tree.leaves(terms), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    mean_of_means = (gradient(*arguments, rows([2, 0]), 1)[0], gradient(*arguments, rows([1, -1]), 1)[0])
    with pytest.raises(AssertionError):
        assert_close(jax.tree.map(lambda a, b: (a + b) / 2, *mean_of_means), whole)


def test_an_update_is_the_optimizer_applied_to_the_gradient():
    world = make_world(trainable.full())
    optimizer = optax.adam(0.01)
    update = Update(world.policy, recipe_objective(RECIPES["dapo"]), optimizer)
    everything = rows(range(PROMPTS))
    gradient, _ = jax.jit(update.gradient)(world.params, world.frozen, world.batch, world.heads, everything, 1)
    changes, _ = optimizer.update(gradient, optimizer.init(world.params))
    expected = optax.apply_updates(world.params, changes)
    state, metrics = update(world.state(optimizer), world.frozen, world.batch, world.heads, everything, 1)
    # Adam's first step is a sign; where a gradient is zero up to rounding, so is nothing about its sign.
    agree = [
        np.mean(np.abs(np.asarray(a) - np.asarray(b)) < 1e-5)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True)
    ]
    assert min(agree) > 0.98
    assert (int(state.updates), int(state.skipped), int(state.step)) == (1, 0, 0)
    np.testing.assert_allclose(metrics["grad_norm"][0], optax.tree.norm(gradient), rtol=1e-4)


def test_buffers_are_donated_and_the_step_is_compiled_once():
    world = make_world(trainable.top_layers(1))
    optimizer = optax.adam(0.01)
    update = Update(world.policy, recipe_objective(RECIPES["trm"]), optimizer)
    state = world.state(optimizer)
    for micro_batches in (2, 1, 2):
        before = jax.tree.leaves(state)
        state, _ = update(state, world.frozen, world.batch, world.heads, rows([0, 1], [2, 3]), micro_batches)
        assert all(leaf.is_deleted() for leaf in before)
    assert update.traces == 1
    # The state took the model's parameters over: no second copy of them is alive.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(world.params))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where):
    world = make_world(trainable.top_layers(1))
    optimizer = optax.adam(0.01)
    update = Update(world.policy, recipe_objective(RECIPES["rloo"]), optimizer)
    # One broken advantage, or finite ones whose product overflows only in the gradient's norm.
    broken = world.batch.advantages.at[2, 1].set(jnp.nan if where == "loss" else 1e30)
    bad = dataclasses.replace(world.batch, advantages=broken)
    if where == "gradient":
        bad = dataclasses.replace(bad, response_mask=bad.response_mask.at[2, 1, 0].set(True))
    everything = rows(range(PROMPTS))

    def step(state, batch):
        return update(state, world.frozen, batch, world.heads, everything, 1)

    state, _ = step(world.state(optimizer), world.batch)
    before = state_hash((state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert state_hash((state.params, state.opt_state)) == before
        assert (int(state.skipped), int(state.skipped_in_a_row), int(state.updates)) == (count, count, 1)
        assert metrics["skipped"] == (1, 1)
        assert metrics["loss"] == (0, 0)
        if where == "gradient":
            assert np.isinf(metrics["grad_norm"][0])
    state, metrics = step(state, world.batch)
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.updates)) == (2, 0, 2)
    assert metrics["skipped"] == (0, 1)
    assert state_hash((state.params, state.opt_state)) != before
    assert update.traces == 1


def test_a_recipe_with_a_reference_gets_it():
    world = make_world(trainable.top_layers(1))
    recipe = dataclasses.replace(RECIPES["grpo"], kl_estimator="exact", kl_coefficient=0.5)
    reference = Scorer(world.policy).score(world.params, world.frozen, world.batch.rows)
    same = dataclasses.replace(world.batch, log_prob_ref=reference.log_prob, hidden_ref=reference.hidden)
    other = dataclasses.replace(world.batch, log_prob_ref=world.batch.log_prob_old, hidden_ref=world.batch.hidden_old)
    update = Update(world.policy, recipe_objective(recipe), optax.sgd(1.0))
    for batch, zero in ((same, True), (other, False)):
        arguments = (world.params, world.frozen, batch, world.heads, rows(range(PROMPTS)), 1)
        _, terms = jax.jit(update.gradient)(*arguments)
        assert (abs(float(terms.metrics["kl_ref"][0])) < 1e-4) == zero


def test_rows_scored_a_few_at_a_time_are_the_same():
    world = make_world(trainable.top_layers(1))
    whole, parts = (Scorer(world.policy, rows=rows) for rows in (0, 3))
    arguments = (world.params, world.frozen, world.batch.rows)
    chex.assert_trees_all_close(whole.score(*arguments), parts.score(*arguments), atol=1e-4)
    arguments = (world.params, world.frozen, world.batch, world.heads)
    chex.assert_trees_all_close(whole.shift(*arguments), parts.shift(*arguments), atol=1e-4)


def test_the_whole_model_can_be_put_together_again():
    choice = trainable.lora(2, top=1)
    model = choice.prepare(Transformer(tiny(), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    policy, params, frozen = split_policy(model, choice)
    tokens = jnp.arange(6)[None]
    expected = model(tokens)
    chex.assert_trees_all_equal(nnx.merge(policy.graphdef, combine(params, frozen))(tokens), expected)
    assert policy.first_layer == 1
    assert not policy.trains_head


@pytest.mark.parametrize(("recipe", "every", "kept"), [("dapo", 0, False), ("dapo", 2, True), ("trm", 0, True)])
def test_the_old_policy_is_kept_where_somebody_compares_with_it(recipe, every, kept, tiny_run):
    update = dataclasses.replace(tiny_run.SETTINGS.update, bounds_every=every)
    trainer, collector = tiny_run.make_trainer(
        tiny_run.make_parts(recipe), dataclasses.replace(tiny_run.SETTINGS, update=update)
    )
    state = trainer.initial_state()
    prepared = trainer.prepare(state, 0, tiny_run.collected(trainer, collector, state))
    assert (prepared.batch.hidden_old is not None, prepared.heads.old is not None) == (kept, kept)
    if not kept:
        trainer.improve(state, prepared)
