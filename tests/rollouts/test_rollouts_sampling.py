"""Sampling against plain transcriptions: log-probabilities, truncation sets, frequencies, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import rollout_keys
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.sampling import token_uniforms

SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.7),
    SamplingSettings(temperature=1.5, min_p=0.1),
    SamplingSettings(top_p=0.8),
    SamplingSettings(temperature=0.7, top_p=0.9, min_p=0.02),
    SamplingSettings(top_k=5),
    SamplingSettings(temperature=1.3, top_k=6, top_p=0.8, min_p=0.05),
]
VOCABULARIES = [7, 128, 300, 1000]


def plain_log_probs(logits: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    """Sort, accumulate, cut, renormalise; in float64, one row."""
    scaled = logits.astype(np.float64) / settings.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    keep = np.ones(p.shape, bool)
    if settings.top_k is not None:
        p = np.where(p >= np.sort(p)[-min(settings.top_k, p.size)], p, 0)
        p /= p.sum()
        keep &= p > 0
    if settings.min_p is not None:
        keep &= p >= settings.min_p * p.max()
    if settings.top_p is not None:
        order = np.argsort(-p, kind="stable")
        needed = int(np.searchsorted(np.cumsum(p[order]), settings.top_p)) + 1
        keep &= np.isin(np.arange(p.size), order[:needed])
    with np.errstate(divide="ignore"):
        return np.where(keep, np.log(p) - np.log(p[keep].sum()), -np.inf)


def uniform_grid(rows: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(3), (rows, 2), jnp.float32)


def draw(logits, uniforms, settings):
    return jax.jit(sample_tokens, static_argnames="settings")(logits.T, uniforms, settings=settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_recorded_log_prob_is_that_of_the_truncated_renormalised_softmax(vocabulary, settings):
    logits = 3 * jax.random.normal(jax.random.key(vocabulary), (64, vocabulary))
    tokens, log_prob = draw(logits, uniform_grid(64), settings)
    expected = [plain_log_probs(row, settings)[token] for row, token in zip(np.asarray(logits), tokens, strict=True)]
    np.testing.assert_allclose(log_prob, expected, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [12, 300])
def test_frequencies_are_the_probabilities(vocabulary, settings):
    draws = 40_000
    logits = 1.5 * jax.random.normal(jax.random.key(vocabulary), (1, vocabulary))
    uniforms = token_uniforms(jax.random.split(jax.random.key(1), draws), 0)
    tokens, _ = draw(jnp.broadcast_to(logits, (draws, vocabulary)), uniforms, settings)
    p = np.exp(plain_log_probs(np.asarray(logits[0]), settings))
    counts = np.bincount(tokens, minlength=vocabulary)
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    statistic = np.sum((counts[p > 0] - expected) ** 2 / expected)
    freedom = expected.size - 1
    # Chi-square has mean `freedom` and variance 2 `freedom`; the keys are fixed, so this is no lottery.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_a_uniform_number_moves_the_draw_through_the_cumulative_distribution():
    logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
    second = jnp.linspace(0, 1, 400, endpoint=False)
    uniforms = jnp.stack([jnp.zeros_like(second), second], axis=1)
    tokens, _ = draw(jnp.broadcast_to(logits, (400, 3)), uniforms, SamplingSettings())
    np.testing.assert_array_equal(tokens, np.repeat([0, 1, 2], [100, 200, 100]))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_extreme_uniform_numbers_never_draw_the_impossible(vocabulary):
    logits = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.1, (32, vocabulary)), 0.0, -jnp.inf)
    logits = logits.at[:, vocabulary // 2].set(0.0)
    for first in (0.0, 1 - 2**-24):
        for second in (0.0, 1 - 2**-24):
            uniforms = jnp.broadcast_to(jnp.array([first, second], jnp.float32), (32, 2))
            tokens, log_prob = draw(logits, uniforms, SamplingSettings())
            assert jnp.all(jnp.take_along_axis(logits, tokens[:, None], axis=1) == 0)
            np.testing.assert_allclose(log_prob, -np.log(np.sum(np.isfinite(logits), axis=1)), rtol=1e-6)


def test_rare_tokens_in_rare_blocks_are_drawn_as_often_as_they_should():
    # One token of probability 1e-4 in each of 10 blocks, half of it in either of two entries: two levels of inversion.
    logits = np.full((1, 256 * 11), -np.inf, np.float32)
    logits[0, 0] = np.log(1 - 1e-3)
    logits[0, 256 * np.arange(1, 11)] = np.log(0.5e-4)
    logits[0, 256 * np.arange(1, 11) + 255] = np.log(0.5e-4)
    draws = 400_000
    uniforms = token_uniforms(jax.random.split(jax.random.key(2), draws), 5)
    tokens = jax.lax.map(
        lambda u: sample_tokens(jnp.broadcast_to(logits.T, (logits.size, 1000)), u, SamplingSettings())[0],
        uniforms.reshape(-1, 1000, 2),
    )
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=logits.size)[np.isfinite(logits[0])][1:]
    expected = 0.5e-4 * draws
    assert np.sum((counts - expected) ** 2 / expected) < 19 + 4 * np.sqrt(2 * 19)


def test_ties_at_the_edge_of_the_nucleus_are_all_kept():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    tokens, log_prob = draw(jnp.broadcast_to(logits, (200, 4)), uniform_grid(200), SamplingSettings(top_p=0.5))
    assert set(np.asarray(tokens)) == {0, 1, 2, 3}
    np.testing.assert_allclose(log_prob, np.log([0.4, 0.2, 0.2, 0.2])[tokens], atol=1e-6)


def law(logits, settings, draws=400):
    """Probabilities by token id of those that are ever drawn, each as it was recorded."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    tokens, log_prob = draw(rows, uniform_grid(draws), settings)
    return {int(token): round(float(np.exp(value)), 5) for token, value in zip(tokens, log_prob, strict=True)}


