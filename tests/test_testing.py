"""The test kit: every recipe passes it, and each check catches the error it is named after, in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import testing
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import SIGNALS
from jaxrl_llm.objectives import distillation
from jaxrl_llm.objectives import modulation
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import pruning
from jaxrl_llm.objectives import sequence_advantages
from jaxrl_llm.testing import check_objective
from jaxrl_llm.testing import examine_objective
from jaxrl_llm.testing import example_batch
from jaxrl_llm.testing.case import Case
from jaxrl_llm.testing.promises import Promises

stop = jax.lax.stop_gradient


def only(*names):
    """Skip every other check."""
    return tuple(name for name in testing.CHECKS if name not in names)


def token_mean(losses, mask):
    return jnp.where(mask, losses, 0.0).sum(), mask.sum()


def log_ratio(b):
    return jnp.where(b.response_mask, b.log_prob, 0.0) - jnp.where(b.response_mask, stop(b.log_prob_old), 0.0)


def advantage(b):
    return stop(b.advantages)[:, None]


def importance_weighted(b):
    return token_mean(-jnp.exp(log_ratio(b)) * advantage(b), b.response_mask)


def from_elsewhere(recipe):
    """Whether its advantages need more than rewards and groups."""
    return recipe.advantage == "given" or bool(SIGNALS[recipe.advantage].needs)


def from_recipe(recipe):
    def loss(b):
        advantages = b.advantages if from_elsewhere(recipe) else sequence_advantages(recipe, b.rewards, b.group_ids)
        log_prob, kept = b.log_prob, None
        if recipe.log_min_p is not None:
            log_prob, kept, _ = pruning.pruned_log_prob(b.logits, b.tokens, log_min_p=recipe.log_min_p)
        return policy_loss(
            recipe,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=b.response_mask,
            log_prob_old=b.log_prob_old,
            log_prob_behaviour=b.log_prob_behaviour,
            log_prob_ref=b.log_prob_ref,
            kl_t=b.kl_t,
            kl_ref_t=b.kl_ref_t,
            target_kept=kept,
        ).loss

    return loss


def promises_of(recipe):
    promises = {"aggregation": recipe.aggregation, "advantages": "group"}
    if from_elsewhere(recipe):
        promises["advantages"] = "sequence"
    elif "batch" in recipe.advantage:
        promises["advantages"] = "batch"
    if recipe.name in ("trm_max", "trm_avg"):
        promises["rejects_above_kl"] = {"maximum": recipe.mask_maximum, "average": recipe.mask_average}[recipe.mask]
    if recipe.kl_estimator == "exact":
        promises["kl_coefficient"] = recipe.kl_coefficient
    return promises


EVERY_CHECK = ("ppo", "grpo", "gspo", "trm", "dvp")
COMPILED_APART = ("precision", "vmap", "padding_columns")
"""Checks that compile one more program each: run on recipes that together use every part."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_passes(name):
    recipe = RECIPES[name]
    promises = promises_of(recipe)
    if name == "reinforce_plus_plus_baseline":
        # Centred within groups, scaled by the whole batch: neither promise holds for all of it.
        promises |= {"advantages": "group", "skip": ("padding_rows", "micro_batches")}
    if name not in EVERY_CHECK:
        promises["skip"] = (*promises.get("skip", ()), *COMPILED_APART)
    report = check_objective(from_recipe(recipe), **promises)
    assert report.token_weights == recipe.aggregation or report.token_weights == "token-mean"
    assert len(report.passed) >= 12


def test_a_compiled_loss_passes_and_its_weights_are_named():
    report = check_objective(jax.jit(importance_weighted))
    assert report.token_weights == "token-mean"
    assert not report.findings
    assert set(report.passed) | {name for name, _ in report.skipped} == set(testing.CHECKS)
    assert "tokens are weighted as token-mean" in str(report)


def test_token_advantages():
    def loss(b):
        advantages = jnp.where(b.response_mask, stop(b.advantages), 0.0)
        return token_mean(-jnp.exp(log_ratio(b)) * advantages, b.response_mask)

    check_objective(loss, advantages="token", aggregation="token-mean", skip=("precision", "vmap"))


