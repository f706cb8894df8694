"""What the vocabulary in GGUF metadata means to llama.cpp where the file is silent or wrong.

llama.cpp knows tokens by their names: those that end an answer do so however the file types them, and what it takes for
a control token is one. It knows by the name of the splitter whether texts begin with the start token. Both are
re-stated here; tests/models/test_gguf_vocabulary.py holds them to llama.cpp itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.files import ModelFileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens in `tokenizer.ggml.token_type`."""

ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    }
)
"""Tokens that end an answer by their name."""

IN_COMPANY = frozenset({"<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<|tool_response>"})
"""Those of them of which some end nothing where certain others are."""

PARTS_OF_FILES = {
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Control tokens of code models by their name, each kind for where the file does not name the token of that kind."""

ENDING_PARTS = ("fim_pad", "fim_rep", "fim_sep")
"""Those of them that end an answer too."""

ALWAYS_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
"""Tokens that count as the user's own, not as control tokens."""

DEFAULT_START = 11
"""The start token of byte-level BPE where the file names none and texts are to begin with one."""


@dataclass(frozen=True)
class PreTokenizer:
    """What a name of `tokenizer.ggml.pre` says.

    Attributes:
        splitter: how texts are split into words, a name in `gguf_tokenizer.SPLITTERS`.
        whole_words: a word that is itself a token is taken as it is, even where no chain of merges leads to it.
        starts: texts begin with the start token unless the file says otherwise.
    """

    splitter: str
    whole_words: bool = False
    starts: bool = False


_NAMES = {
    PreTokenizer("default"): "default",
    PreTokenizer("smollm"): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    PreTokenizer("gpt-2"): (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo jais "
        "trillion granite-docling"
    ),
    PreTokenizer("llama-bpe", whole_words=True, starts=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    ),
    PreTokenizer("llama-bpe"): "dbrx smaug-bpe",
    PreTokenizer("qwen2"): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan",
}
PRE_TOKENIZERS = {name: pre for pre, names in _NAMES.items() for name in names.split()}
"""Every name that is read here."""


def pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """What the file says of splitting texts; without a word it is llama.cpp's default, which no model was trained with.

    Raises:
        ModelFileError: a name that is not read here.
    """
    named = metadata.get("tokenizer.ggml.pre") or "default"
    found = PRE_TOKENIZERS.get(named) if isinstance(named, str) else None
    if found is None:
        known = ", ".join(dict.fromkeys(pre.splitter for pre in list(_NAMES)[1:]))
        raise ModelFileError(f"the GGUF file splits words by {named!r:.80}; supported are {known} and those like them.")
    return found


def texts_begin_with(metadata: Mapping[str, Any], count: int) -> int | None:
    """The token that is put in front of every text, or None.

    Raises:
        ModelFileError: a start token is to be put there and there is none.
    """
    if not _flag(metadata, "add_bos_token", pre_tokenizer(metadata).starts):
        return None
    start = special_id(metadata, "bos", count)
    if start is None and count > DEFAULT_START:
        return DEFAULT_START
    if start is None:
        raise ModelFileError("the GGUF file lets texts begin with a start token, and names none.")
    return start


def texts_end_with(metadata: Mapping[str, Any], count: int) -> int | None:
    """The token that is put behind every text, or None.

    Raises:
        ModelFileError: an end token is to be put there and there is none.
    """
    if _flag(metadata, "add_sep_token", False):
        raise ModelFileError("the GGUF file puts a separator behind every text, which is not supported.")
    if not _flag(metadata, "add_eos_token", False):
        return None
    end = special_id(metadata, "eos", count)
    if end is None:
        raise ModelFileError("the GGUF file lets texts end with an end token, and names none.")
    return end


def special_id(metadata: Mapping[str, Any], kind: str, count: int) -> int | None:
    """The token that `tokenizer.ggml.KIND_token_id` names, or None.

    Raises:
        ModelFileError: it is not one of the `count` tokens.
    """
    key = f"tokenizer.ggml.{kind}_token_id"
    token = metadata.get(key)
    if token is not None and (type(token) is not int or not 0 <= token < count):
        raise ModelFileError(f"the GGUF file says {key} is {token!r:.80}; its tokens are 0 to {count - 1}.")
    return token


def token_texts(metadata: Mapping[str, Any]) -> list[str]:
    """The text of every token.

    Raises:
        ModelFileError: no list of texts, or a text given twice.
    """
    found = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(found, list) or not found or not all(isinstance(token, str) for token in found):
        raise ModelFileError("the GGUF file has no list of tokens (tokenizer.ggml.tokens).")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(found)]
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise ModelFileError(f"the GGUF file has the token {twice!r:.80} twice.")
    return tokens


def token_kinds(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """The kind of every token as llama.cpp takes it: names that it knows count more than what the file says.

    Raises:
        ModelFileError: kinds that are no numbers, or fewer than there are tokens.
    """
    found = metadata.get("tokenizer.ggml.token_type")
    kinds = [NORMAL] * len(tokens) if found is None else found
    if not isinstance(kinds, list) or len(kinds) < len(tokens) or not all(type(kind) is int for kind in kinds):
        raise ModelFileError(f"the GGUF file has {len(tokens)} tokens and not as many tokenizer.ggml.token_type.")
    kinds = kinds[: len(tokens)]
    control = ENDS | _named_parts(metadata)
    turned, shown = _exceptions(set(tokens))
    for index, token in enumerate(tokens):
        if token in turned:
            kinds[index] = turned[token]
        elif token in shown:
            kinds[index] = USER_DEFINED
        elif token in control:
            kinds[index] = CONTROL
    return kinds


def ending_ids(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[int, ...]:
    """The tokens that end an answer: that of the file first, then all others that llama.cpp ends at.

    Raises:
        ModelFileError: the file names no end token, or one that does not exist.
    """
    end = special_id(metadata, "eos", len(tokens))
    if end is None:
        raise ModelFileError("the GGUF file names no end token (tokenizer.ggml.eos_token_id).")
    names = (ENDS | _named_parts(metadata, ENDING_PARTS)) - set(_exceptions(set(tokens))[0])
    others = {index for index, token in enumerate(tokens) if token in names}
    named = {special_id(metadata, kind, len(tokens)) for kind in ("eot", "eom", *ENDING_PARTS)} - {None}
    return (end, *sorted(index for index in (others | named) - {end} if index is not None))


def _named_parts(metadata: Mapping[str, Any], kinds: tuple[str, ...] = tuple(PARTS_OF_FILES)) -> frozenset[str]:
    """Names of control tokens of code models, of the kinds whose token the file does not name."""
    silent = [kind for kind in kinds if f"tokenizer.ggml.{kind}_token_id" not in metadata]
    return frozenset(name for kind in silent for name in PARTS_OF_FILES[kind])


def _exceptions(tokens: set[str]) -> tuple[dict[str, int], frozenset[str]]:
    """Names that end no answer beside certain others, with the kind they have instead; and those always shown."""
    turned = {}
    calls = {"<|call|>", "<|calls|>"} & tokens
    if "<|end|>" in tokens and calls and {"<|return|>", "<|flush|>"} & tokens:
        turned["<|end|>"] = USER_DEFINED
    if "<|tool_response>" in tokens and "</s>" in tokens:
        turned["</s>"] = NORMAL
    return turned, ALWAYS_SHOWN


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ModelFileError(f"the GGUF file says tokenizer.ggml.{name} is {value!r:.80}; expected true or false.")
    return value
