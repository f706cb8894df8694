"""Byte-level BPE tokenizers as GGUF metadata, both ways: lists of tokens, kinds and merges, and a splitter by name.

GGUF says how a text is split into words by a name only (`tokenizer.ggml.pre`); `SPLITTERS` says what each name means.
"""

import json
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.gguf_vocabulary import CONTROL
from jaxrl_llm.models.gguf_vocabulary import ENDS
from jaxrl_llm.models.gguf_vocabulary import IN_COMPANY
from jaxrl_llm.models.gguf_vocabulary import NORMAL
from jaxrl_llm.models.gguf_vocabulary import UNKNOWN
from jaxrl_llm.models.gguf_vocabulary import UNUSED
from jaxrl_llm.models.gguf_vocabulary import USER_DEFINED
from jaxrl_llm.models.gguf_vocabulary import pre_tokenizer
from jaxrl_llm.models.gguf_vocabulary import texts_begin_with
from jaxrl_llm.models.gguf_vocabulary import texts_end_with
from jaxrl_llm.models.gguf_vocabulary import token_kinds
from jaxrl_llm.models.gguf_vocabulary import token_texts
from jaxrl_llm.models.tokenizer_folder import around

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _words_of(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split at the matches of a pattern, then write each piece in the byte alphabet."""
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _default() -> pre_tokenizers.PreTokenizer:
    """Runs of punctuation, then GPT-2's words, then runs of digits in threes."""
    patterns = (r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9]{3}")
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITTERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _words_of(_LLAMA3_WORDS),
    "qwen2": lambda: _words_of(_QWEN2_WORDS),
    "default": _default,
}
"""What each `tokenizer.ggml.pre` does: SmolLM, GPT-2, Llama 3, Qwen 2 and 3, and llama.cpp where a file is silent."""


def backend_from_metadata(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that GGUF metadata describes, as llama.cpp reads it: no text is normalised, be it Qwen's.

    Raises:
        ModelFileError: it is not byte-level BPE, its splitter is not among `SPLITTERS`, or something is missing in it.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelFileError(
            f"the GGUF file's tokenizer is of the kind {kind!r:.80}; only byte-level BPE ('gpt2') can be rebuilt from "
            "GGUF. Take the tokenizer.json of the same model instead."
        )
    pre = pre_tokenizer(metadata)
    tokens = token_texts(metadata)
    kinds = token_kinds(metadata, tokens)
    known = dict(zip(tokens, kinds, strict=True))
    merges = _merges(metadata, known)
    parts = {part for pair in merges for part in (*pair, "".join(pair))}
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != UNUSED or token in parts}
    with read_from("the tokenizer of the GGUF file"):
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
        backend.pre_tokenizer = SPLITTERS[pre.splitter]()
        backend.decoder = decoders.ByteLevel()
        added = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, special=added[kind], normalized=False)
                for token, kind in known.items()
                if kind in added
            ]
        )
        first, last = texts_begin_with(metadata, len(tokens)), texts_end_with(metadata, len(tokens))
        if first is not None or last is not None:
            backend.post_processor = around(first, last)
    return backend


