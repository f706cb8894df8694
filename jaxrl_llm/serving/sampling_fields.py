"""How a request wants its answers drawn: the fields that completions and chats share."""

import dataclasses
import secrets
from typing import Any

import numpy as np

from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.sampling import SMALLEST_TEMPERATURE
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.fields import Fields
from jaxrl_llm.serving.generation import Generation

MOST_ANSWERS = 128
"""Answers of one request."""
MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop strings, and letters of one."""
LARGEST_TEMPERATURE = 100.0
"""Above it every token is as likely as any other."""
MODES = ("raw_logprobs", "processed_logprobs")
"""Which log-probs are reported: before temperature and nucleus, or of the distribution that drew."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "samplers": (["temperature"],),
    "modalities": (["text"],),
}
"""Fields that are not supported, and the values of theirs that change nothing."""
IGNORED = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "return_tokens",
    "verbose",
)
"""Fields that say nothing about the answer."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn and reported.

    Attributes:
        count: answers per prompt.
        seed: of the request; drawn where none was given.
        processed: whether the log-probs of the drawing distribution are reported.
        return_ids: whether token ids are reported.
        ids_as_tokens: whether tokens are written as "token_id:7".
        stream, usage: whether pieces are sent, and at their end how many tokens there were.
    """

    count: int
    seed: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    end_ids: frozenset[int]
    skip_special_tokens: bool
    processed: bool
    return_ids: bool
    ids_as_tokens: bool
    stream: bool
    usage: bool

    def generation(
        self,
        prompt: tuple[int, ...],
        index: int,
        *,
        max_tokens: int,
        listed: int = 0,
        score_prompt: bool = False,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Answer number `index` of the request."""
        return Generation(
            prompt=prompt,
            seed=np.random.SeedSequence([self.seed, index]).generate_state(2, np.uint32),
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            end_ids=self.end_ids,
            stop=self.stop,
            grammar=grammar,
            listed=listed,
            score_prompt=score_prompt,
            skip_special_tokens=self.skip_special_tokens,
        )


def read_sampling(fields: Fields, *, end_ids: tuple[int, ...], vocab_size: int) -> Sampling:
    """The fields of a body.

    Args:
        fields: of the body.
        end_ids: tokens that end an answer of this model.
        vocab_size: of the model.

    Raises:
        APIError: a field that cannot be.
    """
    for field, values in NEUTRAL.items():
        fields.only(field, *values)
    fields.ignore(*IGNORED)
    temperature = fields.number("temperature", 1.0, 0.0, LARGEST_TEMPERATURE)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise bad("top_p is 0; expected a number in (0, 1].", "top_p")
    if 0 < temperature < SMALLEST_TEMPERATURE:
        raise bad(f"temperature is {temperature}; expected 0 or at least {SMALLEST_TEMPERATURE}.", "temperature")
    mode = fields.text("logprobs_mode", MODES[0])
    if mode not in MODES:
        raise bad(f"logprobs_mode is {mode!r:.80}; expected one of {', '.join(MODES)}.", "logprobs_mode")
    further = fields.integers("stop_token_ids", low=0, high=vocab_size - 1, most=64)
    ends = frozenset(further) | (frozenset() if fields.flag("ignore_eos") else frozenset(end_ids))
    given = fields.get("seed")
    seed = secrets.randbits(63) if given is None else fields.integer("seed", 0, -(2**63), 2**64 - 1) % 2**64
    count = fields.integer("n", 1, 1, MOST_ANSWERS)
    fields.only("best_of", count)
    skip = fields.get("skip_special_tokens")
    options = fields.inner("stream_options")
    usage = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.require_all_read()
    return Sampling(
        count=count,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        stop=fields.texts("stop", most=MOST_STOPS, longest=LONGEST_STOP),
        end_ids=ends,
        skip_special_tokens=True if skip is None else fields.flag("skip_special_tokens"),
        processed=mode == MODES[1],
        return_ids=fields.flag("return_token_ids"),
        ids_as_tokens=fields.flag("return_tokens_as_token_ids"),
        stream=fields.flag("stream"),
        usage=usage,
    )