def test_ties_with_the_last_of_top_k_are_all_kept():
    logits = np.log([0.1, 0.4, 0.2, 0.2, 0.1])
    assert law(logits, SamplingSettings(top_k=1)) == {1: 1.0}
    assert (
        law(logits, SamplingSettings(top_k=2)) == law(logits, SamplingSettings(top_k=3)) == {1: 0.5, 2: 0.25, 3: 0.25}
    )
    assert law(logits, SamplingSettings(top_k=4)) == law(logits, SamplingSettings())


def test_the_nucleus_is_that_of_the_renormalised_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the whole softmax 0.55 takes two tokens; of 4/7 and 3/7, what top_k = 2 leaves, one.
    assert law(logits, SamplingSettings(top_p=0.55)) == {0: 0.57143, 1: 0.42857}
    assert law(logits, SamplingSettings(top_k=2, top_p=0.55)) == {0: 1.0}
    assert law(logits, SamplingSettings(top_k=2, min_p=0.5)) == {0: 0.57143, 1: 0.42857}
    assert law(logits, SamplingSettings(top_k=3, min_p=0.6)) == {0: 0.57143, 1: 0.42857}


def test_a_top_k_of_the_whole_vocabulary_is_none():
    logits = jax.random.normal(jax.random.key(0), (64, 300)).at[:, 5].set(-jnp.inf)
    whole = draw(logits, uniform_grid(64), SamplingSettings(temperature=0.7))
    for top_k in (300, 301, 10**9, 299):  # of 299 possible tokens
        for found, expected in zip(
            draw(logits, uniform_grid(64), SamplingSettings(temperature=0.7, top_k=top_k)), whole, strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    few = jnp.where(jnp.arange(300) % 100 == 7, 0.0, -jnp.inf)  # three possible tokens, of which top_k wants ten
    tokens, log_prob = draw(jnp.broadcast_to(few, (64, 300)), uniform_grid(64), SamplingSettings(top_k=10, top_p=0.99))
    assert set(np.asarray(tokens)) == {7, 107, 207}
    np.testing.assert_allclose(log_prob, -np.log(3), rtol=1e-6)


def test_what_counts_as_truncated():
    for settings in (SamplingSettings(), SamplingSettings(temperature=0.5, top_p=1.0, min_p=0.0)):
        assert not settings.truncated
    for settings in (SamplingSettings(top_k=3), SamplingSettings(top_p=0.9), SamplingSettings(min_p=0.1)):
        assert settings.truncated


@pytest.mark.parametrize(
    "settings", [SamplingSettings(top_p=1e-6), SamplingSettings(min_p=1.0), SamplingSettings(top_k=1)], ids=str
)
def test_the_tightest_truncation_is_greedy(settings):
    logits = jax.random.normal(jax.random.key(0), (16, 300))
    tokens, log_prob = draw(logits, uniform_grid(16), settings)
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=1))
    np.testing.assert_allclose(log_prob, 0, atol=1e-6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_greedy_takes_the_first_maximum_and_is_certain(vocabulary):
    logits = jnp.round(2 * jax.random.normal(jax.random.key(0), (64, vocabulary)))  # rounding makes ties
    tokens, log_prob = draw(logits, uniform_grid(64), SamplingSettings(temperature=0))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))
    np.testing.assert_array_equal(log_prob, 0)


