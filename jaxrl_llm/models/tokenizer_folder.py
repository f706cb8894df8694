"""The tokenizer of a Hugging Face folder, as transformers reads it: several files that each say a part.

tokenizer.json holds the tokenizer; tokenizer_config.json names special tokens, and may list tokens that stand nowhere
else; generation_config.json and config.json give the tokens that end an answer.
"""

import base64
import json
import math
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import NamedTuple

import tokenizers
from tokenizers import processors

from jaxrl_llm.models.files import MissingModelFileError
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import is_there
from jaxrl_llm.models.files import one_line
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.files import regular_file

FILE_LIMIT = 128 * 2**20
"""Largest tokenizer.json [bytes]; that of 256,000 tokens has 33 MB."""
LARGEST_ID = 2**24
"""Ids are below this."""
GROWTH_LIMIT = 64
"""How many letters a tokenizer may make of one; Unicode's own compatibility forms have up to 18."""
SPECIAL_LIMIT = 64
"""How many tokens may be put around a text."""
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 12, "ByteLevel": 4}
"""Letters that a step of normalising or decoding makes of one, at most; 1 for those not named here."""


class TokenizerFolder(NamedTuple):
    """What the files of a folder say together; `eos_ids` has at least one."""

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    pad_id: int | None
    bos_id: int | None
    chat_template: str | None


