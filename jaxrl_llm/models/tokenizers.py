"""Text to token ids and back: tokenizers from a GGUF file, from a Hugging Face folder, or one token per byte.

All of them are one class over the `tokenizers` library: what came from one kind of file can be saved as the other.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool
from jaxtyping import Int
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.files import write_json
from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.gguf_tokenizer import backend_from_metadata
from jaxrl_llm.models.gguf_tokenizer import metadata_from_backend
from jaxrl_llm.models.gguf_vocabulary import ending_ids
from jaxrl_llm.models.gguf_vocabulary import special_id
from jaxrl_llm.models.gguf_vocabulary import token_texts
from jaxrl_llm.models.tokenizer_folder import GROWTH_LIMIT
from jaxrl_llm.models.tokenizer_folder import LARGEST_ID
from jaxrl_llm.models.tokenizer_folder import SPECIAL_LIMIT
from jaxrl_llm.models.tokenizer_folder import read_folder

PADDING_LIMIT = 1024
"""Model rows beyond the tokenizer's ids that still count as padding of the embedding (phi-2: 905)."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids that generation and padding need.

    Attributes:
        backend: the tokenizer of the `tokenizers` library.
        eos_ids: the tokens that end a response, `eos_id` first.
        pad_id: the token at padded places; may equal `eos_id`, since masks and not ids say what is real.
        bos_id: the token that starts a text, or None.
        chat_template: the Jinja source that came with the checkpoint; `chat.checkpoint_chat` renders it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        bos_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.eos_ids = tuple(dict.fromkeys((eos_id, *eos_ids)))
        self.pad_id = eos_id if pad_id is None else pad_id
        self.bos_id = bos_id
        self.chat_template = chat_template
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size > LARGEST_ID:
            raise ModelFileError(
                f"the tokenizer has the id {self.vocab_size - 1}; the largest may be {LARGEST_ID - 1}."
            )
        named = {"eos_id": eos_id, "pad_id": self.pad_id, "bos_id": bos_id}
        for name, token in [*named.items(), *(("eos_ids", token) for token in self.eos_ids)]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise ModelFileError(f"{name} is {token}, but this tokenizer has ids 0 to {self.vocab_size - 1}.")

    @property
    def eos_id(self) -> int:
        """The token that ends a response; the first of `eos_ids`."""
        return self.eos_ids[0]

    @property
    def text_ids_count(self) -> int:
        """How many ids have a text; the others, up to the rows of the model, mean nothing and cannot be decoded."""
        return len(self.backend.get_vocab(with_added_tokens=True))

    @property
    def known_ids(self) -> Bool[np.ndarray, " V"]:
        """Which of the ids 0 to vocab_size - 1 have a text."""
        return self.has_text(self.vocab_size)

    def has_text(self, vocab_size: int) -> Bool[np.ndarray, " V"]:
        """Which rows of a model with `vocab_size` rows have a text: those of its padding are false."""
        mask = np.zeros(vocab_size, bool)
        ids = np.fromiter(self.backend.get_vocab(with_added_tokens=True).values(), np.int64)
        mask[ids[ids < vocab_size]] = True
        return mask

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder: its tokenizer.json, and what its *_config.json files say of tokens.

        See `tokenizer_folder.read_folder`.

        Raises:
            MissingModelFileError: no tokenizer.json in the folder.
            ModelFileError: a file cannot be read or used, the files contradict one another, or none of them names an
                end token.
        """
        found = read_folder(Path(folder))
        return cls(
            found.backend,
            eos_id=found.eos_ids[0],
            eos_ids=found.eos_ids,
            pad_id=found.pad_id,
            bos_id=found.bos_id,
            chat_template=found.chat_template,
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer inside a GGUF file; `load_pretrained` is faster after the first time.

        Raises:
            MissingModelFileError: no such file.
            ModelFileError: the file is damaged, or its tokenizer is not byte-level BPE of a known kind.
        """
        return cls.from_gguf_metadata(GGUFFile(Path(path)).metadata)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that the key-value entries of a GGUF file describe; see `from_gguf`."""
        backend = backend_from_metadata(metadata)
        tokens = token_texts(metadata)
        ids = ending_ids(metadata, tokens)
        template = metadata.get("tokenizer.chat_template")
        return cls(
            backend,
            eos_id=ids[0],
            eos_ids=ids,
            pad_id=special_id(metadata, "padding", len(tokens)),
            bos_id=special_id(metadata, "bos", len(tokens)),
            chat_template=template if isinstance(template, str) else None,
        )

    def gguf_metadata(self, *, vocab_size: int) -> dict[str, Any]:
        """The key-value entries that describe this tokenizer in the GGUF file of a model with `vocab_size` rows.

        Raises:
            ValueError: it is not byte-level BPE of a known kind, or ends at more tokens than the file can name.
        """
        entries = metadata_from_backend(self.backend, vocab_size=vocab_size)
        ids = {"eos": self.eos_id, "padding": self.pad_id, "bos": self.bos_id}
        entries |= {f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items() if token is not None}
        unnamed = set(self.eos_ids) - set(ending_ids(entries, token_texts(entries)))
        if len(unnamed) > 2:
            raise ValueError(
                f"the tokenizer ends at {self.eos_ids}; a GGUF file can name three tokens beside those known by name."
            )
        for kind, token in zip(("eot", "eom"), sorted(unnamed), strict=False):
            entries[f"tokenizer.ggml.{kind}_token_id"] = token
        if self.chat_template is not None:
            entries["tokenizer.chat_template"] = self.chat_template
        return entries

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into the existing `folder`; `from_folder` and transformers read it back.

        tokenizer.json and tokenizer_config.json hold the tokenizer, generation_config.json all tokens that end a
        response; a config.json that is there is told the ids too.
        """
        folder = Path(folder)
        names = {"eos_token": self.eos_id, "pad_token": self.pad_id, "bos_token": self.bos_id}
        settings = {name: None if token is None else self.backend.id_to_token(token) for name, token in names.items()}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template}
        settings |= {"clean_up_tokenization_spaces": False}
        self.backend.save(str(folder / "tokenizer.json"))
        kept = {name: value for name, value in settings.items() if value is not None}
        write_json(folder / "tokenizer_config.json", kept)
        ends: Any = list(self.eos_ids) if len(self.eos_ids) > 1 else self.eos_id
        ids = {"eos_token_id": ends, "pad_token_id": self.pad_id, "bos_token_id": self.bos_id}
        ids = {name: value for name, value in ids.items() if value is not None}
        write_json(folder / "generation_config.json", ids)
        config = folder / "config.json"
        if config.exists():
            write_json(config, {**read_json(config), **ids})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; the names of special tokens inside it become those tokens.

        `add_special_tokens=False` leaves out the start token that some tokenizers put in front: right for the rest of a
        text whose beginning is already encoded.

        Raises:
            ModelFileError: the tokenizer makes far more ids than the text has bytes, or fails on the text.
            UnicodeEncodeError: the text holds half of a surrogate pair.
        """
        size = len(text.encode())  # a text that is no UTF-8 is refused here
        with read_from("the tokenizer"):
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if len(ids) > SPECIAL_LIMIT + GROWTH_LIMIT * size:
            raise ModelFileError(f"the tokenizer makes {len(ids)} ids of {len(text)} letters; it is no tokenizer.")
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the token ids [T]; bytes that are no valid UTF-8 become U+FFFD."""
        with read_from("the tokenizer"):
            return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], *, length: int | None = None, add_special_tokens: bool = True
    ) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
        """Left-padded prompts and their mask.

        Args:
            texts: B texts, none of them empty.
            length: the width P [tokens]; by default that of the longest text.
            add_special_tokens: see `encode`.

        Returns:
            ids, int32 [B, P], with `pad_id` at padded places; and mask [B, P], true at real tokens.

        Raises:
            ValueError: no texts, a text without tokens, or a text longer than `length` (nothing is cut silently).
        """
        rows = [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        if not rows:
            raise ValueError("texts is empty; encode_batch needs at least one text.")
        lengths = [len(row) for row in rows]
        if min(lengths) == 0:
            raise ValueError(f"texts[{lengths.index(0)}] has no tokens; every text of a batch must have at least one.")
        width = max(lengths) if length is None else length
        if max(lengths) > width:
            longest = max(range(len(rows)), key=lengths.__getitem__)
            raise ValueError(f"texts[{longest}] has {lengths[longest]} tokens, but length is {width}.")
        ids = np.full((len(rows), width), self.pad_id, np.int32)
        mask = np.zeros((len(rows), width), bool)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = row
            mask[index, width - len(row) :] = True
        return ids, mask

    def decode_batch(
        self,
        ids: Int[np.ndarray, "B T"],
        mask: Bool[np.ndarray, "B T"] | None = None,
        *,
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """Texts of the rows of `ids` [B, T], of their tokens under `mask` [B, T] where one is given."""
        rows = np.asarray(ids)
        kept = np.ones(rows.shape, bool) if mask is None else np.asarray(mask)
        real = [row[keep] for row, keep in zip(rows, kept, strict=True)]
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in real]


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte (id = byte), special tokens from id 256 on: for models trained from scratch.

    Args:
        specials: further special tokens, after the three that are always there.
    """

    PAD = "<|pad|>"
    BOS = "<|bos|>"
    EOS = "<|eos|>"

    def __init__(self, specials: Sequence[str] = ()) -> None:
        names = [self.PAD, self.BOS, self.EOS, *specials]
        if len(set(names)) < len(names) or "" in names:
            raise ValueError(f"specials is {list(specials)}; names must differ, be non-empty and not be {names[:3]}.")
        vocabulary = {letter: byte for byte, letter in enumerate(byte_alphabet())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        super().__init__(backend, pad_id=256, bos_id=257, eos_id=258)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise a ModelFileError unless a model with `vocab_size` rows fits: a row per id, and little padding."""
    spare = vocab_size - tokenizer.vocab_size
    if 0 <= spare <= PADDING_LIMIT:
        return
    raise ModelFileError(
        f"tokenizer and model do not belong together: the tokenizer has {tokenizer.vocab_size} ids, the model "
        f"{vocab_size} rows (it may have up to {PADDING_LIMIT} more than the tokenizer, never fewer)."
    )


def byte_alphabet() -> list[str]:
    """The printable letter that byte-level BPE writes for each of the 256 bytes, in the order of the bytes.

    Visible Latin-1 characters stand for themselves; the other bytes take the letters from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(substitutes)) for byte in range(256)]