def test_float64_logits_keep_their_precision():
    with jax.enable_x64(True):
        logits = 3 * jax.random.normal(jax.random.key(0), (32, 300), jnp.float64)
        settings = SamplingSettings(temperature=0.7, top_p=0.9)
        tokens, log_prob = sample_tokens(logits.T, uniform_grid(32), settings)
        assert log_prob.dtype == jnp.float64
        expected = [
            plain_log_probs(row, settings)[token] for row, token in zip(np.asarray(logits), tokens, strict=True)
        ]
        np.testing.assert_allclose(log_prob, expected, atol=1e-12)


def test_keys_are_folded_per_step_prompt_and_sample():
    key = jax.random.key(11)
    keys = rollout_keys(key, 3, jnp.array([5, 2]), jnp.array([0, 7, 1]))
    assert keys.shape == (2, 3)
    for n, prompt in enumerate((5, 2)):
        for s, sample in enumerate((0, 7, 1)):
            one = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 3), prompt), sample)
            np.testing.assert_array_equal(jax.random.key_data(keys[n, s]), jax.random.key_data(one))
            expected = jax.random.uniform(jax.random.fold_in(one, 9), (2,))
            np.testing.assert_array_equal(token_uniforms(keys.reshape(-1), 9)[3 * n + s], expected)
    everything = jax.random.key_data(rollout_keys(key, 0, jnp.arange(16), jnp.arange(8))).reshape(128, -1)
    assert len({tuple(row) for row in np.asarray(everything)}) == 128


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-300),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_k", True),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        SamplingSettings(**{field: value})


def test_greedy_takes_no_truncation():
    with pytest.raises(ValueError, match="temperature 0 is greedy"):
        SamplingSettings(temperature=0, top_p=0.9)
    with pytest.raises(ValueError, match="top_k, top_p and min_p must be None"):
        SamplingSettings(temperature=0, top_k=3)


@pytest.mark.parametrize("settings", [*SETTINGS, SamplingSettings(temperature=0)], ids=str)
def test_logits_that_are_no_distribution_show_in_the_log_prob(settings):
    good = jnp.linspace(0.0, 3.0, 300)
    rows = [good, good.at[7].set(jnp.nan), jnp.full(300, jnp.nan), jnp.full(300, -jnp.inf), good.at[7].set(jnp.inf)]
    tokens, log_prob = draw(jnp.stack([*rows, good.at[:299].set(-jnp.inf)]), uniform_grid(6), settings)
    np.testing.assert_array_equal(np.isnan(log_prob), [False, True, True, True, True, False])
    assert log_prob[5] == 0  # one token alone is certain
    assert tokens[5] == 299


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_logits_of_a_narrow_type_are_refused_by_name(dtype):
    for settings in (SamplingSettings(), SamplingSettings(temperature=0), SamplingSettings(top_k=2)):
        with pytest.raises(TypeError, match=f"logits must be in float32 or wider, got {jnp.dtype(dtype)}"):
            sample_tokens(jnp.zeros((9, 4), dtype), jnp.zeros((4, 2)), settings)