def read_folder(folder: Path) -> TokenizerFolder:
    """The tokenizer of a folder. Truncation and padding that were saved with it do not act.

    Raises:
        MissingModelFileError: no tokenizer.json.
        ModelFileError: a file cannot be read or used, the files contradict one another, or none names an end token.
    """
    backend = read_backend(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json", default={})
    source = folder / "tokenizer_config.json"
    with read_from(source):
        _add_listed(backend, settings, read_json(folder / "added_tokens.json", default={}), source)
        _add_named(backend, settings, read_json(folder / "special_tokens_map.json", default={}))
    numbers = {name: read_json(folder / name, default={}) for name in ("config.json", "generation_config.json")}
    ends = [_named_id(backend, settings, "eos", source)]
    for name in numbers:
        ends += _numbers(numbers[name], "eos", folder / name)
    eos_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
    if not eos_ids:
        raise ModelFileError(
            f"{folder} names no end token: neither tokenizer_config.json (eos_token) nor config.json or "
            "generation_config.json (eos_token_id) has one."
        )
    others = {}
    for kind in ("pad", "bos"):
        found = [_named_id(backend, settings, kind, source)]
        for name in numbers:
            found += [token for token in _numbers(numbers[name], kind, folder / name, least=-1) if token >= 0]
        others[kind] = next((token for token in found if token is not None), None)
    with read_from(source):
        _put_around(backend, settings, others["bos"], eos_ids[0], source)
    _check_around(backend, folder / "tokenizer.json")
    return TokenizerFolder(backend, eos_ids, others["pad"], others["bos"], _chat_template(folder, settings))


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, which neither cuts nor pads.

    Raises:
        MissingModelFileError: no such file.
        ModelFileError: it cannot be read, or its steps make far more of a text than it is.
    """
    if not is_there(path):
        raise MissingModelFileError(f"{path} does not exist; a Hugging Face folder needs a tokenizer.json.")
    regular_file(path, expected="a tokenizer.json", limit=FILE_LIMIT)
    try:
        with read_from(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
    except ModelFileError as error:
        raise ModelFileError(
            f"{path} is not a readable tokenizer.json ({one_line(error.__cause__)}); it may be truncated."
        ) from error
    with read_from(path):
        _check_ids(backend, path)
        backend.no_truncation()
        backend.no_padding()
        for what, part in (("normalises", backend.normalizer), ("decodes", backend.decoder)):
            factor = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
            if factor > GROWTH_LIMIT:
                raise ModelFileError(
                    f"{path} {what} texts by steps that make up to {factor:.3g} letters of one; at most {GROWTH_LIMIT} "
                    "are expected."
                )
    return backend


def _check_ids(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Raise where the library numbers added tokens otherwise than the file, as it does behind holes in the ids."""
    text, place = path.read_text(encoding="utf-8"), -1
    for _ in range(4):  # a token of this name may come first
        place = text.find('"added_tokens"', place + 1)
        colon = text.find(":", place)
        if place < 0 or colon < 0:
            return
        found, _ = json.JSONDecoder().raw_decode(text, len(text) - len(text[colon + 1 :].lstrip()))
        if isinstance(found, list):
            break
    else:
        return
    for entry in found:
        read = backend.token_to_id(entry["content"])
        if read != entry["id"]:
            raise ModelFileError(f"{path} gives {entry['content']!r:.80} the id {entry['id']}; it is read as {read}.")


def _growth(step: Mapping[str, Any]) -> float:
    """Letters that a step of normalising or decoding, or several in a row, make of one at most."""
    kind = step.get("type")
    if kind == "Sequence":
        parts = step.get("normalizers") or step.get("decoders") or []
        factors = [_growth(part) for part in parts]
        # Unicode's forms are made once: after the first, a second of them makes nothing longer.
        forms = [factor for part, factor in zip(parts, factors, strict=True) if str(part.get("type")).startswith("NF")]
        return math.prod(factors) / math.prod(forms) * max(forms, default=1.0)
    if kind == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        if pattern.get("String"):
            return max(1.0, content / len(pattern["String"]))
        return max(1.0, 1.0 + content)  # a pattern may match nothing at all, before every letter
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "Precompiled":
        blob = base64.b64decode(step["precompiled_charsmap"])
        texts = blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")
        return max(1.0, *(float(len(text.decode("utf-8", "replace"))) for text in texts))
    return float(GROWTH.get(str(kind), 1))


def _put_around(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], bos_id: int | None, eos_id: int, source: Path
) -> None:
    """Put the start and end token around texts where the settings of a Llama tokenizer say so, which outrank its file.

    transformers does that for the classes of Llama's tokenizers only; without these settings the file counts here.
    """
    flags = {name: settings[name] for name in ("add_bos_token", "add_eos_token") if settings.get(name) is not None}
    if settings.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast") or not flags:
        return
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ModelFileError(f"{source} says {flags!r:.120}; expected true or false.")
    first = bos_id if flags.get("add_bos_token", True) else None
    last = eos_id if flags.get("add_eos_token", False) else None
    if flags.get("add_bos_token") and bos_id is None:
        raise ModelFileError(f"{source} lets texts begin with a start token, and no file of the folder names one.")
    backend.post_processor = around(first, last)


def around(first: int | None, last: int | None) -> processors.TemplateProcessing:
    """What puts a token in front of every text, and one behind it; None for nothing there."""
    # Names of their own, since a token may have a text that means something in a template.
    names = {token: f"<{token}>" for token in (first, last) if token is not None}
    single = [names[first]] if first is not None else []
    single += ["$A", *([names[last]] if last is not None else [])]
    return processors.TemplateProcessing(single=single, special_tokens=[(name, token) for token, name in names.items()])


