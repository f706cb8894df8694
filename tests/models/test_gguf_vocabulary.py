"""Vocabularies in GGUF files that are silent or wrong about themselves, read as llama.cpp reads them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.blueprint import tensor_shapes
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.gguf_io import write_gguf
from jaxrl_llm.models.gguf_tokenizer import placeholder_metadata
from jaxrl_llm.models.gguf_vocabulary import ALWAYS_SHOWN
from jaxrl_llm.models.gguf_vocabulary import ENDS
from jaxrl_llm.models.gguf_vocabulary import PARTS_OF_FILES
from jaxrl_llm.models.gguf_vocabulary import PRE_TOKENIZERS
from jaxrl_llm.models.gguf_vocabulary import ending_ids
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import byte_alphabet
from jaxrl_llm.models.weights import load_gguf
from tests.golden.texts import TEXTS
from tests.models.llama_cpp_reader import reader_of

START, END = "<|start_of_it|>", "<|end_of_it|>"
PIECES = ["he", "ll", "hell", "hello", "Ġt", "Ġa", "12", "34", "==", "Ġ=", "ĊĊ", "[PAD7]"]
MERGES = ["h e", "l l", "he ll", "Ġ t", "Ġ a", "1 2", "3 4", "= =", "Ġ =", "Ċ Ċ"]
PROBES = [
    *TEXTS,
    "hello hello== 1234567 don't DON'T",
    "a\n\n \n  b\t\tc   ",
    "cafe\u0301 \u1100\u1161 ½٣٤٥ 12345",
    "`~^|<=>+$ ...!?",
    "hello<|im_end|>hello" + END + "<|user|>[PAD7]",
    "",
]
"""Texts whose pieces differ between splitters, normalisers and kinds of tokens."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))


def metadata_of(extra: list[str] = (), **changes: Any) -> dict[str, Any]:  # pyright: ignore[reportArgumentType]
    """Bytes, a few merges, and special tokens that are all typed as normal ones; None removes an entry."""
    tokens = [*byte_alphabet(), *PIECES, START, END, *extra]
    entries = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": MERGES,
        "bos_token_id": tokens.index(START),
        "eos_token_id": tokens.index(END),
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items() if value is not None}


def write(path: Path, metadata: dict[str, Any], **config: Any) -> Path:
    """A tiny model with random weights and this vocabulary."""
    settings = tiny(vocab_size=len(metadata["tokenizer.ggml.tokens"]), **config)
    random = np.random.default_rng(0)
    tensors = {
        name: (random.normal(size=shape) * shape[-1] ** -0.5 + (len(shape) == 1)).astype(np.float32)
        for name, shape in tensor_shapes(settings).items()
    }
    write_gguf(path, settings, tensors, dtype="F32", metadata=metadata)
    return path


def typed(metadata: dict[str, Any], **kinds: int) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    given = {**dict.fromkeys(tokens, 1), START: 3, END: 3, **kinds}
    return {**metadata, "tokenizer.ggml.token_type": [given[token] for token in tokens]}


