"""Responses to prompts while they are being made: steps from which samplers over the decode loop are put together."""

import operator
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from typing import Self

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.experts import as_small
from jaxrl_llm.models.experts import stacked_selections
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_logits
from jaxrl_llm.rollouts.decode import decode_routed
from jaxrl_llm.rollouts.grouping import group_ids
from jaxrl_llm.rollouts.grouping import repeat_prompts
from jaxrl_llm.rollouts.perturb.logits import LogitPerturbation
from jaxrl_llm.rollouts.perturb.logits import context_keys
from jaxrl_llm.rollouts.perturb.logits import next_keys
from jaxrl_llm.rollouts.perturb.rounding import Rounding
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import rollout_keys
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.sampling import token_uniforms
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses: B = N * G rows, row = prompt * G + sample, T = P + R columns.

    Attributes:
        tokens: left-padded prompts followed by right-padded responses.
        token_mask: true at real tokens.
        response_mask: true at sampled tokens, the end token included.
        log_prob_behaviour: of each sampled token under the distribution that drew it (tempered, truncated,
            renormalised) and in the precision that drew it [nats]; 0 elsewhere.
        group_ids: the prompt of each row, 0 .. N - 1.
        selections: the k experts to which each of the L layers that have experts sent each token, where that was
            recorded; of the last sampled token, which no layer read, and at padding they mean nothing.
    """

    tokens: Int[Array, "B T"]
    token_mask: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    log_prob_behaviour: Float[Array, "B T"]
    group_ids: Int[Array, " B"]
    selections: Int[Array, "B T L k"] | None = None


class DecodePlan(NamedTuple):
    """Everything that is fixed when the program is compiled; see `make_generate`."""

    max_new_tokens: int
    group_size: int
    sampling: SamplingSettings
    eos_ids: tuple[int, ...]
    pad_id: int
    decode_dtype: jnp.dtype | None = None
    perturb_logits: LogitPerturbation | None = None
    cache_rounding: Rounding | None = None
    record_selections: bool = False

    @classmethod
    def of(
        cls,
        *,
        max_new_tokens: int,
        group_size: int,
        sampling: SamplingSettings,
        eos_id: int | Sequence[int],
        pad_id: int,
        decode_dtype: jnp.dtype | type | None,
    ) -> Self:
        """The plan, its sizes looked at.

        Raises:
            ValueError: for a size below 1.
        """
        eos_ids = tuple(operator.index(token) for token in (eos_id if isinstance(eos_id, Iterable) else (eos_id,)))
        for name, size in (("max_new_tokens", max_new_tokens), ("group_size", group_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        dtype = None if decode_dtype is None else jnp.dtype(decode_dtype)
        return cls(max_new_tokens, group_size, sampling, eos_ids, pad_id, dtype)

    def ends(self, tokens: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Which tokens end a response."""
        ends = jnp.zeros(tokens.shape, bool)
        for token in self.eos_ids:
            ends = ends | (tokens == token)
        return ends


class Begun(NamedTuple):
    """What the steps only read: the model, the prompts, and the key of each row."""

    weights: DecodeWeights
    prompt: PromptCache
    keys: Key[Array, " B"]


class Progress(NamedTuple):
    """What the decode loop carries; the columns of `tokens`, `mask` and `log_probs` are token numbers in the response.

    Attributes:
        context_keys: of the noise of each row's context; None where the engine has none.
        selections: where each token that was read was sent, those of the prompt first; None where nobody asks.
    """

    count: Int[Array, ""]
    ended: Bool[Array, " B"]
    cache: ResponseCache
    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    log_probs: Float[Array, "B R"]
    context_keys: Key[Array, " B"] | None
    selections: Int[Array, "B T L k"] | None


def ready(
    config: TransformerConfig, plan: DecodePlan, prompt_tokens, prompt_mask, key, step, prompt_index, sample_index
) -> tuple[Int[Array, "N P"], Bool[Array, "N P"], Key[Array, " B"]]:
    """Prompts and the key of each row, once all that is given was looked at."""
    sample_index = jnp.arange(plan.group_size) if sample_index is None else sample_index
    _check(config, plan, prompt_tokens, prompt_mask, step, prompt_index, sample_index)
    if prompt_tokens.dtype.itemsize < 4:
        prompt_tokens = prompt_tokens.astype(jnp.int32)  # a narrow type may not hold what is sampled
    keys = rollout_keys(key, step, prompt_index, sample_index).reshape(-1)
    return prompt_tokens, prompt_mask.astype(bool), keys


