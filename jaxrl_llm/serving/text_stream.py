"""The text of tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from jaxrl_llm.models.tokenizers import Tokenizer

LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, each of which may be a token."""
LONGEST_WINDOW = 64
"""Tokens that are decoded again while nothing but such bytes comes."""
UNKNOWN = "\ufffd"


class TextStream:
    """Decodes tokens one by one, up to the first stop string.

    What `feed` and `finish` give, joined, is the decoded text of all tokens up to the stop string, wherever characters
    are cut between tokens; bytes that are no UTF-8 become U+FFFD. A token's text is decoded with those before it, since
    tokenizers may write it otherwise at the beginning of a text.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer; they are not part of it.
        skip_special_tokens: whether special tokens have no text.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), skip_special_tokens
        # The last tokens, how many of them were there when all was written out, and letters of theirs that are out.
        self._window: list[int] = []
        self._read, self._out = 0, 0
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """What a further token brings."""
        self._window.append(token)
        return self._give(self._decoded(last=False), last=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return self._give(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        text = self._text(self._window)
        # The last bytes may become a character with the next tokens; those before them are what they are.
        unknown = len(text) - len(text.rstrip(UNKNOWN))
        end = len(text) - (0 if last else min(unknown, LONGEST_CHARACTER - 1))
        new, self._out = text[self._out : end], max(self._out, end)
        if end == len(text):
            self._cut(self._read)
            self._read = len(self._window)
        elif len(self._window) > LONGEST_WINDOW:
            half = len(self._window) // 2
            before = self._text(self._window[:half])
            if len(before) <= self._out and before + self._text(self._window[half:]) == text:
                self._cut(half)
        return new

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)

    def _cut(self, count: int) -> None:
        """Drop the first tokens of the window, whose text is out."""
        left = self._window[count:]
        self._out -= len(self._text(self._window)) - len(self._text(left))
        self._window, self._read = left, max(self._read - count, 0)

    def _give(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text begin this stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
