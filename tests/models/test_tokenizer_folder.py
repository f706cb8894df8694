"""Tokenizers of folders: what stands beside tokenizer.json counts, and what would hide or inflate texts does not."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import normalizers
from tokenizers import processors

from jaxrl_llm.models.files import MissingModelFileError
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.tokenizer_folder import FILE_LIMIT
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import byte_alphabet

TEXT = "a long text of many letters, longer than the limit " * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ByteTokenizer().save(tmp_path)
    return tmp_path


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def saved(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


def backend_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_truncation_and_padding_that_were_saved_do_not_act(folder: Path) -> None:
    backend = backend_of(folder)
    backend.enable_truncation(8)
    backend.enable_padding(length=300, pad_id=256, pad_token="<|pad|>")
    saved(folder, backend)
    assert len(backend_of(folder).encode(TEXT).ids) == 300
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    # Nor do they come back with what is saved.
    tokenizer.save(folder)
    assert backend_of(folder).encode(TEXT).ids == list(TEXT.encode())


def test_tokens_listed_in_the_configuration_only_are_tokens(folder: Path) -> None:
    listed = {
        "259": {"content": "<think>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
        "260": {"content": "<|im_end|>", "special": True},
        "258": {"content": "<|eos|>", "special": True},
    }
    change(folder / "tokenizer_config.json", added_tokens_decoder=listed, eos_token="<|im_end|>")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a<think>b<|im_end|>") == [97, 259, 98, 260]
    assert tokenizer.eos_ids == (260, 258)
    assert tokenizer.decode([97, 259, 260]) == "a<think>"
    assert tokenizer.vocab_size == 261
    tokenizer.save(folder)
    assert Tokenizer.from_folder(folder).encode("a<think>b<|im_end|>") == [97, 259, 98, 260]


def test_tokens_of_the_older_file_are_tokens(folder: Path) -> None:
    change(folder / "added_tokens.json", **{"<b>": 260, "<a>": 259})
    assert Tokenizer.from_folder(folder).encode("<a><b>") == [259, 260]


def test_a_listed_token_of_the_vocabulary_is_found_in_texts(folder: Path) -> None:
    """It is in the model's vocabulary already, where no merge leads to it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    names = ("<|pad|>", "<|bos|>", "<|eos|>", "<x>", "<y>")
    content["model"]["vocab"] |= {name: 256 + index for index, name in enumerate(names)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).encode("<x>") == list(b"<x>")
    change(folder / "tokenizer_config.json", added_tokens_decoder={"259": {"content": "<x>"}}, bos_token="<y>")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<x><y>") == [259, 260]
    assert tokenizer.bos_id == 260
    assert tokenizer.decode([259, 260]) == "<x>"


def test_further_special_tokens_are_special(folder: Path) -> None:
    change(folder / "tokenizer_config.json", additional_special_tokens=["<|im_start|>", {"content": "<|tool|>"}])
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<|im_start|><|tool|>") == [259, 260]
    assert tokenizer.decode([97, 259, 260]) == "a"


@pytest.mark.parametrize(
    ("listed", "sentence"),
    [
        ({"300": {"content": "<x>"}}, "gives '<x>' the id 300; after tokenizer.json it has the id 259"),
        ({"97": {"content": "<x>"}}, "gives '<x>' the id 97"),
        ({"x": {"content": "<x>"}}, "lists a token under 'x'; expected its id"),
        ({"-1": {"content": "<x>"}}, "lists a token under '-1'"),
        ({"9" * 30: {"content": "<x>"}}, "lists a token under '999"),
        ({"259": {"content": ""}}, "expected its content"),
        ({"259": {"content": 3}}, "expected its content"),
        ({"259": {"content": "<x>", "special": "yes"}}, "true or false flags"),
        ({"259": None}, "expected its content"),
        (["<x>"], "added_tokens_decoder is a list; expected an object"),
        ({"259": {"content": "\ud800"}}, "cannot be used"),
    ],
)
def test_lists_that_contradict_the_tokenizer(listed: Any, sentence: str, folder: Path) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    with pytest.raises(ModelFileError, match=sentence):
        Tokenizer.from_folder(folder)


