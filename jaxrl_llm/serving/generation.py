"""One answer that is being generated: what was asked for, and what there is of it."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from llguidance import LLMatcher

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.slot_decoder import Drawn
from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.text_stream import TextStream
from jaxrl_llm.typing import UInt32

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is asked for.

    Attributes:
        prompt: token ids.
        seed: key data of the random numbers.
        max_tokens: of the answer.
        temperature, top_p: see `slot_decoder.Draw`.
        end_ids: tokens that end the answer; the one that does belongs to its ids and not to its text.
        stop: texts that end it; not part of its text.
        grammar: that the answer's text is held to.
        listed: most likely tokens to be listed at each place.
        score_prompt: whether log-probs of the prompt are asked for.
        skip_special_tokens: whether special tokens have no text.
    """

    prompt: tuple[int, ...]
    seed: UInt32[np.ndarray, " 2"]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    listed: int = 0
    score_prompt: bool = False
    skip_special_tokens: bool = True


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        id: its number.
        text: what it adds to the text; empty where a character is not whole yet.
        log_prob: at temperature 1 over the allowed tokens [nats].
        log_prob_behaviour: under the distribution that drew it [nats].
        top: most likely tokens and their log-probs.
        version: of the weights.
    """

    id: int
    text: str
    log_prob: float
    log_prob_behaviour: float
    top: tuple[tuple[int, float], ...]
    version: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: whole characters.
        tokens: as they were drawn; their text may come later, or never where it is a stop string.
        finish: why the answer ended; None while it goes on.
        error: instead of more.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    error: APIError | None = None


class Job:
    """An answer on its way. What it says is told to `deliver`, in the engine's thread.

    Args:
        generation: what is asked for.
        tokenizer: of the model.
        deliver: is given each piece.
        seconds: that it may take, its wait for a slot included.
        begun: when its request came, on `time.monotonic`'s clock; None: now.
        matcher: of its grammar, at the beginning.

    Attributes:
        prompt_log_probs: of the prompt's tokens but the first, as they are scored.
        reused: tokens of the prompt that a slot held already; None until it is read.
        ended: nothing more will come.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        deliver: Callable[[Piece], None],
        *,
        seconds: float,
        begun: float | None = None,
        matcher: LLMatcher | None = None,
    ) -> None:
        self.asked, self._deliver, self.matcher = generation, deliver, matcher
        self.begun = time.monotonic() if begun is None else begun
        self.deadline = self.begun + seconds
        self.prompt_log_probs: list[float] = []
        self.reused: int | None = None
        self.count = 0
        self.ended = False
        self._text = TextStream(tokenizer, generation.stop, skip_special_tokens=generation.skip_special_tokens)

    def take(self, drawn: Drawn, version: int, *, room: int, ended: bool = False) -> None:
        """A token was drawn.

        Args:
            drawn: the token.
            version: of the weights that drew it.
            room: tokens that the slot still has room for.
            ended: whether its grammar ended with it.
        """
        self.count += 1
        ends = ended or drawn.token in self.asked.end_ids
        text = "" if ends else self._text.feed(drawn.token)
        finish: FinishReason | None = None
        if ends or self._text.stopped:
            finish = "stop"
        elif self.count >= self.asked.max_tokens or room <= 0:
            finish = "length"
        listed = slice(self.asked.listed)
        pairs = zip(drawn.top_tokens[listed].tolist(), drawn.top_log_prob[listed].tolist(), strict=True)
        # A grammar may allow fewer tokens than are to be listed.
        top = tuple((one, value) for one, value in pairs if value > -math.inf)
        token = Token(drawn.token, text, drawn.log_prob, drawn.log_prob_behaviour, top, version)
        self._send(Piece(text + self._text.finish() if finish else text, (token,), finish))

    def fail(self, error: APIError) -> None:
        """End without more."""
        self._send(Piece(error=error))

    def _send(self, piece: Piece) -> None:
        if self.ended:
            return
        self.ended = piece.finish is not None or piece.error is not None
        self._deliver(piece)
