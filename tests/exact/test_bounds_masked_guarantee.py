"""The repaired guarantee of Trust Region Masking on trees with a few corrupted contexts, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import masked_gain_lower_bound
from jaxrl_llm.bounds import surrogate_error_bounds
from theory_checks import token_trees as trees

THRESHOLD = 0.02
WORLDS = 300
V, T = 3, 5


def context_values(per_context):
    return jnp.stack([jnp.repeat(x, V ** (T - t)) for t, x in enumerate(per_context)], axis=1)


def measure(pi, mu, rewards):
    _, kl, _ = trees.divergences(pi, mu)
    inside = [k <= THRESHOLD for k in kl]
    mixed = [jnp.where(g[:, None], p, m) for g, p, m in zip(inside, pi, mu, strict=True)]
    law = {name: jnp.exp(trees.sequence_log_probs(policy)) for name, policy in (("pi", pi), ("mu", mu))}
    outside = ~context_values(inside)
    hit = jnp.any(outside, axis=1)
    gain, full, _ = trees.error_of_surrogate(pi, mu, rewards)
    _, masked, _ = trees.error_of_surrogate(mixed, mu, rewards)
    inputs = trees.bound_inputs(mixed, mu)
    by_sequence = jnp.sum(law["mu"] * jnp.where(hit, 0.0, rewards) * jnp.expm1(trees.token_log_ratios(pi, mu)).sum(1))
    inner = jnp.where(outside, 0.0, jnp.expm1(trees.token_log_ratios(pi, mu)))
    error_bound = surrogate_error_bounds(inputs).unified_sharp
    hit_mu, hit_pi = jnp.sum(law["mu"] * hit), jnp.sum(law["pi"] * hit)
    return {
        "gain": gain,
        "full": full,
        "context": masked,
        "sequence": by_sequence,
        "difference": jnp.sum(law["mu"] * jnp.where(hit, rewards, 0.0) * inner.sum(1)),
        "bound": error_bound,
        "hit_mu": hit_mu,
        "hit_pi": hit_pi,
        "tv": inputs.sequence_tv,
        "max_kl": inputs.max_kl,
        "certified": masked_gain_lower_bound(
            context_masked_gain=masked,
            error_bound=error_bound,
            hit_probability=hit_mu,
            sequence_tv=inputs.sequence_tv,
        ),
    }


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(4)
    quiet = {"worlds": WORLDS, "vocabulary": V, "horizon": T, "share": np.ones(WORLDS), "kind": np.arange(WORLDS) % 3}
    pi, mu, rewards = trees.draw(rng, noise=np.full(WORLDS, 0.05), **quiet)
    # A few per cent of the contexts are corrupted: their logits are drawn afresh.
    broken = [
        jnp.where(jnp.asarray(rng.random((WORLDS, p.shape[1], 1))) < 0.04, jnp.asarray(rng.normal(size=p.shape)) * 2, p)
        for p in pi
    ]
    return jax.device_get(jax.jit(jax.vmap(measure))(broken, mu, rewards))


def test_worlds_have_contexts_outside(measured):
    assert np.mean(measured["hit_mu"] > 0) > 0.8
    assert np.all(measured["max_kl"] <= THRESHOLD)


def test_the_gain_is_never_below_the_certificate(measured):
    assert np.all(measured["gain"] >= measured["certified"] - 1e-12)
    # It comes near: the slack is a small part of the span on the worlds with few corrupted contexts.
    assert np.min(measured["gain"] - measured["certified"]) < 0.05


def test_hit_probability_under_the_trained_policy(measured):
    assert np.all(measured["hit_pi"] <= measured["hit_mu"] + measured["tv"] + 1e-12)
    assert np.any(measured["hit_pi"] > measured["hit_mu"])  # the TV term is needed


def test_without_the_hit_term_the_statement_is_wrong(measured):
    # Which is what the paper's guarantee for the masked estimator amounts to.
    for surrogate in ("context", "sequence"):
        unrepaired = measured[surrogate] - measured["bound"]
        assert np.mean(measured["gain"] < unrepaired) > 0.1


def test_masking_does_not_make_the_surrogate_a_better_estimate(measured):
    error = {k: np.mean(np.abs(measured["gain"] - measured[k])) for k in ("full", "context", "sequence")}
    assert error["full"] < error["context"]
    assert error["full"] < error["sequence"]


def test_context_mask_is_sequence_mask_plus_the_inside_tokens_of_sequences_that_hit(measured):
    difference = measured["context"] - measured["sequence"]
    np.testing.assert_allclose(difference, measured["difference"], atol=1e-12)
    assert np.abs(difference).max() > 1e-3
