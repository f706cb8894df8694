"""Masks are the grammar: bit for bit, row by row, through advances, rollbacks, copies and new texts."""

import json

import numpy as np
import pytest

from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.constrained import TokenMasker

END = ByteTokenizer().eos_id
VOCABULARY = 300  # 259 ids of the tokenizer, the rest is padding of the head
MASKER = TokenMasker(ByteTokenizer(["<|call|>"]), VOCABULARY, threads=2)


def allowed(mask: np.ndarray) -> list[list[int]]:
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


def test_each_row_has_its_own_grammar() -> None:
    rows = MASKER.start([Grammar.from_regex("a[b-d]?"), None, Grammar.from_choices(["xy"])])
    mask = rows.mask()
    assert (mask.dtype, mask.shape) == (np.uint32, (3, 10))
    assert allowed(mask) == [[97], [*range(VOCABULARY)], [120]]
    rows.advance(0, 97)
    assert allowed(rows.mask([2, 0])) == [[120], [98, 99, 100, END]]
    assert [rows.is_accepting(row) for row in range(3)] == [True, True, False]
    rows.advance(0, END)
    rows.advance(1, END)
    assert [rows.is_finished(row) for row in range(3)] == [True, True, False]
    assert allowed(rows.mask([0])) == [[*range(VOCABULARY)]]  # anything but an empty mask, which is no distribution


def test_a_text_ends_where_it_may_and_not_before() -> None:
    rows = MASKER.start([Grammar.from_regex("ab")])
    with pytest.raises(ValueError, match=f"row 0 does not allow token {END}"):
        rows.advance(0, END)
    for byte in b"ab":
        rows.advance(0, byte)  # what was refused left no trace
    assert not rows.is_finished(0)
    assert allowed(rows.mask()) == [[END]]
    rows.advance(0, END)
    with pytest.raises(ValueError, match="row 0 is finished"):
        rows.advance(0, 97)


def test_tokens_without_a_text_and_special_ones_are_allowed_where_they_are_named() -> None:
    rows = MASKER.start([Grammar.from_regex("(?s:.*)"), Grammar.from_lark('start: <|call|> "a"')])
    anything, named = allowed(rows.mask())
    assert max(anything) == END
    assert 256 not in anything
    assert 257 not in anything
    assert named == [259]
    rows.advance(1, 259)
    assert allowed(rows.mask([1])) == [[97]]
    with pytest.raises(ValueError, match="token is 300"):
        rows.advance(0, 300)
    with pytest.raises(ValueError, match="cannot be used with this tokenizer"):
        MASKER.start([Grammar.from_lark("start: <|other|>")])


def test_going_back_copying_and_beginning_again() -> None:
    rows = MASKER.start([Grammar.from_regex("a(b|c)d")] * 2)
    for byte in b"abd":
        rows.advance(0, byte)
    rows.advance(0, END)
    other = rows.copy()
    rows.rollback(0, 3)
    assert not rows.is_finished(0)
    assert allowed(rows.mask()) == [[98, 99], [97]]
    assert other.is_finished(0)
    rows.advance(0, 99)
    other.rollback(0, 2)
    assert allowed(other.mask([0])) == allowed(rows.mask([0])) == [[100]]
    with pytest.raises(ValueError, match="row 0 has 2 tokens"):
        rows.rollback(0, 3)
    rows.replace(0, Grammar.from_regex("z"))
    assert allowed(rows.mask()) == [[122], [97]]
    rows.rollback(0, 0)


def test_random_walks_write_texts_of_the_grammar() -> None:
    """SmolLM2's tokens: a walk over allowed ones writes a text of the grammar, and the others are refused."""
    tokenizer = Tokenizer.from_gguf(smollm2_path())
    masker = TokenMasker(tokenizer, tokenizer.vocab_size + 64)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 5}}}
    rows = masker.start([Grammar.from_json_schema(schema | {"required": ["n"], "additionalProperties": False})] * 4)
    generator, texts = np.random.default_rng(0), [[] for _ in range(4)]
    for _ in range(50):
        bits = np.unpackbits(rows.mask().view(np.uint8), axis=1, bitorder="little")
        for row in range(4):
            if rows.is_finished(row):
                continue
            outside = int(generator.choice(np.flatnonzero(bits[row] == 0)))
            with pytest.raises(ValueError, match="does not allow" if outside < masker.vocab_size else "token is"):
                rows.advance(row, outside)
            ends = [token for token in tokenizer.eos_ids if bits[row, token]]
            token = ends[0] if ends else int(generator.choice(np.flatnonzero(bits[row])))
            rows.advance(row, token)
            texts[row].append(token)
    written = [tokenizer.decode(tokens) for row, tokens in enumerate(texts) if rows.is_finished(row)]
    assert all({"n"} <= set(json.loads(text)) <= {"n", "s"} for text in written)
    assert len({*written}) >= 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"end_ids": ()}, "end_ids"),
        ({"end_ids": (260,)}, "end_ids"),
        ({"threads": 0}, "threads"),
        ({"vocab_size": 100}, "do not belong together"),
    ],
)
def test_arguments_that_cannot_be(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TokenMasker(ByteTokenizer(), **{"vocab_size": VOCABULARY} | options)
