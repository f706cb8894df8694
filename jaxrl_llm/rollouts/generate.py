"""Sample a group of responses to every prompt of a batch, in one compiled program."""

import operator
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_logits
from jaxrl_llm.rollouts.decode import decode_step
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
from jaxrl_llm.rollouts.texts import check_left_padded
from jaxrl_llm.rollouts.texts import check_mask
from jaxrl_llm.rollouts.texts import check_tokens
from jaxrl_llm.rollouts.texts import require_arrays
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
    """

    tokens: Int[Array, "B T"]
    token_mask: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    log_prob_behaviour: Float[Array, "B T"]
    group_ids: Int[Array, " B"]


class Generate(Protocol):
    """What `make_generate` returns."""

    def __call__(
        self,
        state: nnx.State,
        prompt_tokens: Int[Array, "N P"],
        prompt_mask: Bool[Array, "N P"],
        key: PRNGKey,
        step: Int[Array, ""] | int,
        prompt_index: Int[Array, " N"],
        sample_index: Int[Array, " G"] | None = None,
        noise_key: PRNGKey | None = None,
    ) -> Rollout:
        """Sample the responses; `sample_index` None is 0 .. G - 1, `noise_key` None is key 0."""
        ...


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


class Begun(NamedTuple):
    """What the steps only read: the model, the prompts, and the key of each row."""

    weights: DecodeWeights
    prompt: PromptCache
    keys: Key[Array, " B"]


class Progress(NamedTuple):
    """What the decode loop carries; the columns of `tokens`, `mask` and `log_probs` are token numbers in the response.

    Attributes:
        context_keys: of the noise of each row's context; None where the engine has none.
    """

    count: Int[Array, ""]
    ended: Bool[Array, " B"]
    cache: ResponseCache
    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    log_probs: Float[Array, "B R"]
    context_keys: Key[Array, " B"] | None


def make_generate(
    graphdef: nnx.GraphDef[Transformer],
    *,
    max_new_tokens: int,
    group_size: int,
    sampling: SamplingSettings,
    eos_id: int | Sequence[int],
    pad_id: int,
    decode_dtype: jnp.dtype | type | None = None,
    perturb_logits: LogitPerturbation | None = None,
    cache_rounding: Rounding | None = None,
) -> Generate:
    """A compiled sampler for models of one structure.

    Each prompt is read once, whatever the group size; then one token of every row is made per step until all rows have
    ended. Sample s of prompt n draws with fold_in(fold_in(fold_in(key, step), prompt_index[n]), sample_index[s]), then
    fold_in of the token's number, whatever else is in the batch. So one rollout is regenerated alone by a sampler with
    group_size=1 that is given its prompt, its prompt_index and its sample_index. (Two batch sizes may round a product
    differently; a draw that falls within that rounding of the edge between two tokens can then differ.)

    Args:
        graphdef: first half of `nnx.split(model)`.
        max_new_tokens: R, the width of the responses.
        group_size: G, responses per prompt.
        sampling: temperature and truncation.
        eos_id: token that ends a response, or several; with an empty sequence every response has full width.
        pad_id: token written after the end.
        decode_dtype: of the decode loop's products and cache; None for the model's compute dtype. The prompts are
            always read in the model's own precision.
        perturb_logits: makes the sampler another policy than the model (`rollouts.perturb`); the recorded log-probs are
            those of the policy that sampled. Perturbed weights are given as the state.
        cache_rounding: acts on keys and values of prompts and responses before anything attends to them.

    Returns:
        A function of (state, prompt_tokens [N, P], prompt_mask [N, P], key, step, prompt_index [N],
        sample_index [G] = 0 .. G - 1, noise_key = key 0) that returns a Rollout; `noise_key` is the root of the noise
        that `perturb_logits` draws.

    Raises:
        TypeError: from the returned function, for prompts that are no arrays.
        ValueError: for sizes or tokens that cannot be; from the returned function, before it computes anything, for
            arguments that do not fit, prompts that are not left-padded or empty, and prompt tokens that are none of the
            vocabulary (these two are values: not seen inside another jit).
    """
    eos_ids = tuple(operator.index(token) for token in (eos_id if isinstance(eos_id, Iterable) else (eos_id,)))
    for name, size in (("max_new_tokens", max_new_tokens), ("group_size", group_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    dtype = None if decode_dtype is None else jnp.dtype(decode_dtype)
    plan = DecodePlan(max_new_tokens, group_size, sampling, eos_ids, pad_id, dtype, perturb_logits, cache_rounding)

    @jax.jit
    def compiled(state, prompt_tokens, prompt_mask, key, step, prompt_index, sample_index=None, noise_key=None):
        model = nnx.merge(graphdef, state)
        indices = (step, prompt_index, sample_index)
        begun, logits, progress = begin_responses(model, plan, prompt_tokens, prompt_mask, key, *indices, noise_key)

        def unfinished(progress: Progress):
            return (progress.count < max_new_tokens) & ~jnp.all(progress.ended)

        def advance(progress: Progress) -> Progress:
            return record_draw(plan, begun.keys, *read_last(plan, begun, progress))

        progress = jax.lax.while_loop(unfinished, advance, record_draw(plan, begun.keys, logits, progress))
        return as_rollout(plan, prompt_tokens, prompt_mask, progress)

    sizes: list[int] = []  # of the vocabulary, once a state was seen

    def generate(state, prompt_tokens, prompt_mask, *arguments, **options):
        if not sizes:
            sizes.append(nnx.merge(graphdef, state).config.vocab_size)
        check_prompts(prompt_tokens, prompt_mask, vocabulary=sizes[0])
        return compiled(state, prompt_tokens, prompt_mask, *arguments, **options)

    return generate


def check_prompts(prompt_tokens: Int[Array, "N P"], prompt_mask: Bool[Array, "N P"], *, vocabulary: int) -> None:
    """What can be said of prompts before anything is computed; see `make_generate`.

    Raises:
        TypeError: they are no arrays.
        ValueError: they are not left-padded or empty, or hold tokens that are none of the vocabulary.
    """
    require_arrays(prompt_tokens=prompt_tokens, prompt_mask=prompt_mask)
    if prompt_tokens.ndim == 2 and prompt_mask.shape == prompt_tokens.shape and prompt_tokens.size:
        check_mask("prompt_mask", prompt_mask)
        check_tokens("prompt_tokens", prompt_tokens, prompt_mask, vocabulary=vocabulary)
        check_left_padded("prompt_mask", prompt_mask)


def _check(model: Transformer, plan: DecodePlan, prompt_tokens, prompt_mask, step, prompt_index, sample_index) -> None:
    vocabulary = model.config.vocab_size
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
    if length > model.config.max_positions:
        raise ValueError(
            f"prompt_tokens has {prompt_tokens.shape[1]} columns; with max_new_tokens={plan.max_new_tokens} that is "
            f"{length}, more than max_positions={model.config.max_positions} of the model"
        )


def begin_responses(
    model: Transformer,
    plan: DecodePlan,
    prompt_tokens: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    key: PRNGKey,
    step: Int[Array, ""] | int,
    prompt_index: Int[Array, " N"],
    sample_index: Int[Array, " G"] | None = None,
    noise_key: PRNGKey | None = None,
) -> tuple[Begun, Float[Array, "V B"], Progress]:
    """Read the prompts: what the steps need, the logits of each row's first token, and no token yet."""
    sample_index = jnp.arange(plan.group_size) if sample_index is None else sample_index
    _check(model, plan, prompt_tokens, prompt_mask, step, prompt_index, sample_index)
    if prompt_tokens.dtype.itemsize < 4:
        prompt_tokens = prompt_tokens.astype(jnp.int32)  # a narrow type may not hold what is sampled
    prompt_mask = prompt_mask.astype(bool)
    keys = rollout_keys(key, step, prompt_index, sample_index).reshape(-1)
    read = jnp.where(prompt_mask, prompt_tokens, 0)  # what stands at padding may be no token
    hidden, cache = model.prefill(read, prompt_mask, cache_rounding=plan.cache_rounding)
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
    )
    return Begun(weights, PromptCache.of(cache, weights.dtype), keys), logits, progress


def read_last(plan: DecodePlan, begun: Begun, progress: Progress) -> tuple[Float[Array, "V B"], Progress]:
    """Read the token that was drawn last: the logits of the next one."""
    last = progress.count - 1
    tokens = jax.lax.dynamic_index_in_dim(progress.tokens, last, axis=1, keepdims=False)
    hidden, cache = decode_step(begun.weights, tokens, last, begun.prompt, progress.cache, plan.cache_rounding)
    return decode_logits(begun.weights, hidden), progress._replace(cache=cache)


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
    )


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
    ends = jnp.zeros_like(ended)
    for token in plan.eos_ids:
        ends = ends | (drawn == token)

    def write(columns, values):
        return jax.lax.dynamic_update_slice_in_dim(columns, values[:, None], count, axis=1)

    return progress._replace(
        count=count + 1,
        ended=ended | ends,
        tokens=write(progress.tokens, drawn),
        mask=write(progress.mask, ~ended),
        log_probs=write(progress.log_probs, jnp.where(ended, 0, log_probs.astype(progress.log_probs.dtype))),
        context_keys=None if keys_now is None else next_keys(keys_now, drawn),
    )