def _check_around(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Raise unless the tokens put around a text are few, exist, and hold the text once."""
    with read_from(path):
        if backend.post_processor is not None and _repeats(json.loads(backend.post_processor.__getstate__())):
            raise ModelFileError(f"{path} puts a text more than once, or not at all, between its special tokens.")
        around = backend.encode("").ids
        if len(around) > SPECIAL_LIMIT:
            raise ModelFileError(
                f"{path} puts {len(around)} tokens around a text; at most {SPECIAL_LIMIT} are expected."
            )
        unknown = [token for token in around if backend.id_to_token(token) is None]
        if unknown:
            raise ModelFileError(f"{path} puts the token {unknown[0]} around a text, which it does not have.")
        backend.encode("a b")


def _repeats(step: Mapping[str, Any]) -> bool:
    """Whether a step after tokenizing has the text another number of times than once."""
    if step.get("type") == "Sequence":
        return any(_repeats(part) for part in step.get("processors", []))
    if step.get("type") != "TemplateProcessing":
        return False
    return sum("Sequence" in piece for piece in step["single"]) != 1


def _add_listed(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], older: Mapping[str, Any], source: Path
) -> None:
    """Add the tokens of `added_tokens_decoder`, else those of the older added_tokens.json, under their ids."""
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        listed = {str(token): {"content": text} for text, token in older.items()}
    if not isinstance(listed, Mapping):
        raise ModelFileError(f"{source} says added_tokens_decoder is a {type(listed).__name__}; expected an object.")
    present = backend.get_added_tokens_decoder()
    for number, entry in sorted(listed.items(), key=lambda item: _id_of(item[0], source)):
        token = _id_of(number, source)
        added = _added_token(entry, source)
        if token in present and present[token].content == added.content:
            continue
        backend.add_tokens([added])
        found = backend.token_to_id(added.content)
        if found != token:
            raise ModelFileError(
                f"{source} gives {added.content!r:.80} the id {token}; after tokenizer.json it has the id {found}."
            )


def _id_of(number: str, source: Path) -> int:
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise ModelFileError(f"{source} lists a token under {number!r:.80}; expected its id.")
    return int(number)


def _added_token(entry: Any, source: Path) -> tokenizers.AddedToken:
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    flags = {name: entry[name] for name in FLAGS if name in entry} if isinstance(entry, Mapping) else {}
    if not isinstance(content, str) or not content or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ModelFileError(f"{source} lists a token as {entry!r:.120}; expected its content and true or false flags.")
    return tokenizers.AddedToken(content, **flags)


def _add_named(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], older: Mapping[str, Any]) -> None:
    """Make the tokens that are named special by name special to the tokenizer: their names in a text are the tokens.

    A name of a kind (eos_token, ...) counts where the token exists; further names are added, as transformers does.
    """
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for entry, must_exist in (*_names(older), *_names(settings)):
        content = entry.get("content") if isinstance(entry, Mapping) else entry
        if not isinstance(content, str) or not content or content in present:
            continue
        if must_exist and backend.token_to_id(content) is None:
            continue  # `_named_id` has a sentence for those that matter
        backend.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
        present.add(content)


def _names(settings: Mapping[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Named special tokens, and whether they count only where they exist."""
    for kind in NAMED:
        yield settings.get(f"{kind}_token"), True
    for name in ("additional_special_tokens", "extra_special_tokens"):
        further = settings.get(name) or []
        for entry in further.values() if isinstance(further, Mapping) else further:
            yield entry, False


def _named_id(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], kind: str, source: Path) -> int | None:
    """Id of the eos, pad or bos token by its name in tokenizer_config.json, or None."""
    entry = settings.get(f"{kind}_token")
    name = entry.get("content") if isinstance(entry, Mapping) else entry
    if entry is None:
        return None
    with read_from(source):
        token = backend.token_to_id(name) if isinstance(name, str) else None
    if token is None:
        raise ModelFileError(f"{source} says {kind}_token is {name!r:.80}; tokenizer.json does not have it.")
    return token


def _numbers(config: Mapping[str, Any], kind: str, source: Path, *, least: int = 0) -> list[int]:
    """The ids that a config gives for a kind of token: one, several or none."""
    found = config.get(f"{kind}_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and least <= token < LARGEST_ID for token in ids):
        raise ModelFileError(f"{source} says {kind}_token_id is {found!r:.80}; expected an id, or a list of ids.")
    return ids


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of chats: that of a file of its own, else that of tokenizer_config.json (the default of several)."""
    path = folder / "chat_template.jinja"
    if is_there(path):
        regular_file(path, expected="a chat template", limit=2**20)
        with read_from(path):
            return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
