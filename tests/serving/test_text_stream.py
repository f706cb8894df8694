"""Texts that come token by token: whole characters, and nothing of a stop string."""

import numpy as np
import pytest

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.serving.text_stream import TextStream

TEXT = "naïve café 日本語 🙂🙂 end\n"
TOKENIZER = ByteTokenizer()


def pieces(ids, **options) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, **options)
    found = []
    for token in ids:
        if stream.stopped:
            break
        found.append(stream.feed(token))
    return [*found, stream.finish()], stream


def test_characters_are_whole_and_none_is_lost():
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False)
    found, stream = pieces(ids)
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found)
    assert len([piece for piece in found if piece]) == len(TEXT)
    assert not stream.stopped


def test_bytes_that_are_no_text_are_marked_and_do_not_hold_the_rest_back():
    ids = [0x80] * 9 + list(b"abc") + [0xF0, 0x9F]
    found, _ = pieces(ids)
    text = "".join(found)
    assert text == TOKENIZER.decode(ids)
    assert "".join(found[:6]).startswith("\ufffd")


@pytest.mark.parametrize(
    "ids",
    [
        [0xFF, 0xFF, 0xE2, 0x82, 0xAC],
        [0xE2, 0xFF, 0xE2, 0x82, 0xAC, 0x61],
        [0xF0, 0x9F, 0xFF, *"🙂€".encode()],
        [0x80] * 300 + list("€".encode()),
        [0xF0] * 300 + [0x9F, 0x99, 0x82, 258, 0xE2],
        *np.random.default_rng(0).integers(0, 256, (20, 100)).tolist(),
        *np.random.default_rng(1).choice([0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF, 0x61], (20, 100)).tolist(),
    ],
)
def test_the_text_is_what_decoding_all_of_it_gives(ids):
    """Where bytes that are no text stand before, inside and behind characters."""
    found, stream = pieces(ids)
    assert "".join(found) == TOKENIZER.decode(ids)
    assert len(stream._window) <= 65


@pytest.mark.parametrize(
    "stop", [["café"], ["zz", "🙂 e"], ["\n"], ["é 日", "é"], ["nothing of it"], ["end\nand more"]]
)
def test_a_stop_string_and_what_follows_never_come(stop):
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False)
    found, stream = pieces(ids, stop=stop)
    places = [TEXT.find(one) for one in stop if one in TEXT]
    assert "".join(found) == (TEXT[: min(places)] if places else TEXT)
    assert stream.stopped == bool(places)
    # Nothing is sent that may be the beginning of one.
    sent = ""
    for piece in found:
        sent += piece
        assert not any(one in sent for one in stop)


def test_special_tokens_have_no_text_unless_asked_for():
    ids = [257, *b"hi", 258]
    assert "".join(pieces(ids)[0]) == "hi"
    assert "".join(pieces(ids, skip_special_tokens=False)[0]) == "<|bos|>hi<|eos|>"