def test_every_end_token_of_every_file_ends_an_answer(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[258, 10, 7])
    change(folder / "config.json", eos_token_id=9)
    assert Tokenizer.from_folder(folder).eos_ids == (258, 9, 10, 7)
    change(folder / "tokenizer_config.json", eos_token=None)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (9, (9, 258, 10, 7))
    tokenizer.save(folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [9, 258, 10, 7]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [9, 258, 10, 7]
    assert Tokenizer.from_folder(folder).eos_ids == (9, 258, 10, 7)


@pytest.mark.parametrize("ends", ["2", 2.0, True, -1, [2, None], {"a": 2}, 10**12, [[2]]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_no_ids(ends: Any, name: str, folder: Path) -> None:
    change(folder / name, eos_token_id=ends)
    with pytest.raises(ModelFileError, match=r"eos_token_id is .*; expected an id, or a list of ids"):
        Tokenizer.from_folder(folder)


def test_end_tokens_that_do_not_exist(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[258, 5000])
    with pytest.raises(ModelFileError, match="eos_ids is 5000, but this tokenizer has ids 0 to 258"):
        Tokenizer.from_folder(folder)


def test_minus_one_is_no_padding_token(folder: Path) -> None:
    """As the first Llama checkpoints have it."""
    change(folder / "tokenizer_config.json", pad_token=None)
    change(folder / "generation_config.json", pad_token_id=-1)
    assert Tokenizer.from_folder(folder).pad_id == 258


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [257], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [257], [258]),
        ({"add_eos_token": True}, [257], [258]),
    ],
)
def test_settings_of_llamas_tokenizers_outrank_the_file(flags: dict, before: list, after: list, folder: Path) -> None:
    backend = backend_of(folder)
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 257)])
    saved(folder, backend)
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", **flags)
    assert Tokenizer.from_folder(folder).encode("ab") == [*before, 97, 98, *after]
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert Tokenizer.from_folder(folder).encode("ab") == [257, 97, 98]


