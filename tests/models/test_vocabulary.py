"""Ids without a text: cropped where they are padding, refused where they are not."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import byte_alphabet
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.vocabulary import crop_vocabulary
from jaxrl_llm.models.vocabulary import require_texts
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.models.weights import save_hf

SIZE, ROWS = 259, 320
TOKENS = jnp.array([[3, 258, 17, 90], [255, 0, 256, 1]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def padded(request: pytest.FixtureRequest, random_transformer) -> Transformer:
    """A byte model whose vocabulary is padded to a multiple of 64; the padding has as much probability as the rest."""
    return random_transformer(tiny(vocab_size=ROWS, num_layers=1, tie_embeddings=request.param))


def hidden_of(model: Transformer) -> np.ndarray:
    return np.asarray(model(TOKENS))


def log_probs_of(model: Transformer) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(model.logits(model(TOKENS)).astype(jnp.float32)))


def test_a_cropped_model_is_the_whole_one_renormalised(padded: Transformer) -> None:
    whole = log_probs_of(padded)
    before = jax.tree.map(np.asarray, nnx.state(padded))
    cropped = crop_vocabulary(padded, SIZE)
    np.testing.assert_array_equal(hidden_of(cropped), hidden_of(padded))
    inside = np.log(np.exp(whole[..., :SIZE].astype(np.float64)).sum(axis=-1, keepdims=True))
    assert inside.max() < -0.05  # the padding had probability, or nothing is tested
    found = log_probs_of(cropped)
    assert found.shape == (*TOKENS.shape, SIZE)
    np.testing.assert_allclose(found, whole[..., :SIZE] - inside, atol=2e-5)
    assert np.abs(found - (whole[..., :SIZE] + inside)).min() > 0.05
    assert cropped.config.vocab_size == SIZE
    assert num_parameters(cropped.config) == sum(x.size for x in jax.tree.leaves(nnx.state(cropped)))
    # The given model is as it was, and its other arrays are not copied.
    assert padded.config.vocab_size == ROWS
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(padded)))
    assert cropped.layers[0].mlp.up.kernel.get_value() is padded.layers[0].mlp.up.kernel.get_value()


def test_nothing_to_crop_and_impossible_sizes(padded: Transformer) -> None:
    assert crop_vocabulary(padded, ROWS) is padded
    for size in (0, ROWS + 1):
        with pytest.raises(ValueError, match=rf"size is {size}; it must be 1 \.\. {ROWS}"):
            crop_vocabulary(padded, size)


def test_adapters_stay(padded: Transformer) -> None:
    cropped = crop_vocabulary(add_lora(padded, LoraSettings(rank=2), rngs=nnx.Rngs(0)), SIZE)
    assert cropped.layers[0].attention.query.low_rank is not None
    np.testing.assert_array_equal(hidden_of(cropped), hidden_of(padded))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_padded_checkpoint_is_read_without_its_padding_and_written_so(
    kind: str, padded: Transformer, tmp_path: Path
) -> None:
    def through(model: Transformer, path: Path) -> tuple[Transformer, Tokenizer]:
        save = save_hf if kind == "folder" else save_gguf
        save(model, path, tokenizer=ByteTokenizer())
        return load_pretrained(path)

    loaded, tokenizer = through(padded, tmp_path / "padded.gguf")
    assert loaded.config == crop_vocabulary(padded, SIZE).config
    require_texts(tokenizer, loaded.config.vocab_size)
    expected = log_probs_of(crop_vocabulary(padded, SIZE))
    np.testing.assert_array_equal(log_probs_of(loaded), expected)
    again, _ = through(loaded, tmp_path / "again.gguf")
    assert again.config == loaded.config
    np.testing.assert_array_equal(log_probs_of(again), expected)


def test_every_id_of_bytes_has_a_text() -> None:
    tokenizer = ByteTokenizer(specials=["<a>"])
    require_texts(tokenizer, tokenizer.vocab_size)


def test_padding_and_holes_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"320 rows and the tokenizer 259 ids.* other 61.*crop_vocabulary\(model, 259\)"
    ):
        require_texts(ByteTokenizer(), ROWS)
    # Bytes, and an end token behind two ids that nothing stands for.
    tokens = [*byte_alphabet(), "[PAD256]", "[PAD257]", "<eos>"]
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * 256 + [5, 5, 3]}
    metadata |= {"merges": ["<eos> <eos>"], "eos_token_id": 258}
    holes = Tokenizer.from_gguf_metadata({f"tokenizer.ggml.{name}": value for name, value in metadata.items()})
    with pytest.raises(ValueError, match="no text for 2 of the model's 259 ids, the first of them 256, between others"):
        require_texts(holes, SIZE)
