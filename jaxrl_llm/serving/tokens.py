"""Tokens as answers write them."""

import functools

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import byte_alphabet

BYTES = {letter: byte for byte, letter in enumerate(byte_alphabet())}


@functools.lru_cache(maxsize=4096)
def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token, which may end inside a character; of a special token its name."""
    name = tokenizer.backend.id_to_token(token)
    if name is None:
        return b""
    special = tokenizer.backend.get_added_tokens_decoder().get(token)
    if special is None and all(letter in BYTES for letter in name):
        return bytes(BYTES[letter] for letter in name)
    return (name if special is not None else tokenizer.decode([token])).encode()


def token_text(tokenizer: Tokenizer, token: int, *, as_id: bool) -> str:
    """A token's text, with U+FFFD for what is no whole character; or "token_id:7"."""
    return f"token_id:{token}" if as_id else token_bytes(tokenizer, token).decode(errors="replace")


def token_name(tokenizer: Tokenizer, token: int, *, as_id: bool) -> str:
    """A token's text, or "bytes:\\x80" where it is none, so that no two bytes have one name; or "token_id:7"."""
    if as_id:
        return token_text(tokenizer, token, as_id=True)
    found = token_bytes(tokenizer, token)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
