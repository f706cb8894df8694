"""Errors found in public code, written here from their description, and the sentence by which the kit finds each.

Beside each stands the right form, which passes the same check.
"""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm import testing
from jaxrl_llm.objectives import divergences
from jaxrl_llm.objectives import masks
from jaxrl_llm.testing import check_estimator
from jaxrl_llm.testing import check_objective
from jaxrl_llm.testing import examine_estimator
from jaxrl_llm.testing import examine_objective

stop = jax.lax.stop_gradient


def found(loss, check, **promises):
    """The sentences of one check."""
    skip = tuple(name for name in testing.CHECKS if name != check)
    report = examine_objective(loss, skip=skip, **promises)
    assert set(report.failed) <= {check}
    return " ".join(finding.sentence for finding in report.findings)


def losses(b):
    ratio = jnp.exp(b.log_prob - stop(b.log_prob_old))
    return jnp.where(b.response_mask, -ratio * stop(b.advantages)[:, None], 0.0)


def token_mean(b, x):
    return jnp.where(b.response_mask, x, 0.0).sum(), b.response_mask.sum()


def with_penalty(estimator):
    return lambda b: token_mean(b, losses(b) + 0.04 * estimator(b.log_prob - b.log_prob_ref))


def test_k1_as_a_loss_term_is_noise():
    words = found(with_penalty(divergences.k1), "kl_penalty", kl_coefficient=0.04)
    assert "is not 0.04 grad KL(pi || ref): it is zero, as that of k1 is" in words
    # It is found without any promise too, as a gradient where there is nothing to learn.
    assert "k1 as a loss has one" in found(with_penalty(divergences.k1), "no_advantage")


def test_k3_as_a_loss_term_has_the_gradient_of_the_other_kl():
    words = found(with_penalty(divergences.k3), "kl_penalty", kl_coefficient=0.04)
    assert "it is that of KL(ref || pi), as that of k3 is (cosine 0." in words


@pytest.mark.parametrize("estimator", [divergences.k2, divergences.k3_straight_through])
def test_the_penalties_that_keep_the_promise(estimator):
    assert not found(with_penalty(estimator), "kl_penalty", kl_coefficient=0.04)
    assert "relative error 0.5" in found(with_penalty(estimator), "kl_penalty", kl_coefficient=0.08)


def test_the_mean_of_micro_batch_means_is_not_the_mean():
    def scalar(b):
        total, count = token_mean(b, losses(b))
        return total / jnp.maximum(count, 1)

    assert "the mean over its two micro-batches is" in found(scalar, "micro_batches")
    assert not found(lambda b: token_mean(b, losses(b)), "micro_batches")


def masked_by_interval(sign):
    def loss(b):
        log_weight = stop(b.log_prob_old - b.log_prob_behaviour)
        low, high = jnp.log(0.6), jnp.log(1.4)
        kept = (sign * log_weight >= low) & (sign * log_weight <= high)
        return token_mean(b, jnp.where(kept, jnp.exp(log_weight), 0.0) * losses(b))

    return loss


def test_a_rejection_interval_on_the_negative_log_ratio():
    words = found(masked_by_interval(-1.0), "ratio_interval", keeps_ratio=(0.6, 1.4))
    assert "the interval acts on the inverse ratio" in words
    assert "is dropped" in words
    assert not found(masked_by_interval(1.0), "ratio_interval", keeps_ratio=(0.6, 1.4))


def with_mask(accept, *, drop=False):
    def loss(b):
        accepted = accept(b)[:, None]
        count = (b.response_mask & accepted).sum() if drop else b.response_mask.sum()
        return jnp.where(accepted, losses(b), 0.0).sum(), count

    return loss


def sampled(b):
    return masks.accept_by_sampled_maximum(b.log_prob - b.log_prob_behaviour, b.response_mask, threshold=0.05)


def exact(b):
    return masks.accept_by_maximum(b.kl_t, b.response_mask, threshold=0.05)


def test_a_maximum_test_on_sampled_tokens_misses_the_rest_of_the_distribution():
    words = found(with_mask(sampled), "trust_region", rejects_above_kl=0.05)
    assert "a test that sees the sampled token alone misses this" in words
    assert not found(with_mask(exact), "trust_region", rejects_above_kl=0.05)


