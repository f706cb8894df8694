"""What servers answer, parsed once into checked records: nothing of an answer is used anywhere else.

Every field of JSON is held to its type, every id to the vocabulary and every log-prob to what one can be. What is wrong
is a `MalformedError` that says so; whether another attempt may mend it is the engine's to judge.
"""

import json
import math
import re
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxrl_llm.rollouts.engines.protocol import EngineError
from jaxrl_llm.typing import Float

LARGEST_LOG_PROB = 1e-4
"""A log-prob may round to this much above 0, and is then 0 [nats]."""
SMALLEST_LOG_PROB = -1e5
"""No token that was sampled is less likely [nats]; vLLM writes -9999 for minus infinity."""
LONGEST_SHOWN = 80
"""Characters of a server's value that a sentence shows."""

BASE_BYTES, TOKEN_BYTES, ENTRY_BYTES = 1 << 20, 1 << 12, 1 << 9
"""Of an answer: whatever it has, for each token of prompt and response, and for each listed alternative."""


class MalformedError(Exception):
    """An answer that is not what was asked for."""


class CutOffError(MalformedError):
    """A response that ends too early.

    Attributes:
        tokens: what there is of it.
    """

    def __init__(self, tokens: Sequence[int], width: int, reason: Any, ends: Collection[int]) -> None:
        self.tokens = list(tokens)
        super().__init__(
            f"the response is cut off after {len(tokens)} of {width} tokens (finish_reason {_shown(reason)}, last "
            f"token {self.tokens[-1:]}, eos_ids {tuple(ends)})"
        )


class Sampled(NamedTuple):
    """What a server says it sampled.

    Attributes:
        tokens: ids, up to and with the first end token.
        log_probs: of each [nats]; another number of them where the server left some out, and then of no use.
    """

    tokens: list[int]
    log_probs: list[float]


def size_limit(tokens: int, *, listed: int = 0) -> int:
    """The bytes that an answer may have.

    Args:
        tokens: of prompt and response.
        listed: alternatives with a log-prob each.
    """
    return BASE_BYTES + TOKEN_BYTES * tokens + ENTRY_BYTES * listed


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        MalformedError: it is none.
    """
    try:
        value = json.loads(body, object_pairs_hook=_fields)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"the answer is no JSON ({type(error).__name__}: {error})") from None
    return _object(value, "the answer")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose fields none is there twice: readers would take different ones."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise MalformedError("the answer has a field twice in one object")
    return fields


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError(f"{name} is {_shown(value)}; expected a JSON object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    """A list; null is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise MalformedError(f"{name} is {_shown(value)}; expected a list")
    return value


def token_id(value: Any, *, vocab_size: int | None) -> int:
    """A token's id.

    Raises:
        MalformedError: it is no whole number (a truth value is none), or outside the vocabulary.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedError(f"it has token {_shown(value)}, which is no whole number")
    if value < 0 or (vocab_size is not None and value >= vocab_size):
        range_ = f"0 .. {vocab_size - 1}" if vocab_size is not None else "0 and above"
        raise MalformedError(f"it has token {_shown(value)}, which is outside the vocabulary {range_}")
    return value


def log_prob(value: Any, place: int, count: int) -> float:
    """A log-prob [nats].

    Raises:
        MalformedError: it is no number, not finite, above 0, or that of a token that cannot have been sampled.
    """
    name = f"log-prob {place} of {count} is"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedError(f"{name} {_shown(value)}, no finite number")
    number = _as_float(value)
    if not math.isfinite(number):
        raise MalformedError(f"{name} {_shown(value)}, no finite number")
    if not SMALLEST_LOG_PROB <= number <= LARGEST_LOG_PROB:
        raise MalformedError(f"{name} {_shown(value)}; a log-prob is at most 0 and at least {SMALLEST_LOG_PROB:g}")
    return min(number, 0.0)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _log_probs(values: Sequence[Any], start: int = 0) -> list[float]:
    return [log_prob(value, place, len(values)) for place, value in enumerate(values) if place >= start]


def choice_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The one choice of a completion.

    Raises:
        MalformedError: there is none, or more than the one that was asked for.
    """
    choices = _list(answer.get("choices"), "choices")
    if len(choices) != 1:
        raise MalformedError(f"the answer has {len(choices) or 'no'} choices; one was asked for")
    return _object(choices[0], "the first choice")


def _marked_ids(content: Mapping[str, Any], *, vocab_size: int | None) -> list[int | None]:
    """Ids of tokens that are written "token_id:7"; None for others."""
    return [_marked(token, vocab_size) for token in _list(content.get("tokens"), "logprobs.tokens")]


