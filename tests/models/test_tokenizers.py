import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies
from tokenizers import models

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import LLAMA3
from jaxrl_llm.models.chat import chat_prompt
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.gguf_tokenizer import SPLITTERS
from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import check_vocabulary
from tests.golden.texts import TEXTS

GOLDEN = Path(__file__).parents[1] / "golden"
OTHER_NUMERALS = "٣٤٥ ½ ² Ⅷ"
"""transformers' reading of the GGUF file does not split these into single digits, as the model's tokenizer does."""


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metadata() -> dict:
    return GGUFFile(smollm2_path()).metadata


@pytest.fixture(scope="module")
def smollm2(metadata: dict) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(metadata)


def test_special_ids(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.eos_id, smollm2.pad_id, smollm2.bos_id) == (49152, 2, 2, 1)
    assert smollm2.encode("<|im_end|>") == [smollm2.eos_id]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_llama_cpp_and_decode_to_the_text(text: str, smollm2: Tokenizer) -> None:
    ids = smollm2.encode(text)
    assert ids == golden("token_ids_llama_cpp.json")[text]
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_ids_are_those_of_transformers_but_for_its_known_fault(smollm2: Tokenizer) -> None:
    theirs = golden("token_ids_transformers.json")
    assert {text for text in TEXTS if smollm2.encode(text) != theirs[text]} == {OTHER_NUMERALS}


@pytest.mark.parametrize(("splitter", "texts"), [("gpt-2", 1), ("qwen2", 2), ("llama-bpe", 2)])
def test_goldens_see_another_splitter(splitter: str, texts: int, metadata: dict) -> None:
    """smollm and gpt-2 differ in digits only, and no token has two ASCII digits: other numerals tell them apart."""
    wrong = Tokenizer.from_gguf_metadata({**metadata, "tokenizer.ggml.pre": splitter})
    theirs = golden("token_ids_llama_cpp.json")
    assert sum(wrong.encode(text) != theirs[text] for text in TEXTS) >= texts


def test_metadata_of_the_rebuilt_tokenizer_is_that_of_the_file(metadata: dict, smollm2: Tokenizer) -> None:
    rebuilt = smollm2.gguf_metadata(vocab_size=49152)
    source = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    del source["tokenizer.ggml.unknown_token_id"]
    assert rebuilt == source


def test_saved_tokenizer_is_the_same_and_rows_beyond_it_are_unused(tmp_path: Path, smollm2: Tokenizer) -> None:
    smollm2.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert [loaded.encode(text) for text in TEXTS] == [smollm2.encode(text) for text in TEXTS]
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (smollm2.eos_id, smollm2.pad_id, smollm2.bos_id)
    assert loaded.chat_template == smollm2.chat_template
    padded = loaded.gguf_metadata(vocab_size=49160)
    assert padded["tokenizer.ggml.tokens"][49152:] == [f"[PAD{index}]" for index in range(49152, 49160)]
    again = Tokenizer.from_gguf_metadata(padded)
    assert again.vocab_size == 49152
    assert [again.encode(text) for text in TEXTS] == [smollm2.encode(text) for text in TEXTS]