def _check(
    config: TransformerConfig, plan: DecodePlan, prompt_tokens, prompt_mask, step, prompt_index, sample_index
) -> None:
    vocabulary = config.vocab_size
    if plan.record_selections and config.experts is None:
        raise ValueError("record_selections is True, and the model has no experts; it must be False.")
    for name, token in (("pad_id", plan.pad_id), *(("eos_id", token) for token in plan.eos_ids)):
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name} must be a token of the vocabulary, 0 .. {vocabulary - 1}, got {token}")
    if prompt_tokens.ndim != 2 or not jnp.issubdtype(prompt_tokens.dtype, jnp.integer):
        raise ValueError(
            f"prompt_tokens must be integers of shape [N, P], got {prompt_tokens.dtype} of shape {prompt_tokens.shape}"
        )
    if not prompt_tokens.size:
        raise ValueError(f"prompt_tokens must hold a prompt, each of one column or more, got {prompt_tokens.shape}")
    if prompt_mask.shape != prompt_tokens.shape:
        raise ValueError(
            f"prompt_mask must have the shape {prompt_tokens.shape} of prompt_tokens, got {prompt_mask.shape}"
        )
    if not jnp.issubdtype(jnp.asarray(step).dtype, jnp.integer):
        raise ValueError(f"step must be an integer, got {jnp.asarray(step).dtype}")
    prompts = prompt_tokens.shape[:1]
    indices = (("prompt_index", prompt_index, prompts), ("sample_index", sample_index, (plan.group_size,)))
    for name, array, shape in indices:
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers of shape {shape}, got {array.dtype} of shape {array.shape}")
    length = prompt_tokens.shape[1] + plan.max_new_tokens
    if length > config.max_positions:
        raise ValueError(
            f"prompt_tokens has {prompt_tokens.shape[1]} columns; with max_new_tokens={plan.max_new_tokens} that is "
            f"{length}, more than max_positions={config.max_positions} of the model"
        )


def read_prompts(
    model: Transformer,
    plan: DecodePlan,
    prompt_tokens: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    keys: Key[Array, " B"],
    noise_key: PRNGKey | None,
) -> tuple[Begun, Float[Array, "V B"], Progress]:
    """Read the prompts: what the steps need, the logits of each row's first token, and no token yet."""
    read = jnp.where(prompt_mask, prompt_tokens, 0)  # what stands at padding may be no token
    hidden, cache, routes = model.prefill_routed(read, prompt_mask, cache_rounding=plan.cache_rounding)
    logits = jnp.repeat(model.logits(hidden[:, -1]).T, plan.group_size, axis=1)
    weights = DecodeWeights.of(model, plan.decode_dtype)
    rows, slots = keys.shape[0], plan.max_new_tokens
    progress = Progress(
        count=jnp.zeros((), jnp.int32),
        ended=jnp.zeros(rows, bool),
        # The last token is never read, so it needs no slot.
        cache=ResponseCache.empty(model.config, rows, slots - 1, weights.dtype),
        tokens=jnp.full((rows, slots), plan.pad_id, prompt_tokens.dtype),
        mask=jnp.zeros((rows, slots), bool),
        log_probs=jnp.zeros((rows, slots), logits.dtype),
        context_keys=_prompt_keys(plan, noise_key, prompt_tokens, prompt_mask),
        selections=_room_for_selections(plan, model.config, routes) if plan.record_selections else None,
    )
    return Begun(weights, PromptCache.of(cache, weights.dtype), keys), logits, progress


