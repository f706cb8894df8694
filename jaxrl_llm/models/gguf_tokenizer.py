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
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in `tokenizer.ggml.token_type`."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _words_of(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split at the matches of a pattern, then write each piece in the byte alphabet."""
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


SPLITTERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _words_of(_LLAMA3_WORDS),
    "qwen2": lambda: _words_of(_QWEN2_WORDS),
}
"""What each `tokenizer.ggml.pre` does: SmolLM, GPT-2, Llama 3, Qwen 2 and 3."""

ALIASES = {"default": "gpt-2", "gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def backend_from_metadata(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that GGUF metadata describes.

    Raises:
        ValueError: it is not byte-level BPE, or its splitter is not among `SPLITTERS`.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"the GGUF file's tokenizer is of the kind {kind!r}; only byte-level BPE ('gpt2') can be rebuilt from "
            "GGUF. Take the tokenizer.json of the same model instead."
        )
    named = str(metadata.get("tokenizer.ggml.pre", "default"))
    splitter = SPLITTERS.get(ALIASES.get(named, named))
    if splitter is None:
        raise ValueError(f"the GGUF file splits words by {named!r}; supported are {', '.join(SPLITTERS)}.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != UNUSED}
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    merges = [pair for pair in merges if "".join(pair) in vocabulary]
    # Llama 3 takes a word that is itself a token as it is, even where no chain of merges leads to it.
    whole_words = splitter is SPLITTERS["llama-bpe"]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    if splitter is SPLITTERS["qwen2"]:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter()
    backend.decoder = decoders.ByteLevel()
    added = {CONTROL: True, USER_DEFINED: False}
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=added[kind], normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in added
        ]
    )
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos_id]} $A", special_tokens=[(tokens[bos_id], bos_id)]
        )
    return backend


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
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        tokens[index], kinds[index] = token, NORMAL
    for token in content["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        # Without merges every letter is a token by itself, however the text is split into words.
        "tokenizer.ggml.pre": _splitter_name(content["pre_tokenizer"]) if model["merges"] else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in model["merges"]] or [_idle_merge(content)],
        "tokenizer.ggml.add_bos_token": len(backend.encode("a").ids)
        > len(backend.encode("a", add_special_tokens=False).ids),
        "tokenizer.ggml.add_space_prefix": False,
    }


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
        end_ids: tokens that end a text, one to three of them.

    Raises:
        ValueError: none or more than three end tokens, or one outside the vocabulary.
    """
    names = ("eos", "eot", "eom")
    if not 1 <= len(end_ids) <= len(names):
        raise ValueError(f"end_ids is {tuple(end_ids)}; a GGUF vocabulary can name one to {len(names)} end tokens.")
    for token in end_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"end_ids has {token}, which is not a token of the vocabulary, 0 .. {vocab_size - 1}.")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"<{token}>" for token in range(vocab_size)],
        "tokenizer.ggml.token_type": [CONTROL] * vocab_size,
        "tokenizer.ggml.merges": ["<0> <1>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}_token_id": int(token) for name, token in zip(names, end_ids, strict=False)},
    }
