"""The sentence encoder against golden vectors of sentence-transformers, and what its batches must not change."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxrl_llm.models.encoder import Encoder
from jaxrl_llm.models.encoder import EncoderConfig
from jaxrl_llm.models.encoder import mean_pooled
from jaxrl_llm.models.encoder import tiny_encoder
from jaxrl_llm.models.hf_io import SafetensorsFolder
from jaxrl_llm.models.sentences import SentenceEncoder
from jaxrl_llm.models.sentences import all_minilm_l6
from jaxrl_llm.models.sentences import build_encoder
from jaxrl_llm.models.sentences import encoder_config_from_hf
from jaxrl_llm.models.sentences import load_sentence_encoder
from jaxrl_llm.models.sentences import minilm_path
from tests.golden.texts import SENTENCES

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-6
"""Of the entries of unit vectors, whose root mean square is 0.051; 2.1e-7 was measured. Wrong models: above 1e-3."""
SHORT = [text for text in SENTENCES if len(text) < 60]
"""One or two widths: few programs to compile."""


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return all_minilm_l6()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "minilm_sentence_transformers.npz") as file:
        return dict(zip(SENTENCES, file["vectors"], strict=True))


def error(encoder: SentenceEncoder, golden: dict[str, np.ndarray], texts: list[str]) -> float:
    return float(np.abs(encoder.encode(texts, batch_size=4) - np.stack([golden[text] for text in texts])).max())


def test_token_ids_are_those_of_sentence_transformers(minilm: SentenceEncoder) -> None:
    expected = json.loads((GOLDEN / "minilm_ids.json").read_text(encoding="utf-8"))
    assert minilm.token_ids(list(expected)) == list(expected.values())
    assert max(len(row) for row in expected.values()) == minilm.max_length == 256


def test_vectors_are_those_of_sentence_transformers(minilm: SentenceEncoder, golden: dict[str, np.ndarray]) -> None:
    assert error(minilm, golden, list(SENTENCES)) < TOLERANCE
    assert np.std(np.stack(list(golden.values()))) > 0.05


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("encoder.layer.3.attention.self.query.weight", "encoder.layer.3.attention.self.key.weight"),
        ("encoder.layer.0.attention.output.LayerNorm.bias", "encoder.layer.0.output.LayerNorm.bias"),
        ("embeddings.LayerNorm.weight", "encoder.layer.5.output.LayerNorm.weight"),
    ],
)
def test_parity_sees_tensors_in_each_others_place(
    first: str, second: str, minilm: SentenceEncoder, golden: dict[str, np.ndarray]
) -> None:
    folder = SafetensorsFolder(minilm_path())
    tensors = {name: folder[name] for name in folder}
    tensors[first], tensors[second] = tensors[second], tensors[first]
    wrong = SentenceEncoder(build_encoder(minilm.model.config, tensors), minilm.backend, max_length=256)
    assert error(wrong, golden, SHORT[:8]) > 500 * TOLERANCE


def test_order_and_company_of_texts_change_nothing(minilm: SentenceEncoder) -> None:
    together = minilm.encode(SHORT, batch_size=4)
    # Other companions in the batch change the order of a sum at most.
    np.testing.assert_allclose(minilm.encode(SHORT[::-1], batch_size=4)[::-1], together, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-6)


def random_encoder(config: EncoderConfig) -> Encoder:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = leaf.shape[-1] ** -0.5 * rng.normal(size=leaf.shape)
        return jnp.asarray(noise + (len(leaf.shape) == 1), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


@jax.jit
def vectors(model: Encoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return mean_pooled(model(tokens, mask), mask)


def test_padding_does_not_reach_a_vector() -> None:
    model = random_encoder(tiny_encoder())
    tokens = jnp.array([[3, 9, 4, 7, 7, 7]])
    mask = jnp.array([[True, True, True, False, False, False]])
    padded = vectors(model, tokens, mask)
    alone = vectors(model, tokens[:, :3], mask[:, :3])
    np.testing.assert_allclose(padded, alone, atol=1e-6)
    seen = vectors(model, tokens, jnp.ones_like(mask))
    assert np.abs(seen - alone).max() > 1e-2


def test_a_row_without_tokens_gives_zero_and_no_nan() -> None:
    pooled = mean_pooled(jnp.ones((1, 3, 4)), jnp.zeros((1, 3), bool))
    np.testing.assert_array_equal(pooled, 0.0)


def test_what_cannot_be_read_is_said(minilm: SentenceEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hidden_act 'relu'; this encoder is for 'gelu'"):
        encoder_config_from_hf({"hidden_act": "relu"})
    with pytest.raises(ValueError, match=r"config.json lacks vocab_size"):
        encoder_config_from_hf({"model_type": "bert"})
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of num_heads, got 10 for 3 heads"):
        EncoderConfig(vocab_size=5, hidden_size=10, num_layers=1, num_heads=3, intermediate_size=8)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_sentence_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"tensors lacks embeddings.LayerNorm.bias"):
        build_encoder(tiny_encoder(), {})
    with pytest.raises(ValueError, match=r"max_length is 600; it must be 3 to 512"):
        SentenceEncoder(minilm.model, tokenizers.Tokenizer(tokenizers.models.WordPiece()), max_length=600)
    with pytest.raises(ValueError, match=r"batch_size is 0"):
        minilm.encode(["a"], batch_size=0)