def _marked(token: Any, vocab_size: int | None) -> int | None:
    if not isinstance(token, str) or not token.startswith("token_id:"):
        return None
    digits = token.removeprefix("token_id:")
    if not re.fullmatch(r"-?[0-9]{1,18}", digits):
        raise MalformedError(f"it has token {_shown(token)}, whose id is no whole number")
    return token_id(int(digits), vocab_size=vocab_size)


def _require_agreement(whole: Sequence[int], others: Sequence[int | None], what: str) -> None:
    """Raise unless the ids that are known beside the log-probs occur in that order among those of the response; place
    by place where there are as many."""
    if len(others) == len(whole):
        for place, (token, other) in enumerate(zip(whole, others, strict=True)):
            if other not in (None, token):
                raise MalformedError(f"token {place} is {token}, and {other} {what}")
        return
    rest = iter(whole)
    for other in others:
        if other is not None and other not in rest:
            raise MalformedError(f"token {other} {what} is not among the sampled ones in that order")


def sampled_tokens(
    answer: Mapping[str, Any], *, server: str, vocab_size: int | None = None
) -> tuple[list[int], list[float]]:
    """Ids and log-probs of a completion, in whichever way the server writes them; fewer log-probs where some miss.

    Raises:
        EngineError: it has neither, or log-probs without ids; no other attempt would mend that.
        MalformedError: a field is not what it must be, or ids contradict each other.
    """
    choice = choice_of(answer)
    verbose = _object(answer.get("__verbose") or {}, "__verbose")
    said = [_list(choice.get("token_ids"), "token_ids"), _list(verbose.get("tokens"), "__verbose.tokens")]
    whole, again = ([token_id(token, vocab_size=vocab_size) for token in tokens] for tokens in said)
    if whole and again and whole != again:
        raise MalformedError("the ids in token_ids and in __verbose.tokens differ")
    whole = whole or again
    content = _object(choice.get("logprobs") or {}, "logprobs")
    if not content and not whole:
        raise EngineError(f"{server} sent no log-probs; start it so that it does, and with a limit of at least 1.")
    ids: list[int | None]
    if content.get("content") is not None:
        entries = [_object(entry, "an entry of logprobs.content") for entry in _list(content["content"], "content")]
        ids = [_entry_id(entry, vocab_size) for entry in entries]
        log_probs = _log_probs([entry.get("logprob") for entry in entries])
    else:
        ids = _marked_ids(content, vocab_size=vocab_size)
        log_probs = _log_probs(_list(content.get("token_logprobs"), "logprobs.token_logprobs"))
    if whole:
        _require_agreement(whole, ids, "beside its log-prob")
        return whole, log_probs
    known = [token for token in ids if token is not None]
    if len(known) < len(ids) or (log_probs and not ids):
        raise EngineError(f"{server} does not say which token ids it sampled; a text cannot replace them.")
    return known, log_probs


def _entry_id(entry: Mapping[str, Any], vocab_size: int | None) -> int | None:
    """The id of an entry; None where only its text is given."""
    marked = _marked(entry.get("token"), vocab_size)
    if entry.get("id") is None:
        return marked
    token = token_id(entry["id"], vocab_size=vocab_size)
    if marked not in (None, token):
        raise MalformedError(f"an entry has the id {token} and the token {_shown(entry.get('token'))}")
    return token


def ended(
    tokens: Sequence[int], log_probs: Sequence[float], *, ends: Collection[int], width: int, reason: Any
) -> Sampled:
    """A response up to and with its first end token.

    Args:
        tokens: ids.
        log_probs: of each, or of some.
        ends: ids of the end tokens.
        width: tokens that were asked for.
        reason: why it ended, as the server says.

    Raises:
        CutOffError: it is shorter than asked for without an end token.
        MalformedError: it is longer than asked for.
    """
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    kept = list(tokens[:length])
    if length > width:
        raise MalformedError(f"the response has {length} tokens where at most {width} were asked for")
    if length < width and not (kept and kept[-1] in ends):
        raise CutOffError(kept, width, reason, ends)
    return Sampled(kept, list(log_probs[:length] if len(log_probs) == len(tokens) else log_probs))


def echoed_log_probs(answer: Mapping[str, Any], text: Sequence[int], *, start: int) -> list[float] | None:
    """Log-probs of the tokens of a text from place `start` on; None where they were not sent back.

    Args:
        answer: a completion with the prompt echoed.
        text: ids that were sent; nothing is said about the first, which has no context.
        start: at least 1.

    Raises:
        MalformedError: another text came back, or a log-prob is none.
    """
    content = _object(choice_of(answer).get("logprobs") or {}, "logprobs")
    found = _list(content.get("token_logprobs"), "logprobs.token_logprobs")[: len(text)]
    if len(found) < len(text):
        return None
    for sent, came in zip(text, _marked_ids(content, vocab_size=None), strict=False):
        if came not in (None, sent):
            raise MalformedError(f"token {came} came back where {sent} was sent")
    return _log_probs(found, start=1)[start - 1 :]