def test_dropping_rejected_sequences_from_the_denominator():
    dropped = with_mask(exact, drop=True)
    words = found(dropped, "trust_region", rejects_above_kl=0.05)
    assert "the gradient of the other is multiplied by 2 instead of 1" in words
    assert not found(dropped, "trust_region", rejects_above_kl=0.05, normalise_by="accepted")
    assert "by 1 instead of 2" in found(
        with_mask(exact), "trust_region", rejects_above_kl=0.05, normalise_by="accepted"
    )


def test_a_mask_that_rejects_everything():
    words = found(with_mask(lambda b: exact(b) & False), "trust_region", rejects_above_kl=0.05)
    assert "below 0.05, does not contribute" in words


def test_weighting_sampled_tokens_by_their_probability_is_no_kl():
    report = examine_estimator(lambda b: jnp.exp(b.log_prob) * (b.log_prob - b.log_prob_ref), of="kl_ref")
    assert report.failed == ("value", "gradient")
    assert "With tokens of pi its expectation is" in report.findings[0].sentence
    assert "KL(pi || ref) is" in report.findings[0].sentence


def test_the_log_prob_of_sampled_tokens_is_not_the_entropy_of_the_policy():
    report = examine_estimator(lambda b: -b.log_prob, of="entropy", promises=testing.estimators.PROMISES)
    assert report.failed == ("gradient", "off_policy")
    assert "is not that of the entropy of pi: it is zero" in report.findings[0].sentence
    check_estimator(lambda b: b.entropy, of="entropy", promises=testing.estimators.PROMISES)


def test_estimators_of_both_kls():
    def forward(b):
        return divergences.k3(b.log_prob_behaviour - b.log_prob)

    check_estimator(lambda b: divergences.k3_straight_through(b.log_prob - b.log_prob_ref), of="kl_ref")
    check_estimator(forward, of="kl_behaviour")
    with pytest.raises(AssertionError, match="as that of k1 is"):
        check_estimator(lambda b: divergences.k1(b.log_prob - b.log_prob_ref), of="kl_ref")
    with pytest.raises(AssertionError, match="FAILED value"):
        check_estimator(lambda b: divergences.k2(b.log_prob - b.log_prob_ref), of="kl_ref")
    with pytest.raises(AssertionError, match="relative error"):
        check_estimator(lambda b: 2 * forward(b), of="kl_behaviour", promises=("gradient",))
    with pytest.raises(TypeError, match="one number per token"):
        check_estimator(lambda b: b.log_prob.mean(), of="kl_ref")
    with pytest.raises(ValueError, match="of is 'kl'"):
        check_estimator(forward, of="kl")


def row_means(guard):
    def loss(b):
        lengths = b.response_mask.sum(1)
        per_row = losses(b).sum(1) / (jnp.maximum(lengths, 1) if guard else lengths)
        return per_row.sum(), (lengths > 0).sum()

    return loss


def test_a_mean_per_row_without_a_guard():
    assert "its own mean divides by a count of 0" in found(row_means(guard=False), "padding_rows")
    assert "With an empty mask the loss is nan" in found(row_means(guard=False), "empty_mask")
    assert not found(row_means(guard=True), "padding_rows")
    assert not found(row_means(guard=True), "empty_mask")


def from_logits(digits):
    def loss(b):
        # A cast there and back may be compiled away; this cannot.
        target = jnp.take_along_axis(b.logits, b.tokens[..., None], -1)[..., 0]
        target = jax.lax.reduce_precision(target, 8, digits) if digits < 23 else target
        log_prob = target - jax.nn.logsumexp(b.logits, axis=-1)
        ratio = jnp.exp(jnp.where(b.response_mask, log_prob - stop(b.log_prob_old), 0.0))
        return token_mean(b, -ratio * stop(b.advantages)[:, None])

    return loss


def test_a_target_logit_rounded_to_bfloat16():
    assert "something inside has a narrower type" in found(from_logits(7), "precision")
    assert not found(from_logits(23), "precision")


def test_a_recipe_of_all_the_right_forms_passes_everything():
    def loss(b):
        log_prob, old, ref = (
            jnp.where(b.response_mask, x, 0.0) for x in (b.log_prob, stop(b.log_prob_old), stop(b.log_prob_ref))
        )
        surrogate = -jnp.exp(log_prob - old) * stop(b.advantages)[:, None]
        penalty = 0.04 * divergences.k3_straight_through(log_prob - ref)
        return token_mean(b, jnp.where(exact(b)[:, None], surrogate, 0.0) + penalty)

    check_objective(loss, aggregation="token-mean", kl_coefficient=0.04, rejects_above_kl=0.05)