def test_a_loss_may_read_the_forward_kl_and_the_steps():
    def loss(b):
        entropies, exists = modulation.step_entropy(b.entropy, b.step_ids, b.response_mask, steps=4)
        # Each step weighs by how certain it was; which steps there are is said by step_ids, -1 outside the mask.
        weight = modulation.spread_to_tokens(jnp.where(exists, jnp.exp(-entropies), 0.0), b.step_ids, b.response_mask)
        total, count = token_mean(-jnp.exp(log_ratio(b)) * weight * stop(b.advantages), b.response_mask)
        kl, _ = distillation.forward_kl(b.kl_from_ref_t, b.response_mask)
        return total + 0.1 * kl, count

    skip = ("on_policy_gradient", *COMPILED_APART)  # its tokens are weighted by more than their advantage
    check_objective(loss, skip=skip, advantages="token")
    case = Case(lambda b: distillation.forward_kl(b.kl_from_ref_t, b.response_mask), Promises(), example_batch())
    p, ref = (jax.nn.softmax(z) for z in (case.batch.logits, case.batch.logits_ref))
    mask = np.asarray(case.batch.response_mask)
    np.testing.assert_allclose(case.base.gradient, np.where(mask[..., None], p - ref, 0) / mask.sum(), atol=1e-7)
    steps = np.asarray(case.batch.step_ids)
    assert np.all(steps[~mask] == -1)
    assert np.all(steps[mask] >= 0)
    assert steps.max() == 2


def test_errors_of_use():
    with pytest.raises(TypeError, match=r"the loss returned float32\[12, 8\]; it must return a floating scalar"):
        examine_objective(lambda b: b.log_prob)
    with pytest.raises(TypeError, match="aggregatoin"):
        examine_objective(importance_weighted, aggregatoin="token-mean")
    with pytest.raises(ValueError, match=r"skip is 'micro_batch'.*Did you mean 'micro_batches'"):
        examine_objective(importance_weighted, skip=("micro_batch",))
    with pytest.raises(ValueError, match="advantages is 'sequences'"):
        examine_objective(importance_weighted, advantages="sequences")


def test_a_failure_raises_all_sentences():
    with pytest.raises(AssertionError) as error:
        check_objective(lambda b: -(jnp.exp(b.log_prob - b.log_prob_old) * b.advantages[:, None]).mean())
    text = str(error.value)
    assert "FAILED mask_values: The loss changes from" in text
    assert "FAILED stop_gradient: A gradient flows into log_prob_old" in text


def test_a_loss_that_branches_on_values():
    report = examine_objective(lambda b: importance_weighted(b) if b.rewards.sum() > 0 else jnp.zeros(()))
    assert report.failed == ("compiles",)
    assert "The loss cannot be compiled" in report.findings[0].sentence


def test_a_check_that_the_loss_cannot_survive_is_a_finding():
    def loss(b):
        if b.rewards.shape[0] != 12:
            raise ValueError("I take 12 sequences")
        return importance_weighted(b)

    report = examine_objective(loss, skip=only("micro_batches"))
    assert report.findings[0].sentence == "The loss raises ValueError: I take 12 sequences"


def group_centred_by_reshape(b):
    centred = (b.rewards.reshape(2, 6) - b.rewards.reshape(2, 6).mean(1, keepdims=True)).reshape(-1)
    return token_mean(-jnp.exp(log_ratio(b)) * stop(centred)[:, None], b.response_mask)


def group_normalised_by_epsilon(b):
    same = (b.group_ids[:, None] == b.group_ids[None, :]).astype(b.rewards.dtype)
    size = same.sum(1)
    mean = (same * b.rewards[None, :]).sum(1) / size
    deviation = jnp.sqrt((same * (b.rewards[None, :] - mean[:, None]) ** 2).sum(1) / size)
    return token_mean(-jnp.exp(log_ratio(b)) * stop((b.rewards - mean) / (deviation + 1e-8))[:, None], b.response_mask)


def raw_rewards(b):
    return token_mean(-jnp.exp(log_ratio(b)) * stop(b.rewards)[:, None], b.response_mask)


def with_callback(b):
    shape = jax.ShapeDtypeStruct(b.advantages.shape, b.advantages.dtype)
    same = jax.pure_callback(lambda x: np.asarray(x), shape, stop(b.advantages))
    return token_mean(-jnp.exp(log_ratio(b)) * same[:, None], b.response_mask)


def surrogate(function):
    return lambda b: token_mean(-function(log_ratio(b), b) * advantage(b), b.response_mask)


def masked(function):
    return lambda b: function(b, -jnp.exp(b.log_prob - stop(b.log_prob_old)) * advantage(b), b.response_mask)


def clipped_away_from_one(b):
    return token_mean(-jnp.clip(jnp.exp(log_ratio(b)), 1.1, 2.0) * advantage(b), b.response_mask)


def by_square_root_of_length(b):
    lengths = b.response_mask.sum(1, keepdims=True)
    losses = -jnp.exp(log_ratio(b)) * advantage(b) / jnp.sqrt(jnp.maximum(lengths, 1))
    return jnp.where(b.response_mask, losses, 0.0).sum(), (lengths > 0).sum()


def geometric(denominator):
    def loss(b):
        lengths = b.response_mask.sum(1)
        ratio = jnp.exp(log_ratio(b).sum(1) / jnp.maximum(denominator(lengths), 1))
        return jnp.where(lengths > 0, -ratio * stop(b.advantages), 0.0).sum(), (lengths > 0).sum()

    return loss