def listed_log_prob(answer: Mapping[str, Any], token: int) -> float | None:
    """The log-prob of one token in the list of all that a completion's first token has; None where it is not there.

    Raises:
        MalformedError: there is no such list, or it is none of log-probs.
    """
    content = _object(choice_of(answer).get("logprobs") or {}, "logprobs")
    entries = _list(content.get("content"), "logprobs.content")
    if not entries:
        raise MalformedError("the answer has no list of log-probs")
    for entry in _list(_object(entries[0], "an entry of logprobs.content").get("top_logprobs"), "top_logprobs"):
        if _entry_id(_object(entry, "an entry of top_logprobs"), None) == token:
            return log_prob(entry.get("logprob"), 0, 1)
    return None


def tokenized(body: bytes) -> list[int]:
    """The ids that a server cuts a text into.

    Raises:
        MalformedError: the answer has none.
    """
    answer = parsed(body)
    if "tokens" not in answer:
        raise MalformedError("the answer has no tokens")
    return [token_id(token, vocab_size=None) for token in _list(answer["tokens"], "tokens")]


class Completion(NamedTuple):
    """What llama.cpp's own /completion says.

    Attributes:
        tokens: ids that were sampled.
        ids: those with a log-prob; without the ones that end inside a character.
        values: beside each of `ids`: a log-prob, or a probability after truncation.
        reason: why it stopped.
    """

    tokens: list[int]
    ids: list[int]
    values: list[Any]
    reason: Any


def completion_of(body: bytes, *, vocab_size: int) -> Completion:
    """A completion of llama.cpp.

    Raises:
        MalformedError: it is not what llama.cpp answers.
    """
    answer = parsed(body)
    tokens = [token_id(token, vocab_size=vocab_size) for token in _list(answer.get("tokens"), "tokens")]
    entries = _entries(answer)
    ids = [token_id(entry.get("id"), vocab_size=vocab_size) for entry in entries]
    if len(ids) > len(tokens):
        raise MalformedError(f"it has log-probs of {len(ids)} tokens and {len(tokens)} tokens")
    _require_agreement(tokens, ids, "beside its log-prob")
    values = [entry.get("logprob", entry.get("prob")) for entry in entries]
    return Completion(tokens, ids, values, answer.get("stop_type"))


def _entries(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = "completion_probabilities"
    return [_object(entry, f"an entry of {name}") for entry in _list(answer.get(name), name)]


def log_probs_of(values: Sequence[Any], *, probabilities: bool) -> list[float]:
    """The log-probs that a completion of llama.cpp gives [nats].

    Args:
        values: of a `Completion`.
        probabilities: whether they are probabilities in (0, 1].

    Raises:
        MalformedError: one cannot be.
    """
    if not probabilities:
        return _log_probs(values)
    found = []
    for place, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= math.exp(LARGEST_LOG_PROB):
            raise MalformedError(f"probability {place} of {len(values)} is {_shown(value)}; expected one in (0, 1]")
        found.append(min(math.log(value), 0.0))
    return found


def distribution_of(body: bytes, *, vocab_size: int) -> Float[np.ndarray, " V"]:
    """The log-probs of the whole vocabulary in a completion of llama.cpp [nats].

    Raises:
        MalformedError: they are not there, or not one for each token.
    """
    entries = _entries(parsed(body))
    if not entries:
        raise MalformedError("it gave no log-probs")
    listed = _list(entries[0].get("top_logprobs"), "top_logprobs")
    if len(listed) != vocab_size:
        raise MalformedError(f"it gave {len(listed)} log-probs; the vocabulary has {vocab_size}")
    result = np.full(vocab_size, np.nan, np.float32)
    try:
        ids, values = [entry["id"] for entry in listed], [entry["logprob"] for entry in listed]
        if set(map(type, ids)) != {int} or not set(map(type, values)) <= {int, float}:
            raise TypeError
        places, numbers = np.array(ids, np.int64), np.array(values, np.float64)
        result[places] = np.clip(numbers, np.finfo(np.float32).min, 0.0)
    except (TypeError, KeyError, IndexError, OverflowError):
        raise MalformedError("its list of all log-probs has an entry that is none") from None
    if np.isnan(result).any() or numbers.max() > LARGEST_LOG_PROB or places.min() < 0:
        raise MalformedError("its list of all log-probs has not one log-prob, at most 0, for each token")
    return result