def read_last(plan: DecodePlan, begun: Begun, progress: Progress) -> tuple[Float[Array, "V B"], Progress]:
    """Read the token that was drawn last: the logits of the next one."""
    last = progress.count - 1
    tokens = jax.lax.dynamic_index_in_dim(progress.tokens, last, axis=1, keepdims=False)
    arguments = (begun.weights, tokens, last, begun.prompt, progress.cache, plan.cache_rounding)
    hidden, cache, routes = decode_routed(*arguments)
    selections = progress.selections
    if selections is not None:
        place = selections.shape[1] - plan.max_new_tokens + last
        sent = stacked_selections(routes).astype(selections.dtype)
        selections = jax.lax.dynamic_update_slice_in_dim(selections, sent, place, axis=1)
    return decode_logits(begun.weights, hidden), progress._replace(cache=cache, selections=selections)


def as_rollout(
    plan: DecodePlan, prompt_tokens: Int[Array, "N P"], prompt_mask: Bool[Array, "N P"], progress: Progress
) -> Rollout:
    """The responses beside their prompts."""
    prompt_tokens, prompt_mask = prompt_tokens.astype(progress.tokens.dtype), prompt_mask.astype(bool)
    tokens, mask = repeat_prompts(prompt_tokens, prompt_mask, plan.group_size)
    return Rollout(
        tokens=jnp.concatenate([tokens, progress.tokens], axis=1),
        token_mask=jnp.concatenate([mask, progress.mask], axis=1),
        response_mask=jnp.concatenate([jnp.zeros_like(mask), progress.mask], axis=1),
        log_prob_behaviour=jnp.pad(progress.log_probs, ((0, 0), (tokens.shape[1], 0))),
        group_ids=group_ids(prompt_tokens.shape[0], plan.group_size),
        selections=progress.selections,
    )


def _room_for_selections(
    plan: DecodePlan, config: TransformerConfig, routes: Sequence[Routes | None]
) -> Int[Array, "B T L k"]:
    """Those of the prompts, and room for those of the responses, in as few bytes as hold them."""
    assert config.experts is not None
    chosen = jnp.repeat(stacked_selections(routes), plan.group_size, axis=0)
    # Of a token that no layer reads, the first experts: no expert twice.
    first = jnp.arange(chosen.shape[-1], dtype=chosen.dtype)
    empty = jnp.broadcast_to(first, (len(chosen), plan.max_new_tokens, *chosen.shape[2:]))
    return as_small(jnp.concatenate([chosen, empty], axis=1), config.experts.count)


def _prompt_keys(
    plan: DecodePlan, noise_key: PRNGKey | None, prompt_tokens: Int[Array, "N P"], prompt_mask: Bool[Array, "N P"]
) -> Key[Array, " B"] | None:
    """The keys of the contexts that are the prompts, once per row."""
    if plan.perturb_logits is None:
        return None
    key = jax.random.key(0) if noise_key is None else noise_key
    # One column more, whose context is the whole prompt.
    keys = context_keys(key, jnp.pad(prompt_tokens, ((0, 0), (0, 1))), jnp.pad(prompt_mask, ((0, 0), (0, 1))))
    return jnp.repeat(keys[:, -1], plan.group_size)


def record_draw(plan: DecodePlan, keys: Key[Array, " B"], logits: Float[Array, "V B"], progress: Progress) -> Progress:
    """Draw token number `count` of every row that has not ended, and write it down."""
    count, ended, keys_now = progress.count, progress.ended, progress.context_keys
    if plan.perturb_logits is not None and keys_now is not None:
        logits = plan.perturb_logits(logits.T, keys_now).T
    drawn, log_probs = sample_tokens(logits, token_uniforms(keys, count), plan.sampling)
    drawn = jnp.where(ended, plan.pad_id, drawn).astype(progress.tokens.dtype)

    def write(columns, values):
        return jax.lax.dynamic_update_slice_in_dim(columns, values[:, None], count, axis=1)

    return progress._replace(
        count=count + 1,
        ended=ended | plan.ends(drawn),
        tokens=write(progress.tokens, drawn),
        mask=write(progress.mask, ~ended),
        log_probs=write(progress.log_probs, jnp.where(ended, 0, log_probs.astype(progress.log_probs.dtype))),
        context_keys=None if keys_now is None else next_keys(keys_now, drawn),
    )
