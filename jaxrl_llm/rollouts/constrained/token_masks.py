"""From grammars to masks over tokens: which tokens may come next in each row.

    masker = TokenMasker(tokenizer, vocab_size)      once per tokenizer and model
    rows = masker.start([grammar, None])             a row per text; None writes what it likes
    rows.mask()                                      uint32 [B, W]: token v is bit v % 32 of word v // 32
    rows.advance(row, token)                         the token that was chosen
    rows.is_finished(row)                            whether that was a token that ends the text
    rows.replace(row, grammar)                       a new text in the row
    rows.rollback(row, count)                        take the last tokens back
    rows.copy()                                      the same rows, to be advanced apart

What a grammar allows is a set of texts, so every way to cut an allowed text into tokens is allowed, and a token may
span parts of the grammar. A token that ends the text is allowed exactly where the text may end. Special tokens are
allowed only where the grammar names them, ids without a text never.
"""

import functools
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor
from llguidance import LLMatcher
from llguidance import LLParserLimits
from llguidance import LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import check_vocabulary
from jaxrl_llm.rollouts.constrained.grammars import Grammar
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import UInt32

KEPT_GRAMMARS = 64
"""Compiled grammars that a masker keeps."""


class TokenMasker:
    """Grammars over the tokens of one tokenizer.

    Args:
        tokenizer: of the policy.
        vocab_size: V, rows of the model's head; those beyond the tokenizer's ids are never allowed by a grammar.
        end_ids: tokens that end a text; None for those of the tokenizer.
        threads: that compute masks of several rows at once.

    Raises:
        ValueError: no thread, no token that ends a text, or one that is none of the vocabulary.
        ModelFileError: the model does not belong to the tokenizer.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, end_ids: Sequence[int] | None = None, threads: int = 1
    ) -> None:
        check_vocabulary(tokenizer, vocab_size)
        self.end_ids = tuple(tokenizer.eos_ids if end_ids is None else end_ids)
        if not self.end_ids or not all(0 <= token < tokenizer.vocab_size for token in self.end_ids):
            raise ValueError(
                f"end_ids is {self.end_ids}; it must name a token or more, each of 0 .. {tokenizer.vocab_size - 1}."
            )
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.vocab_size = vocab_size
        self._tokens = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(self.end_ids))
        self._executor = LLExecutor(threads)
        self._limits = LLParserLimits(verbose_errors=False)
        self._compiled = functools.lru_cache(KEPT_GRAMMARS)(self._compile)

    @property
    def words(self) -> int:
        """W, 32-bit words of a mask."""
        return -(-self.vocab_size // 32)

    def start(self, grammars: Sequence[Grammar | None]) -> "GrammarRows":
        """Rows at the beginning of a text each.

        Args:
            grammars: of each row; None allows everything.

        Raises:
            ValueError: a grammar names a special token that the tokenizer does not have, or is too large.
        """
        return GrammarRows(self, [self.matcher(grammar) for grammar in grammars])

    def replay(
        self, grammars: Sequence[Grammar | None], tokens: Int[np.ndarray, "B R"], token_mask: Bool[np.ndarray, "B R"]
    ) -> UInt32[np.ndarray, "B R W"]:
        """What was allowed at each token of written texts: so that no batch need carry W words a token.

        Args:
            grammars: of each row.
            tokens: the responses, right-padded.
            token_mask: which tokens are real.

        Returns:
            The masks; everything is allowed at padding.

        Raises:
            ValueError: a token that its grammar does not allow.
        """
        rows, found = self.start(grammars), np.empty((*tokens.shape, self.words), np.uint32)
        for column in range(tokens.shape[1]):
            found[:, column] = rows.mask()
            for row in np.flatnonzero(token_mask[:, column]):
                rows.advance(int(row), tokens[row, column])
        found[~np.asarray(token_mask, bool)] = _everything(self.vocab_size).view(np.uint32)
        return found

    def matcher(self, grammar: Grammar | None) -> LLMatcher | None:
        """The grammar at the beginning of a text; see `start`."""
        return None if grammar is None else self._compiled(grammar).deep_copy()

    def fill(self, matchers: Sequence[tuple[LLMatcher, int]], mask: Int[np.ndarray, "B W"]) -> None:
        """Write the masks of these matchers into the rows of the numbers beside them."""
        if matchers:
            fill_next_token_bitmask_par(self._executor, [*matchers], mask)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = LLMatcher(self._tokens, grammar.source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(f"the grammar cannot be used with this tokenizer: {_sentence(matcher)}")
        return matcher


class GrammarRows:
    """Texts that are being written, one per row; made by `TokenMasker.start`."""

    def __init__(self, masker: TokenMasker, matchers: Sequence[LLMatcher | None]) -> None:
        self._masker, self._matchers = masker, list(matchers)
        # Tokens of each row without its end, which no matcher is told of.
        self._lengths, self._finished = [0] * len(matchers), [False] * len(matchers)

    def __len__(self) -> int:
        return len(self._matchers)

    def mask(self, rows: Sequence[int] | None = None) -> UInt32[np.ndarray, "B W"]:
        """Which tokens may come next; everything in a row that has no grammar or is finished.

        Args:
            rows: the rows that are asked, in this order; None for all.

        Returns:
            A new array: bit v % 32 of word v // 32 is token v, bits beyond the vocabulary are 0.

        Raises:
            RuntimeError: a grammar needs more work for a step than its limit, or allows no token.
        """
        asked = range(len(self)) if rows is None else rows
        # A new array each time: a device may still read the last one.
        mask = np.zeros((len(asked), self._masker.words), np.int32)
        held = []
        for place, row in enumerate(asked):
            matcher = self._matchers[row]
            if matcher is None or self.is_finished(row):
                mask[place] = _everything(self._masker.vocab_size)
            else:
                held.append((matcher, place))
        self._masker.fill(held, mask)
        for matcher, place in held:
            if matcher.is_error():
                raise RuntimeError(f"the grammar of row {asked[place]} failed: {_sentence(matcher)}")
            if not mask[place].any():
                raise RuntimeError(f"the grammar of row {asked[place]} allows no token of this vocabulary.")
        return mask.view(np.uint32)

    def advance(self, row: int, token: int) -> None:
        """The next token of a row.

        Raises:
            ValueError: the row is finished, or its grammar does not allow the token here.
        """
        token, matcher = int(token), self._matchers[row]
        if self.is_finished(row):
            raise ValueError(f"row {row} is finished; it takes no token {token}.")
        if not 0 <= token < self._masker.vocab_size:
            raise ValueError(f"token is {token}; it must be one of 0 .. {self._masker.vocab_size - 1}.")
        if token in self._masker.end_ids:
            taken = self._finished[row] = self.is_accepting(row)
        else:
            taken = matcher is None or matcher.try_consume_tokens([token]) == 1
            self._lengths[row] += taken
        if not taken:
            raise ValueError(f"the grammar of row {row} does not allow token {token} here.")

    def is_finished(self, row: int) -> bool:
        """Whether the row's last token ended the text."""
        return self._finished[row]

    def is_accepting(self, row: int) -> bool:
        """Whether the row's text, as it is, is one of its grammar's; of a row without one it always is."""
        matcher = self._matchers[row]
        return matcher is None or matcher.is_accepting()

    def rollback(self, row: int, count: int) -> None:
        """Take back the last tokens of a row, its end among them.

        Raises:
            ValueError: there are fewer.
        """
        length = self._lengths[row] + self._finished[row]
        if not 0 <= count <= length:
            raise ValueError(f"count is {count}; row {row} has {length} tokens.")
        matcher, steps = self._matchers[row], max(count - self._finished[row], 0)
        if matcher is not None and steps and not matcher.rollback(steps):
            raise RuntimeError(f"the grammar of row {row} cannot go back: {_sentence(matcher)}")
        self._finished[row] = self._finished[row] and not count
        self._lengths[row] -= steps

    def replace(self, row: int, grammar: Grammar | LLMatcher | None) -> None:
        """Begin a new text in a row; see `TokenMasker.start`.

        Args:
            row: its number.
            grammar: of the text, or its matcher, which the row owns from now on: nothing is compiled then.
        """
        matcher = self._masker.matcher(grammar) if isinstance(grammar, Grammar) else grammar
        self._matchers[row], self._lengths[row], self._finished[row] = matcher, 0, False

    def copy(self) -> "GrammarRows":
        """The same rows, which from now on are advanced apart from these."""
        copied = GrammarRows(self._masker, [None if m is None else m.deep_copy() for m in self._matchers])
        copied._lengths, copied._finished = [*self._lengths], [*self._finished]
        return copied


@functools.lru_cache
def _everything(vocab_size: int) -> Int[np.ndarray, " W"]:
    bits: Bool[np.ndarray, " V"] = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[:vocab_size] = True
    return np.packbits(bits, bitorder="little").view("<i4")


def _sentence(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:400]
