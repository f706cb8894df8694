"""Between padded arrays and the lists of token ids that servers take and give."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.rollouts.engines.protocol import EngineSettings
from jaxrl_llm.rollouts.grouping import group_ids
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.sampling import rollout_keys
from jaxrl_llm.rollouts.scoring import response_columns
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Response(NamedTuple):
    """What an engine sampled after a prompt: ids, and the log-probability of each [nats]."""

    tokens: list[int]
    log_probs: list[float]


class Text(NamedTuple):
    """A prompt and the response after it, without padding."""

    prompt: list[int]
    response: list[int]


def _require_tokens(name: str, tokens: np.ndarray, mask: np.ndarray) -> None:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} must be integers with two axes, got {tokens.dtype} of shape {tokens.shape}")
    if mask.shape != tokens.shape:
        raise ValueError(f"the mask of {name} must have its shape {tokens.shape}, got {mask.shape}")


def prompts_of(tokens: Int[np.ndarray, "N P"], mask: Bool[np.ndarray, "N P"], *, vocab_size: int) -> list[list[int]]:
    """The prompts as lists.

    Raises:
        ValueError: shapes that do not fit, a prompt without tokens, or a token outside the vocabulary.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    _require_tokens("prompt_tokens", tokens, mask)
    prompts = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens; every prompt must have at least one.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {number} has the tokens {min(prompt)} .. {max(prompt)}; the engine's are 0 .. {vocab_size - 1}"
            )
    return prompts


def texts_of(
    tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], response_width: int, *, vocab_size: int
) -> list[Text]:
    """Prompt and response of every row.

    Raises:
        ValueError: as `prompts_of`, or no column is left for the prompt.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    _require_tokens("tokens", tokens, mask)
    width = tokens.shape[1] - response_width
    if response_width < 1 or width < 1:
        raise ValueError(
            f"response_width must leave at least one prompt column: 1 .. {tokens.shape[1] - 1} of {tokens.shape[1]}, "
            f"got {response_width}"
        )
    prompts = prompts_of(tokens[:, :width], mask[:, :width], vocab_size=vocab_size)
    answers = (response_columns(array, response_width) for array in (tokens, mask))
    responses = [row[keep].tolist() for row, keep in zip(*answers, strict=True)]
    return [Text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def request_seeds(key: PRNGKey, step: int, prompt_index: Int[np.ndarray, " N"] | None, prompts: int, group: int):
    """One seed per rollout, [N][G], from its own key (`sampling.rollout_keys`): it depends on no other rollout."""
    index = jnp.arange(prompts) if prompt_index is None else jnp.asarray(prompt_index)
    if index.shape != (prompts,):
        raise ValueError(f"prompt_index must have shape {(prompts,)}, got {index.shape}")
    keys = rollout_keys(key, step, index, jnp.arange(group))
    # 31 bits: servers read a seed as a signed number, or 2^32 - 1 as "choose one".
    return np.asarray(jax.vmap(jax.vmap(lambda one: jax.random.bits(one) >> 1))(keys)).tolist()


def rollout_of(
    prompt_tokens: Int[np.ndarray, "N P"],
    prompt_mask: Bool[np.ndarray, "N P"],
    responses: Sequence[Response],
    settings: EngineSettings,
) -> Rollout:
    """The responses, row = prompt * G + sample, beside their prompts."""
    group, width = settings.group_size, settings.max_new_tokens
    prompts, mask = (np.repeat(np.asarray(array), group, axis=0) for array in (prompt_tokens, prompt_mask))
    tokens = np.full((len(responses), width), settings.pad_id, prompts.dtype)
    real, log_probs = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
    for row, response in enumerate(responses):
        length = len(response.tokens)
        tokens[row, :length], log_probs[row, :length], real[row, :length] = response.tokens, response.log_probs, True
    mask, nothing = mask.astype(bool), np.zeros(prompts.shape)
    columns: dict[str, Any] = {
        "tokens": np.concatenate([prompts, tokens], axis=1),
        "token_mask": np.concatenate([mask, real], axis=1),
        "response_mask": np.concatenate([nothing.astype(bool), real], axis=1),
        "log_prob_behaviour": np.concatenate([nothing.astype(np.float32), log_probs], axis=1),
    }
    return Rollout(**columns, group_ids=jax.device_get(group_ids(len(prompt_tokens), group)))


def padded(rows: Sequence[Sequence[float]], width: int) -> Float[np.ndarray, "B R"]:
    """Rows of numbers, filled up with 0 on the right."""
    result = np.zeros((len(rows), width), np.float32)
    for number, row in enumerate(rows):
        result[number, : len(row)] = row
    return result
