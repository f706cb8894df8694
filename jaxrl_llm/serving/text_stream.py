"""The text of tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from jaxrl_llm.models.tokenizers import Tokenizer

LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, each of which may be a token."""
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
        # Tokens from the last that is written out on; those before `_read` are.
        self._window: list[int] = []
        self._read = 0
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
        decode = self._tokenizer.decode
        before = decode(self._window[: self._read], skip_special_tokens=self._skip)
        text = decode(self._window, skip_special_tokens=self._skip)
        waiting = len(self._window) - self._read
        # A character may lack bytes that come with the next tokens; but bytes that are none come with no token.
        if text.endswith(UNKNOWN) and waiting < LONGEST_CHARACTER and not last:
            return ""
        new = text[len(before) :]
        self._window, self._read = self._window[self._read :], waiting
        return new

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
