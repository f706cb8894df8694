"""The rule of speculative decoding in float64: the law of a round is the model's, by enumeration of its outcomes."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.categorical import total_variation
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import drawing_log_probs
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.speculative import acceptance
from jaxrl_llm.rollouts.speculative import judged
from jaxrl_llm.rollouts.speculative import overlap
from jaxrl_llm.rollouts.speculative import residual_log_probs
from jaxrl_llm.rollouts.speculative import tokens_per_step

LAWS = {
    "partly above": ((2, 6, 4), (6, 3, 3)),
    "one token never drawn by the model": ((6, 6, 0), (6, 3, 3)),
    "one token never drafted": ((3, 3, 6), (6, 6, 0)),
    "equal": ((6, 3, 3), (6, 3, 3)),
    "nothing in common": ((0, 0, 12), (6, 6, 0)),
}
"""Twelfths of p and q. All probabilities of keeping and all steps of the residual laws are multiples of 1/12."""
GRID = (np.arange(12) + 0.5) / 12
"""One uniform number for each of those steps."""


@pytest.fixture(autouse=True)
def samplers_may_promote() -> Iterator[None]:
    """The strict rules are those of the mathematics below them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def logs(twelfths) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(twelfths, np.float64) / 12)


@pytest.mark.parametrize("name", LAWS)
def test_a_token_has_the_law_of_the_model(name: str) -> None:
    """q(v) a(v) + (1 - sum q a) r(v) = p(v), and a rule with any part of it changed is another law."""
    log_p, log_q = (logs(law) for law in LAWS[name])
    p, q, kept = np.exp(log_p), np.exp(log_q), np.asarray(acceptance(log_p, log_q))
    left = np.exp(np.asarray(residual_log_probs(log_p, log_q)))
    law = q * kept + (1 - q @ kept) * left / left.sum()
    np.testing.assert_allclose(law, p, atol=1e-15)
    np.testing.assert_allclose(overlap(log_p, log_q), q @ kept, atol=1e-15)
    np.testing.assert_allclose(
        overlap(log_p, log_q), 1 - total_variation(jnp.asarray(log_p), jnp.asarray(log_q)), atol=1e-15
    )
    if name == "partly above":
        assert abs(q * kept + (1 - q @ kept) * p - p).max() > 0.05
        swapped = np.asarray(acceptance(log_q, log_p))
        assert abs(q * swapped + (1 - q @ swapped) * left / left.sum() - p).max() > 0.05