def pruned_by_a_constant(b):
    keep = b.logits >= b.logits.max(-1, keepdims=True) - 13
    log_p = jax.nn.log_softmax(jnp.where(stop(keep), b.logits, -50.0))
    log_prob = jnp.take_along_axis(log_p, b.tokens[..., None], -1)[..., 0]
    return token_mean(-jnp.where(b.response_mask, log_prob, 0.0) * advantage(b), b.response_mask)


GROUP = {"advantages": "group"}
WRONG = [
    ("finite", lambda b: importance_weighted(b)[0] / 0, {}, "The loss is "),
    ("finite", surrogate(lambda r, b: stop(jnp.exp(r))), {}, "The gradient is zero everywhere"),
    ("mask_values", masked(lambda b, x, m: (x.sum(), m.sum())), {}, "reads tokens outside response_mask"),
    (
        "mask_values",
        masked(lambda b, x, m: (token_mean(x, m)[0] + 0 * x.sum(), m.sum())),
        {},
        "instead of multiplying by",
    ),
    ("mask_values", masked(lambda b, x, m: ((x * m).sum(), m.sum())), {}, "the mask comes after the arithmetic"),
    ("mask_values", masked(lambda b, x, m: token_mean(x, m)), {}, "the mask comes after the arithmetic"),
    ("padding_columns", lambda b: importance_weighted(b)[0] / b.tokens.size, {}, "taken over columns"),
    ("columns", surrogate(lambda r, b: jnp.exp(r) * 0.9 ** jnp.arange(r.shape[1])), {}, "read by their column"),
    ("padding_rows", lambda b: importance_weighted(b)[0] / b.tokens.shape[0], {}, "are counted as sequences"),
    ("empty_mask", lambda b: jnp.divide(*importance_weighted(b)), {}, "With an empty mask the loss is nan"),
    ("permutation", group_centred_by_reshape, GROUP, "read from the order of the rows"),
    ("micro_batches", lambda b: (importance_weighted(b)[0], 1 + b.response_mask.sum()), {}, "is not a sum over"),
    ("vmap", with_callback, {}, "vmap over batches fails with"),
    ("on_policy_gradient", surrogate(lambda r, b: jnp.exp(2 * r)), {"aggregation": "token-mean"}, "'token-mean': "),
    ("on_policy_gradient", surrogate(lambda r, b: jnp.exp(-r)), {}, "has the wrong sign"),
    ("on_policy_gradient", clipped_away_from_one, {}, "the ratio of pi to itself stops it"),
    ("on_policy_gradient", surrogate(lambda r, b: jnp.exp(r + stop(b.log_prob))), {}, "tokens of one sequence have"),
    ("on_policy_gradient", by_square_root_of_length, {}, "no aggregation that has a name: "),
    ("on_policy_gradient", surrogate(lambda r, b: jnp.exp(r) * b.entropy), {}, "is not along grad log pi"),
    ("no_advantage", group_normalised_by_epsilon, GROUP, "With equal rewards and pi = ref the gradient is"),
    ("no_advantage", surrogate(lambda r, b: jnp.exp(r) - b.entropy / advantage(b)), {}, "an entropy bonus"),
    ("sign", surrogate(lambda r, b: jnp.exp(r) - 20 * r * r), {}, "lowers the loss; so do 6 of 37 tokens"),
    ("advantage_scaling", surrogate(lambda r, b: jnp.exp(r) * jnp.abs(advantage(b))), {}, "do not enter linearly"),
    ("advantage_scaling", raw_rewards, GROUP, "not compared within a group"),
    ("stop_gradient", surrogate(lambda r, b: jnp.exp(r) * b.log_prob_ref), {}, "flows into log_prob_ref"),
    ("constant_count", lambda b: (importance_weighted(b)[0], jnp.exp(log_ratio(b)).sum()), {}, "into the count"),
    ("logit_shift", pruned_by_a_constant, {}, "logits are compared with an absolute number"),
    ("precision", surrogate(lambda r, b: jnp.exp(r.astype(jnp.bfloat16)).astype(r.dtype)), {}, "a narrower type"),
    ("length_one", geometric(lambda n: n + 1), {"length_one_equals": importance_weighted}, "of one token the loss"),
]


@pytest.mark.parametrize(("check", "loss", "promises", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_each_check_catches_its_error(check, loss, promises, words):
    report = examine_objective(loss, **promises, skip=only(check))
    assert report.failed == (check,)
    assert any(words in finding.sentence for finding in report.findings), str(report)


def test_every_check_has_a_loss_that_fails_it():
    elsewhere = {"kl_penalty", "ratio_interval", "trust_region"}  # test_testing_peers.py
    assert {check for check, *_ in WRONG} | elsewhere == set(testing.CHECKS)


def test_a_sequence_ratio_equals_a_token_ratio_at_length_one():
    check_objective(geometric(lambda n: n), length_one_equals=importance_weighted, skip=only("length_one"))