def _merges(metadata: Mapping[str, Any], kinds: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges in their order, each once; a merge of control tokens never happens and is left out.

    Raises:
        ModelFileError: no list of merges, or one whose parts or result are no tokens.
    """
    found = metadata.get("tokenizer.ggml.merges")
    if not isinstance(found, list) or not all(isinstance(merge, str) for merge in found):
        raise ModelFileError("the GGUF file has no list of merges (tokenizer.ggml.merges).")
    merges = {}
    for merge in found:
        # The space between the parts is the first one that is not the first letter.
        space = merge.find(" ", 1)
        pair = (merge[:space], merge[space + 1 :]) if space > 0 else ("", "")
        if all(kinds.get(part) == CONTROL for part in pair):
            continue
        lost = [text for text in (*pair, "".join(pair)) if text not in kinds]
        if lost:
            raise ModelFileError(f"the GGUF file merges {merge!r:.80}, but {lost[0]!r:.80} is none of its tokens.")
        merges.setdefault(pair)
    return list(merges)


def metadata_from_backend(backend: tokenizers.Tokenizer, *, vocab_size: int) -> dict[str, Any]:
    """The GGUF metadata of a byte-level BPE tokenizer, special ids and chat template excepted.

    Args:
        backend: the tokenizer.
        vocab_size: rows of the model; ids that the tokenizer does not use are written as unused.

    Raises:
        ValueError: it is not byte-level BPE, or it splits words in a way that GGUF has no name for here.
    """
    content = json.loads(backend.to_str())
    model = content["model"]
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or (content.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        raise ValueError(
            "the tokenizer is not byte-level BPE, the only kind that save_gguf writes; pass tokenizer=None."
        )
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # llama.cpp does without Qwen's, as converters do
        raise ValueError(
            f"the tokenizer normalises texts ({normalizer.get('type')}), which GGUF cannot say; pass tokenizer=None."
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        tokens[index], kinds[index] = token, NORMAL
    for token in content["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    starts, ends = _around(backend)
    return {
        "tokenizer.ggml.model": "gpt2",
        # Without merges every letter is a token by itself, however the text is split into words.
        "tokenizer.ggml.pre": _pre_name(content) if model["merges"] else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in model["merges"]] or [_idle_merge(content)],
        "tokenizer.ggml.add_bos_token": starts,
        **({"tokenizer.ggml.add_eos_token": True} if ends else {}),
        "tokenizer.ggml.add_space_prefix": False,
    }


def _around(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Whether something is put in front of every text, and behind it."""
    plain, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    return whole[: len(plain)] != plain, whole[-len(plain) :] != plain if plain else False


def _pre_name(content: Mapping[str, Any]) -> str:
    """The name in GGUF of how texts are split and whether whole words are taken as they are."""
    name = _splitter_name(content["pre_tokenizer"])
    whole_words = bool(content["model"].get("ignore_merges"))
    if name == "llama-bpe":
        return name if whole_words else "smaug-bpe"
    if whole_words:
        raise ValueError(
            f"the tokenizer splits words as {name} does and takes whole words as they are, which has no name in GGUF "
            "here; pass tokenizer=None to save the weights without it."
        )
    return name


def _splitter_name(found: Mapping[str, Any] | None) -> str:
    for name, splitter in SPLITTERS.items():
        probe = tokenizers.Tokenizer(models.BPE())
        probe.pre_tokenizer = splitter()
        if _comparable(json.loads(probe.to_str())["pre_tokenizer"]) == _comparable(found):
            return name
    raise ValueError(
        f"the tokenizer splits words in a way that has no name in GGUF here (known: {', '.join(SPLITTERS)}); "
        "pass tokenizer=None to save the weights without it."
    )


def _idle_merge(content: Mapping[str, Any]) -> str:
    """A merge that never happens: llama.cpp wants at least one, and a text's letters never become a special token."""
    for token in content["added_tokens"]:
        if len(token["content"]) > 1 and " " not in token["content"]:
            return f"{token['content']} {token['content']}"
    raise ValueError("the tokenizer has neither merges nor special tokens; llama.cpp loads no such tokenizer.")


def _comparable(part: Any) -> Any:
    """Settings of a pre-tokenizer without those that change offsets only."""
    if isinstance(part, Mapping):
        return {key: _comparable(value) for key, value in part.items() if key != "trim_offsets"}
    return [_comparable(item) for item in part] if isinstance(part, list) else part


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge as two parts; older tokenizer.json files and GGUF write it as one string with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def placeholder_metadata(*, vocab_size: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """The GGUF metadata of a vocabulary without texts, for an engine that is given ids and asked for ids.

    It needs no tokenizer that GGUF can describe, the engine ends at exactly these tokens, and no token can be half of a
    character: llama.cpp's server leaves the log-prob of such a token out. Every token is a control token, whose text
    is empty.

    Args:
        vocab_size: rows of the model.
        end_ids: tokens that end a text, at least one: three are named by their ids, more by their names.

    Raises:
        ValueError: no end tokens or too many of them, or one outside the vocabulary.
    """
    names = ("eos", "eot", "eom")
    further = sorted(ENDS - IN_COMPANY)
    ends = list(dict.fromkeys(int(token) for token in end_ids))
    if not 1 <= len(ends) <= len(names) + len(further):
        raise ValueError(
            f"end_ids is {tuple(end_ids)}; a GGUF vocabulary can name one to {len(names)} end tokens by their ids, and "
            f"{len(further)} more by their texts."
        )
    for token in ends:
        if not 0 <= token < vocab_size:
            raise ValueError(f"end_ids has {token}, which is not a token of the vocabulary, 0 .. {vocab_size - 1}.")
    tokens = [f"<{token}>" for token in range(vocab_size)]
    for token, text in zip(ends[len(names) :], further, strict=False):
        tokens[token] = text
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * vocab_size,
        "tokenizer.ggml.merges": [f"{tokens[0]} {tokens[0]}"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in zip(names, ends, strict=False)},
    }