def test_a_round_has_the_law_of_the_model() -> None:
    """Two drafts, every outcome of both and of the uniform numbers, the laws of each place other ones for each past.

    Of the rounds that made a token after a given past, the part that made v there is p(v | past), exactly.
    """
    names = list(LAWS)

    def laws(*past: int) -> tuple[np.ndarray, np.ndarray]:
        p, q = LAWS[names[(sum((place + 1) * token for place, token in enumerate(past)) + 2 * len(past)) % len(names)]]
        return logs(p), logs(q)

    tokens = range(3)
    rows, columns_p, columns_q, weights = [], [], [], []
    for first, second in itertools.product(tokens, tokens):
        (p0, q0), (p1, q1), (p2, _) = laws(), laws(first), laws(first, second)
        weight = np.exp(q0[first] + q1[second])
        if weight > 0:
            rows.append((first, second))
            columns_p.append(np.stack([p0, p1, p2], axis=1))
            columns_q.append(np.stack([q0, q1], axis=1))
            weights.append(weight)
    numbers = np.stack(np.meshgrid(GRID, GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 3)
    judge_first, judge_second, draw = (numbers[:, column] for column in range(3))
    uniforms = np.stack([np.stack([u, draw, draw], -1) for u in (judge_first, judge_second, 0 * draw)], axis=1)
    count = len(numbers)
    made, kept = judged(
        jnp.asarray(np.repeat(np.stack(columns_p, axis=1), count, axis=1)),
        jnp.asarray(np.repeat(np.stack(columns_q, axis=1), count, axis=1)),
        jnp.asarray(np.repeat(np.array(rows, np.int32), count, axis=0)),
        jnp.asarray(np.tile(uniforms, (len(rows), 1, 1))),
    )
    made, kept, weight = np.asarray(made), np.asarray(kept), np.repeat(weights, count) / count
    assert set(kept) == {0, 1, 2}
    np.testing.assert_allclose(weight.sum(), 1)
    looked_at = 0
    for length in range(3):
        for past in itertools.product(tokens, repeat=length):
            there = (kept >= length) & (made[:, :length] == past).all(axis=1)
            if weight[there].sum() > 0:
                law = np.bincount(made[there, length], weight[there], minlength=3) / weight[there].sum()
                np.testing.assert_allclose(law, np.exp(laws(*past)[0]), atol=1e-12)
                looked_at += 1
    assert looked_at > 5


def test_an_equal_draft_is_always_kept_and_a_broken_one_never() -> None:
    """Whatever the uniform number; and NaN of a draft leaves the model's law as it is."""
    log_p = logs((6, 3, 3))
    np.testing.assert_array_equal(acceptance(log_p, log_p), 1)
    broken = np.full(3, np.nan)
    assert not np.any(np.zeros(3) < acceptance(log_p, broken))
    np.testing.assert_array_equal(residual_log_probs(log_p, broken), np.log(np.exp(log_p)))
    np.testing.assert_array_equal(acceptance(np.array([-np.inf, -1.0]), np.array([-np.inf, -np.inf])), [0, 1])
    np.testing.assert_array_equal(residual_log_probs(log_p, log_p), log_p)


def test_tokens_per_step() -> None:
    """(1 - a^(k + 1)) / (1 - a), also where a is 1."""
    rate = np.array([0.0, 0.3, 0.9, 1.0])
    expected = [1, *((1 - a**5) / (1 - a) for a in rate[1:3]), 5]
    np.testing.assert_allclose(tokens_per_step(rate, 4), expected, atol=1e-14)
    with pytest.raises(ValueError, match="drafts is 0; it must be at least 1"):
        tokens_per_step(rate, 0)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=0),
        SamplingSettings(temperature=0.7),
        SamplingSettings(temperature=1.3, top_k=40, top_p=0.8, min_p=0.02),
    ],
)
def test_the_law_that_is_drawn_from(settings: SamplingSettings) -> None:
    """It is a law, what is drawn has its log-probability, and what is left out has none."""
    logits = 3 * jnp.asarray(np.random.default_rng(0).normal(size=(300, 64)))
    law = drawing_log_probs(logits, settings)
    np.testing.assert_allclose(jnp.sum(jnp.exp(law), axis=0), 1, atol=1e-12)
    drawn, log_probs = sample_tokens(logits, np.random.default_rng(1).random((64, 2), np.float32), settings)
    np.testing.assert_allclose(jnp.take_along_axis(law, drawn[None], axis=0)[0], log_probs, atol=1e-12)
    if not settings.truncated:
        expected = 1 if settings.greedy else 300
        np.testing.assert_array_equal(jnp.sum(jnp.isfinite(law), axis=0), expected)
        return
    assert settings.min_p is not None
    assert settings.top_p is not None
    p = np.exp(np.asarray(logits / settings.temperature) - np.asarray(logits.max(axis=0)) / settings.temperature)
    ordered = np.sort(p, axis=0)[::-1][:40]
    edge = np.take_along_axis(
        ordered, np.argmax(np.cumsum(ordered, axis=0) >= settings.top_p * ordered.sum(axis=0), axis=0)[None], axis=0
    )
    kept = p >= np.maximum(edge, settings.min_p) * (1 - 1e-12)
    np.testing.assert_array_equal(np.isfinite(law), kept)
    assert len(set(kept.sum(axis=0))) > 5


def test_laws_of_logits_that_are_none() -> None:
    """NaN everywhere, as `sample_tokens` records it."""
    for bad in ([1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]):
        for settings in (SamplingSettings(), SamplingSettings(temperature=0), SamplingSettings(top_p=0.5)):
            assert np.isnan(drawing_log_probs(jnp.asarray(bad)[:, None], settings)).all()
