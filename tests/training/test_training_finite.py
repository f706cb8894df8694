"""Rollouts whose numbers are none: dropped with a count and a warning, and in no mean."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.environments import Score
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import perturb
from jaxrl_llm.training import NonFiniteError
from jaxrl_llm.training import train
from jaxrl_llm.training.run.reporting import Quiet
from jaxrl_llm.training.text.finite import find_finite
from jaxrl_llm.training.text.trainer import Trainer


class Told(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_what_is_at_padding_does_not_matter():
    mask = np.array([[True, True, False]] * 4)
    behaviour, old, rewards = np.zeros((4, 3)), np.zeros((4, 3)), np.zeros(4)
    behaviour[0, 2], behaviour[1, 0], old[1, 1], rewards[3] = np.nan, -np.inf, np.inf, np.nan
    found = find_finite(behaviour, old, mask, rewards)
    np.testing.assert_array_equal(found.rows, [True, False, True, False])
    assert (found.dropped, found.sampler, found.trainer, found.reward) == (2, 1, 1, 1)
    assert "Step 7: dropped 2 of 4 rollouts" in found.sentence(7)


@pytest.fixture(scope="module")
def made(tiny_run):
    return tiny_run.make_trainer(tiny_run.make_parts())


@pytest.fixture(scope="module")
def trainer(made) -> Trainer:
    return made[0]


@pytest.fixture(scope="module")
def sampled(made, tiny_run):
    trainer, collector = made
    state = trainer.initial_state()
    return state, tiny_run.collected(trainer, collector, state), np.linspace(0, 1, 64, dtype=np.float32)


@pytest.mark.parametrize("cause", ["sampler", "reward"])
def test_a_broken_rollout_changes_nothing_but_its_own_absence(cause, trainer, sampled, tiny_run):
    """Its group is compared without it, and the gradient is that of the batch in which it has no token."""
    state, experience, rewards = sampled
    broken, rewards = np.array(experience.trajectories.log_prob_behaviour), rewards.copy()
    if cause == "sampler":
        broken[5, -1] = np.nan
    else:
        rewards[5] = np.inf
    prepared = trainer.prepare(state, 0, tiny_run.with_outcomes(experience, rewards, log_prob_behaviour=broken))
    assert prepared.finite.dropped == 1
    advantages = np.asarray(prepared.advantages).reshape(8, 8)
    group = np.delete(rewards[:8], 5)
    expected = (group - group.mean()) / group.std(ddof=1)
    np.testing.assert_allclose(np.delete(advantages[0], 5), expected, rtol=1e-4)
    assert advantages[0, 5] == 0
    mask = np.asarray(prepared.batch.response_mask).reshape(64, 1)
    assert not mask[5].any()
    assert mask[4].all()

    gradient_of = jax.jit(trainer.update.gradient, static_argnums=5)

    def gradient(batch) -> list[np.ndarray]:
        rows = jnp.arange(batch.rows.tokens.shape[0])[None]
        found, terms = gradient_of(state.params, trainer.frozen, batch, prepared.heads, rows, 1)
        assert float(terms.loss[1]) == 63  # tokens, which this recipe divides by
        return [np.asarray(leaf) for leaf in jax.tree.leaves((found, terms))]

    clean = dataclasses.replace(
        prepared.batch, log_prob_behaviour=jnp.nan_to_num(prepared.batch.log_prob_behaviour, posinf=0.0)
    )
    for got, without in zip(gradient(prepared.batch), gradient(clean), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, without)


def gradients(trainer):
    """(state, prepared) -> the gradient of all rows at once, by parameter, and the tokens that it counts."""
    jitted = jax.jit(trainer.update.gradient, static_argnums=5)

    def gradient(state, prepared) -> tuple[dict[str, np.ndarray], float]:
        # One row of padding as well, which reads row 0.
        rows = jnp.append(jnp.arange(prepared.batch.rows.tokens.shape[0]), -1)[None]
        found, terms = jitted(state.params, trainer.frozen, prepared.batch, prepared.heads, rows, 1)
        paths = jax.tree_util.tree_leaves_with_path(found)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}, float(terms.loss[1])

    return gradient


@pytest.mark.parametrize(("recipe", "share_prompts"), [("dapo", True), ("trm", False)])
def test_a_broken_row_of_the_trainer_leaves_the_gradient_finite(recipe, share_prompts, tiny_run):
    """One token has an embedding of NaN: the rollout that contains it, and the answers in its row, are as if absent."""
    settings = dataclasses.replace(
        tiny_run.SETTINGS,
        prompts=2,
        response_length=3,
        update=dataclasses.replace(tiny_run.SETTINGS.update, minibatches=1, share_prompts=share_prompts),
    )
    tokenizer = ByteTokenizer()
    config = tiny(vocab_size=tokenizer.vocab_size, num_layers=1, tie_embeddings=False)
    model = Transformer(config, rngs=nnx.Rngs(0))
    trainer, collector = tiny_run.make_trainer(tiny_run.make_parts(recipe, model=model), settings)
    state = trainer.initial_state()
    experience = tiny_run.collected(trainer, collector, state)
    rollout = experience.trajectories
    tokens, width, unused = np.array(rollout.tokens), settings.prompt_length, 7
    tokens[tokens == unused] = 8
    tokens[5, width] = unused
    mask = np.array(rollout.action_mask)
    mask[5, width:] = True
    changed = {"tokens": tokens, "action_mask": mask, "token_mask": rollout.token_mask | mask}
    rewards = np.linspace(0, 1, 16, dtype=np.float32)

    def poison(path, leaf):
        return leaf.at[unused].set(jnp.nan) if jax.tree_util.keystr(path).startswith("['embedding']") else leaf

    broken = dataclasses.replace(state, params=jax.tree_util.tree_map_with_path(poison, state.params))
    prepared = trainer.prepare(broken, 0, tiny_run.with_outcomes(experience, rewards, **changed))
    slots = prepared.batch.rows.layout.sequences
    assert (slots > 1) == share_prompts
    first = 5 // slots * slots
    out = np.isin(np.arange(16), np.arange(first, first + slots))
    np.testing.assert_array_equal(prepared.finite.rows, ~out)
    assert (prepared.finite.sampler, prepared.finite.trainer, prepared.finite.reward) == (0, slots, 0)
    assert f"(the trainer's: {slots})" in prepared.finite.sentence(0)
    gradient = gradients(trainer)
    found, count = gradient(broken, prepared)

    log_probs = np.where(out[:, None], np.nan, rollout.log_prob_behaviour)  # the sampler's fault drops the same rows
    changed["log_prob_behaviour"] = log_probs
    absent = trainer.prepare(state, 0, tiny_run.with_outcomes(experience, rewards, **changed))
    expected, expected_count = gradient(state, absent)
    assert count == expected_count > 0
    assert max(np.abs(leaf).max() for leaf in expected.values()) > 1e-3
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6, err_msg=name)

    improved, updates = trainer.improve(broken, prepared)
    assert [float(update["skipped"][0]) for update in updates] == [0.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(improved.params["layers"]))


class SometimesNone:
    """Gives no number for one answer in every group."""

    def __init__(self, task, every: int) -> None:
        self.name, self.stop, self._task, self._every, self._count = task.name, task.stop, task, every, 0

    def __getattr__(self, name):
        return getattr(self._task, name)

    def score(self, problem, text) -> Score:
        self._count += 1
        right = self._task.score(problem, text)
        return dataclasses.replace(right, reward=float("nan")) if self._count % self._every == 0 else right


def test_a_run_counts_warns_and_averages_the_others(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=2)
    told = Told()
    parts = tiny_run.make_parts(task=SometimesNone(tiny_run.SayTheDigit(), 8))
    train(parts, settings, tmp_path, reporter=told)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/dropped_nonfinite"] for row in rows] == [8.0, 8.0]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert all(0 < row["critic/rewards/mean"] <= 1 and row["actor/skipped"] == 0 for row in rows)
    assert sum("dropped 8 of 64 rollouts" in sentence for sentence in told.said) == 2


def test_a_step_without_a_sound_rollout_stops_the_run(tiny_run, tmp_path):
    parts = tiny_run.make_parts(task=SometimesNone(tiny_run.SayTheDigit(), 1))
    with pytest.raises(NonFiniteError, match=r"dropped 64 of 64 .*the reward: 64.*no checkpoint was saved yet"):
        train(parts, tiny_run.SETTINGS, tmp_path)


def test_a_quantised_sampler_is_seen_exactly(tiny_run):
    """The trainer's law of the sampler gives the log-probs that the sampler recorded, and divergences from it."""
    parts = tiny_run.make_parts("trm", perturbation=perturb.perturbation("fp8_weights"))
    trainer, collector = tiny_run.make_trainer(parts)
    state = trainer.initial_state()
    experience = tiny_run.collected(trainer, collector, state)
    rollout = experience.trajectories
    prepared = trainer.prepare(state, 0, experience)
    # Nothing was updated: what is left is the quantisation.
    shift = jax.tree.map(prepared.gather, trainer.compare(state, prepared))
    recorded = np.asarray(rollout.log_prob_behaviour)[:, -1]
    old = prepared.gather(prepared.batch.log_prob_old)[:, 0]
    np.testing.assert_allclose(np.asarray(shift.log_ratio)[:, 0], old - recorded, atol=1e-5)
    model = trainer.policy.model(state.params, trainer.frozen)
    engine = perturb.perturbed_logits(model, rollout.tokens, rollout.token_mask, parts.perturbation, response_width=1)
    plain = perturb.perturbed_logits(
        model, rollout.tokens, rollout.token_mask, perturb.Perturbation(), response_width=1
    )
    np.testing.assert_allclose(shift.kl, categorical.kl(engine, plain), atol=1e-6)
    np.testing.assert_allclose(shift.total_variation, categorical.total_variation(engine, plain), atol=1e-5)
    assert np.asarray(shift.total_variation).max() > 1e-4


def test_exact_masks_refuse_a_sampler_whose_law_the_trainer_cannot_compute(tiny_run):
    parts = tiny_run.make_parts("trm", perturbation=perturb.perturbation("gaussian_noise"))
    with pytest.raises(ValueError, match="masks by the exact KL"):
        tiny_run.make_trainer(parts)