CASES = {
    "no pre-tokenizer": metadata_of(pre=None),
    "the default one by name": metadata_of(pre="default"),
    "an empty name": metadata_of(pre=""),
    "no kinds": metadata_of(["<|im_end|>"], token_type=None),
    "llama-bpe without add_bos": metadata_of(pre="llama-bpe"),
    "llama-bpe without add_bos and bos": metadata_of(pre="llama-bpe", bos_token_id=None),
    "llama-bpe that says no": metadata_of(pre="llama-bpe", add_bos_token=False),
    "gpt-2 that says yes": metadata_of(add_bos_token=True),
    "an end token behind": metadata_of(add_bos_token=True, add_eos_token=True),
    "control tokens typed as normal": metadata_of(["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|user|>"]),
    "control tokens typed as such": typed(metadata_of(["<|im_end|>", "<|user|>"]), **{"<|user|>": 3}),
    "an unused token": typed(metadata_of(), **{"[PAD7]": 5}),
    "an unused token that merges make": typed(metadata_of(), hell=5),
    "an unknown token": typed(metadata_of(["<|user|>"]), **{"<|user|>": 2}),
    "a user's token": typed(metadata_of(["<|user|>"]), **{"<|user|>": 4}),
    "a token with an empty text": metadata_of([""]),
    "merges twice and with spaces": metadata_of(merges=[*MERGES, "l l", "h e"]),
    "tokens of code models": metadata_of([name for names in PARTS_OF_FILES.values() for name in names[:1]]),
    "tokens of code models with ids": metadata_of(["<|fim_pad|>", "<|user|>"], fim_pad_token_id=len(byte_alphabet())),
    "eot and eom": metadata_of(["<|user|>"], eot_token_id=3, eom_token_id=5),
    "tokens of harmony": metadata_of(["<|return|>", "<|call|>", "<|end|>", *sorted(ALWAYS_SHOWN)]),
    "tokens of solar": metadata_of(["<|flush|>", "<|calls|>", "<|end|>"]),
    "tokens of gemma": metadata_of(["</s>", "<|tool_response>"]),
    "every name of an end": metadata_of(sorted(ENDS - {"<|end|>", "</s>"})),
    "two more": metadata_of(["<|end|>", "</s>", "<|return|>"]),
    **{f"named {name}": metadata_of(pre=name) for name in PRE_TOKENIZERS},
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_ends_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    metadata = CASES[name]
    path = write(tmp_path / "it.gguf", metadata)
    tokenizer = Tokenizer.from_gguf(path)
    tokens = metadata["tokenizer.ggml.tokens"]
    probes = [*PROBES, "".join(f"a{token}" for token in tokens[256 + len(PIECES) :])]
    with reader_of(path) as reader:
        for text in probes:
            assert tokenizer.encode(text) == reader.ids(text), text
        assert tokenizer.encode("hello", add_special_tokens=False) == reader.ids("hello", add_special=False)
        suspects = sorted({*range(256, len(tokens)), 3, 5})
        ends = {token for token in suspects if reader.ends_at(token)}
    assert set(tokenizer.eos_ids) == ends
    assert tokenizer.eos_id == metadata["tokenizer.ggml.eos_token_id"]


def test_the_cases_see_wrong_readings(tmp_path: Path) -> None:
    """Each of the old readings gives other ids or other ends on some probe."""
    silent = Tokenizer.from_gguf_metadata(metadata_of(pre=None))
    gpt2 = Tokenizer.from_gguf_metadata(metadata_of())
    assert any(silent.encode(text) != gpt2.encode(text) for text in PROBES)
    starts = Tokenizer.from_gguf_metadata(metadata_of(pre="llama-bpe"))
    assert starts.encode("a") == [starts.bos_id, *gpt2.encode("a")]
    names = Tokenizer.from_gguf_metadata(metadata_of(["<|im_end|>"]))
    assert names.encode("<|im_end|>") == [names.eos_ids[1]]
    assert len(gpt2.encode("<|im_end|>")) > 1


def test_ends_of_a_file_reach_the_model_and_the_next_file(tmp_path: Path) -> None:
    """Through the conversion in the cache, and through a GGUF file written from what was read."""
    metadata = metadata_of(["<|im_end|>", "<|user|>"], eot_token_id=3, eom_token_id=5)
    path = write(tmp_path / "it.gguf", metadata)
    expected = Tokenizer.from_gguf(path).eos_ids
    model, tokenizer = load_pretrained(path)
    assert tokenizer.eos_ids == expected
    assert len(expected) == 4
    again = tokenizer.gguf_metadata(vocab_size=model.config.vocab_size)
    assert set(Tokenizer.from_gguf_metadata(again).eos_ids) == set(expected)
    with reader_of(write(tmp_path / "again.gguf", again)) as reader:
        assert all(reader.ends_at(token) for token in expected)


@pytest.mark.parametrize("count", [1, 3, 4, 9, 18])
def test_placeholders_end_at_every_token_that_ends(count: int, tmp_path: Path) -> None:
    ends = tuple(range(5, 5 + 2 * count, 2))
    path = write(tmp_path / "it.gguf", placeholder_metadata(vocab_size=64, end_ids=ends))
    with reader_of(path) as reader:
        assert all(map(reader.ends_at, ends))
        assert not any(map(reader.ends_at, (0, 4, 6, 44)))
    assert set(ending_ids(GGUFFile(path).metadata, GGUFFile(path).metadata["tokenizer.ggml.tokens"])) == set(ends)


def test_more_ends_than_a_placeholder_can_name() -> None:
    with pytest.raises(ValueError, match="can name one to 3 end tokens by their ids, and 15 more by their texts"):
        placeholder_metadata(vocab_size=64, end_ids=tuple(range(19)))


def test_more_ends_than_a_file_can_name() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(metadata_of())
    several = Tokenizer(tokenizer.backend, eos_id=tokenizer.eos_id, eos_ids=(3, 4, 5))
    with pytest.raises(ValueError, match=r"ends at .*; a GGUF file can name three tokens"):
        several.gguf_metadata(vocab_size=several.vocab_size)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": None}, "has no list of tokens"),
        ({"tokens": ["a", "a"]}, "has the token 'a' twice"),
        ({"tokens": [1, 2]}, "has no list of tokens"),
        ({"token_type": [1]}, "and not as many tokenizer.ggml.token_type"),
        ({"token_type": "normal"}, "and not as many tokenizer.ggml.token_type"),
        ({"merges": None}, "has no list of merges"),
        ({"merges": ["h x"]}, "merges 'h x', but 'hx' is none of its tokens"),
        ({"merges": ["hx"]}, "merges 'hx', but '' is none of its tokens"),
        ({"bos_token_id": 9999, "add_bos_token": True}, "bos_token_id is 9999; its tokens are 0 to"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eot_token_id": 9999}, "eot_token_id is 9999"),
        ({"add_bos_token": 1}, "add_bos_token is 1; expected true or false"),
        ({"add_sep_token": True}, "puts a separator behind every text"),
        ({"pre": 3}, "splits words by 3"),
        ({"pre": "tekken"}, "splits words by 'tekken'"),
        ({"model": ["gpt2"]}, "is of the kind"),
    ],
)
def test_vocabularies_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelFileError, match=sentence):
        Tokenizer.from_gguf_metadata(metadata_of(**changes))


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 1.0},
        {"rope.scaling.type": "linear"},
        {"rope.scale_linear": 1.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0, "rope.scale_linear": 8.0},
        {"rope.freq_base": None},
        {"attention.head_count_kv": None, "num_kv_heads": 4},
        {"rope.dimension_count": None, "attention.key_length": None, "attention.value_length": None},
    ],
)
def test_absent_entries_mean_to_the_model_what_they_mean_to_llama_cpp(
    scaling: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {name: value for name, value in scaling.items() if "." not in name}
    changes = {f"llama.{name}": value for name, value in scaling.items() if "." in name}
    path = write(tmp_path / "whole.gguf", metadata_of(), **config)
    rewritten(path, changes, monkeypatch)
    model = load_gguf(path)
    prompt = [104, 101, 256, 30, 7]
    with reader_of(path) as reader:
        theirs = reader.log_probs(prompt, model.config.vocab_size)
    ours = jax.nn.log_softmax(model.logits(model(jnp.asarray([prompt])))[0, -1])
    seen = np.isfinite(theirs)
    assert seen.sum() > 100
    np.testing.assert_allclose(np.asarray(ours)[seen], theirs[seen], atol=2e-4)


def rewritten(path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the same file with some entries changed, or left out where None."""
    import jaxrl_llm.models.gguf_io as gguf_io

    file, plain = GGUFFile(path), gguf_io._entries
    monkeypatch.setattr(
        gguf_io,
        "_entries",
        lambda *arguments: {
            name: value for name, value in {**plain(*arguments), **changes}.items() if value is not None
        },
    )
    tensors = {name: np.array(file[name]) for name in file}
    tokens = {name: value for name, value in file.metadata.items() if name.startswith("tokenizer.")}
    gguf_io.write_gguf(path, file.config, tensors, dtype="F32", metadata=tokens)
    monkeypatch.undo()
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(path.parent / "cache"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"llama.rope.scaling.factor": 2.0}, r"scales rotary positions \(linear\) by 2"),
        ({"llama.rope.scale_linear": 2.0}, r"scales rotary positions \(linear\) by 2"),
        ({"llama.rope.scaling.type": "longrope"}, r"scales rotary positions \(longrope\)"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 elements"),
        ({"llama.attention.value_length": 16}, "has values of 16 of 8 elements"),
        ({"llama.attention.scale": 0.5}, r"sets llama\.attention\.scale to 0\.5"),
        ({"llama.attention.causal": False}, "attends to later tokens"),
        ({"llama.vocab_size": 5}, "says vocab_size is 5; token_embd.weight has"),
        ({"split.count": 2, "split.no": 0}, "is part 1 of 2; join the parts"),
        ({"split.count": 3, "split.no": 2}, "is part 3 of 3; join the parts"),
        ({"llama.block_count": 50_000}, "is to have 50000 layers"),
        ({"llama.attention.head_count": 0}, "has 0 heads for 32 channels"),
        ({"llama.attention.head_count": "4"}, "head_count is '4'; expected a whole number"),
        ({"llama.attention.head_count": [4, 2]}, r"head_count is \[4, 2\]; expected a whole number for all layers"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base is nan; expected a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, r"norm_eps must be positive, got -1\.0"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks the entry llama.attention.layer_norm_rms_epsilon"),
        ({"llama.context_length": 0}, "max_positions must be a positive integer, got 0"),
        ({"llama.feed_forward_length": 63}, "has tensors that do not fit the model"),
    ],
)
def test_configurations_that_are_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "it.gguf", metadata_of())
    rewritten(path, changes, monkeypatch)
    with pytest.raises(ModelFileError, match=sentence):
        load_gguf(path)