@pytest.mark.parametrize("settings", [{"eos_token_id": 2}, {"eos_token_id": [2, 0]}])
def test_special_ids_from_numbers_when_no_names_are_given(settings: dict, tmp_path: Path, smollm2: Tokenizer) -> None:
    smollm2.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.from_folder(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (2, 2, None)


def test_encode_batch_pads_on_the_left(smollm2: Tokenizer) -> None:
    ids, mask = smollm2.encode_batch(["7 + 5 =", "12"], length=8)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids[0].tolist() == [2] * 3 + smollm2.encode("7 + 5 =")
    assert mask.sum(axis=1).tolist() == [5, 2]
    assert mask[:, -1].all()
    assert smollm2.decode_batch(ids, mask) == ["7 + 5 =", "12"]
    assert smollm2.encode_batch(["7 + 5 =", "12"])[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("texts", "length", "sentence"),
    [
        ([], None, "texts is empty"),
        (["a", ""], None, r"texts\[1\] has no tokens"),
        (["a", "one two three"], 2, r"texts\[1\] has 3 tokens, but length is 2"),
    ],
)
def test_encode_batch_refuses(texts: list[str], length: int | None, sentence: str, smollm2: Tokenizer) -> None:
    with pytest.raises(ValueError, match=sentence):
        smollm2.encode_batch(texts, length=length)


def test_decode_leaves_special_tokens_out_unless_asked(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("4<|im_end|>")
    assert smollm2.decode(ids) == "4"
    assert smollm2.decode(np.asarray(ids), skip_special_tokens=False) == "4<|im_end|>"


@given(strategies.text(max_size=40))
def test_byte_tokenizer_has_one_id_per_byte(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    if not any(name in text for name in (ByteTokenizer.PAD, ByteTokenizer.BOS, ByteTokenizer.EOS)):
        assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_byte_tokenizer_specials(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(specials=["<|im_end|>"])
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258, 260)
    assert tokenizer.encode("é<|im_end|><|eos|>") == [0xC3, 0xA9, 259, 258]
    assert tokenizer.decode([0xC3, 258]) == "\ufffd"
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("é<|im_end|>") == [0xC3, 0xA9, 259]
    rebuilt = Tokenizer.from_gguf_metadata(tokenizer.gguf_metadata(vocab_size=260))
    assert [rebuilt.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("specials", [["<|eos|>"], ["a", "a"], [""]])
def test_byte_tokenizer_refuses_names_twice(specials: list[str]) -> None:
    with pytest.raises(ValueError, match="specials is"):
        ByteTokenizer(specials=specials)


@pytest.mark.parametrize("token", [-1, 49152])
def test_special_ids_must_exist(token: int, smollm2: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"eos_id is {token}, but this tokenizer has ids 0 to 49151"):
        Tokenizer(smollm2.backend, eos_id=token)


@pytest.mark.parametrize(("rows", "fits"), [(258, False), (259, True), (259 + 1024, True), (259 + 1025, False)])
def test_vocabulary_must_fit_the_model(rows: int, fits: bool) -> None:
    if fits:
        check_vocabulary(ByteTokenizer(), rows)
        return
    with pytest.raises(ValueError, match=f"has 259 ids, the model {rows} rows"):
        check_vocabulary(ByteTokenizer(), rows)


WORDS = "I'LL pay 12345 € in  Zürich"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["I", "'", "LL", " pay", " 12345", " €", " in", " ", " Zürich"]),
        ("smollm", ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " €", " in", " ", " Zürich"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "45", " €", " in", " ", " Zürich"]),
        ("qwen2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €", " in", " ", " Zürich"]),
    ],
)
def test_splitters(name: str, words: list[str]) -> None:
    assert ["".join(WORDS[slice(*span)]) for _, span in SPLITTERS[name]().pre_tokenize_str(WORDS)] == words


def small_metadata(**changes: object) -> dict:
    tokens = ["<s>", "</s>", "a", "b", "c", "ab", "abc", "<tool>", "[PAD8]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 4, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.padding_token_id": 1,
        **changes,
    }


def test_kinds_of_tokens_and_the_start_token() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(small_metadata())
    assert tokenizer.encode("ab<tool>c</s>") == [0, 5, 7, 4, 1]
    assert tokenizer.encode("ab", add_special_tokens=False) == [5]
    assert tokenizer.encode("abc", add_special_tokens=False) == [6], "Llama 3 takes whole words without merging"
    assert tokenizer.decode([0, 5, 7, 1]) == "ab<tool>"
    assert tokenizer.vocab_size == 8
    assert tokenizer.gguf_metadata(vocab_size=9) == small_metadata()
    other = Tokenizer.from_gguf_metadata(small_metadata(**{"tokenizer.ggml.pre": "gpt-2"}))
    assert other.encode("abc", add_special_tokens=False) == [5, 4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokenizer.ggml.model": "llama"}, "is of the kind 'llama'; only byte-level BPE"),
        ({"tokenizer.ggml.pre": "tekken"}, "splits words by 'tekken'; supported are smollm"),
        ({"tokenizer.ggml.eos_token_id": None}, "names no end token"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_rebuilt(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Tokenizer.from_gguf_metadata(small_metadata(**changes))


def test_tokenizers_that_gguf_cannot_hold(smollm2: Tokenizer) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="not byte-level BPE"):
        Tokenizer(words, eos_id=0).gguf_metadata(vocab_size=2)
    other = tokenizers.Tokenizer.from_str(smollm2.backend.to_str())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="no name in GGUF here"):
        Tokenizer(other, eos_id=2).gguf_metadata(vocab_size=49152)


def test_folders_without_what_is_needed(tmp_path: Path, smollm2: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"is not a readable tokenizer\.json .* may be truncated"):
        Tokenizer.from_folder(tmp_path)
    smollm2.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="names no end token"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    with pytest.raises(ValueError, match="eos_token is '<eos>'"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("case", golden("chats_transformers.json")["chats"])
def test_chats_are_those_of_the_template(case: dict) -> None:
    assert format_chat(case["messages"]) == case["prompt"]
    assert format_chat(case["messages"], add_generation_prompt=False) == case["transcript"]


def test_other_chat_formats() -> None:
    assert chat_prompt("Hi {role}", chat_format=CHATML) == (
        "<|im_start|>user\nHi {role}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_prompt(" Hi\n", chat_format=LLAMA3) == (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [([], "messages is empty"), ([{"role": "user"}], r"messages\[0\] has the keys \['role'\]")],
)
def test_format_chat_refuses(messages: list, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        format_chat(messages)