def test_ids_of_the_file_that_the_library_changes(folder: Path) -> None:
    """It counts the vocabulary and numbers the other tokens from there, whatever the file says."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 263
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=r"gives '<\|pad\|>' the id 256; it is read as 257"):
        Tokenizer.from_folder(folder)


def test_ids_without_a_text_are_told_apart(tmp_path: Path) -> None:
    tokens = [*byte_alphabet(), "[PAD256]", "[PAD257]", "<eos>", "[PAD259]"]
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * 256 + [5, 5, 3, 5]}
    metadata |= {"merges": ["<eos> <eos>"], "eos_token_id": 258}
    tokenizer = Tokenizer.from_gguf_metadata({f"tokenizer.ggml.{name}": value for name, value in metadata.items()})
    expected = [True] * 256 + [False] * 2 + [True]
    tokenizer.save(tmp_path)
    for found in (tokenizer, Tokenizer.from_folder(tmp_path)):
        assert found.known_ids.tolist() == expected
        assert found.has_text(261).tolist() == [*expected, False, False]
        assert found.has_text(100).tolist() == [True] * 100
        assert found.text_ids_count == 257
        assert found.known_ids.dtype == np.bool_
        assert found.encode("a<eos>") == [97, 258]


INFLATING = {
    "one": normalizers.Replace("a", "a" * 1_000_000),
    "pattern": normalizers.Replace(tokenizers.Regex("x*"), "y" * 1000),
    "front": normalizers.Prepend("a" * 1_000_000),
    "doubling": normalizers.Sequence([normalizers.Replace("a", "aa")] * 40),
    "nested": normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", "aa")] * 4)] * 9),
    "bytes": normalizers.Sequence([normalizers.ByteLevel()] * 30),
    "fronts": normalizers.Sequence([normalizers.Prepend("abc")] * 40),
}


@pytest.mark.parametrize("name", INFLATING)
def test_normalisers_that_inflate_texts(name: str, folder: Path) -> None:
    backend = backend_of(folder)
    backend.normalizer = INFLATING[name]
    saved(folder, backend)
    start = time.process_time()
    with pytest.raises(ModelFileError, match=r"normalises texts by steps that make up to .* letters of one"):
        Tokenizer.from_folder(folder)
    assert time.process_time() - start < 5


def test_decoders_that_inflate_texts(folder: Path) -> None:
    backend = backend_of(folder)
    backend.decoder = decoders.Sequence([decoders.Replace("a", "aa")] * 40)
    saved(folder, backend)
    with pytest.raises(ModelFileError, match="decodes texts by steps"):
        Tokenizer.from_folder(folder)


def test_post_processors_that_inflate_texts(folder: Path) -> None:
    backend = backend_of(folder)
    for single, sentence in (
        ("$A " * 1000, "puts a text more than once"),
        ("<|bos|>", "puts a text more than once, or not at all"),
        ("<|bos|> " * 1000 + "$A", "puts 1000 tokens around a text"),
    ):
        special = [("<|bos|>", 257)] if "bos" in single else []
        backend.post_processor = processors.TemplateProcessing(single=single.strip(), special_tokens=special)
        saved(folder, backend)
        with pytest.raises(ModelFileError, match=sentence):
            Tokenizer.from_folder(folder)
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 999)])
    saved(folder, backend)
    with pytest.raises(ModelFileError, match="puts the token 999 around a text, which it does not have"):
        Tokenizer.from_folder(folder)


def test_steps_in_use_are_not_refused(folder: Path) -> None:
    backend = backend_of(folder)
    for step in (
        normalizers.NFC(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]),
        normalizers.Replace(tokenizers.Regex(" {2,}"), "▁"),
    ):
        backend.normalizer = step
        saved(folder, backend)
        assert Tokenizer.from_folder(folder).encode("ab")
    backend.normalizer = normalizers.NFKC()
    saved(folder, backend)
    assert len(Tokenizer.from_folder(folder).encode("\ufdfa" * 50)) == 33 * 50


def test_ids_are_bounded_by_the_text() -> None:
    plain = ByteTokenizer()
    plain.backend.normalizer = normalizers.Replace("a", "b" * 1000)
    assert plain.encode("cc") == [99, 99]
    with pytest.raises(ModelFileError, match="makes 2000 ids of 2 letters"):
        plain.encode("aa")


def test_a_splitter_that_gives_up_on_a_text(folder: Path) -> None:
    backend = backend_of(folder)
    bytes_of = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    slow = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([slow, bytes_of])
    saved(folder, backend)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("aab") == [97, 97, 98]
    with pytest.raises(ModelFileError, match=r"the tokenizer cannot be used .* retry-limit"):
        tokenizer.encode("a" * 40)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a readable tokenizer.json"),
        (b"[" * 20_000, "is not a readable tokenizer.json"),
        (b"{}", "is not a readable tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}', "has the id 4294967295|readable"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "is not a readable"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "is not a readable"),
        (b" " * (FILE_LIMIT + 1), "expected a tokenizer.json of at most"),
    ],
)
def test_tokenizers_that_are_none(content: bytes, sentence: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(ModelFileError, match=sentence):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingModelFileError, match="does not exist"):
        Tokenizer.from_folder(folder)


def test_a_word_that_the_tokenizer_has_no_token_for(folder: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(words, eos_id=1)
    assert tokenizer.encode("a b") == [0, 1]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ModelFileError, match=r"^the tokenizer cannot be used \(.*UNK.*\)\.$"):
            encode("a c")
