"""Sample responses with fewer passes of the model: a draft proposes k tokens, one pass judges them all.

A round of a row whose last token is y: the draft draws d_1 .. d_k, each after the ones before; the model reads y, d_1,
.., d_k in one chunk, which gives the law of the token after each; drafts are kept up to the first one that the rule of
`acceptance` rejects, and one more token is drawn from what the rule leaves, or after k kept ones from the model's own
law. A round makes 1 to k + 1 tokens of a row, and rows go on at their own pace.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.chunks import read_columns
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_logits
from jaxrl_llm.rollouts.generate import compiled_sampler
from jaxrl_llm.rollouts.grouping import group_ids
from jaxrl_llm.rollouts.grouping import repeat_prompts
from jaxrl_llm.rollouts.responses import DecodePlan
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import drawing_log_probs
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.sampling import token_uniforms
from jaxrl_llm.rollouts.speculative.acceptance import AS_IT_IS
from jaxrl_llm.rollouts.speculative.acceptance import judged
from jaxrl_llm.rollouts.speculative.acceptance import overlap
from jaxrl_llm.rollouts.speculative.drafts import Draft
from jaxrl_llm.rollouts.speculative.drafts import FurtherDraft
from jaxrl_llm.rollouts.speculative.drafts import ModelDraft
from jaxrl_llm.rollouts.speculative.rollout import SpeculativeGenerate
from jaxrl_llm.rollouts.speculative.rollout import SpeculativeRollout
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey


class WithDraft(nnx.Module):
    """A model and a smaller one that drafts for it; split as one, it is what `make_speculative_generate` takes.

    Raises:
        ValueError: for vocabularies of two sizes.
    """

    def __init__(self, model: Transformer, draft: Transformer):
        if draft.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"draft has a vocabulary of {draft.config.vocab_size} tokens; it must be that of the model, "
                f"{model.config.vocab_size}"
            )
        self.model, self.draft = model, draft

    @property
    def config(self) -> TransformerConfig:
        """Of the model."""
        return self.model.config


class _Certain(NamedTuple):
    # The tokens that a round has made, which the draft has not read yet, and the states that predicted them.
    tokens: Int[Array, "B K"]
    hidden: Float[Array, "B K D"]
    counts: Int[Array, " B"]


class _Progress(NamedTuple):
    # What the loop carries; `done` counts the tokens of each row.
    done: Int[Array, " B"]
    ended: Bool[Array, " B"]
    certain: _Certain
    cache: ResponseCache
    draft_cache: ResponseCache
    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    log_probs: Float[Array, "B R"]
    steps: Int[Array, " B"]
    reached: Int[Array, "B k"]
    kept: Int[Array, "B k"]
    overlaps: Float[Array, "B k"]


class _Judge(NamedTuple):
    # What stays the same in every round.
    plan: DecodePlan
    drafts: int
    weights: DecodeWeights
    prompt: PromptCache
    draft: Draft
    draft_prompt: PromptCache
    uniforms: Float[Array, "B _ 5"]


def make_speculative_generate(
    graphdef: nnx.GraphDef[Transformer] | nnx.GraphDef[WithDraft],
    *,
    drafts: int = 1,
    max_new_tokens: int,
    group_size: int,
    sampling: SamplingSettings,
    eos_id: int | Sequence[int],
    pad_id: int,
    decode_dtype: jnp.dtype | type | None = None,
) -> SpeculativeGenerate:
    """A compiled sampler with the law of `make_generate`'s, which asks the model less often.

    Responses have the plain sampler's distribution, and greedy ones are its own, token for token (up to the rounding of
    a product of several columns). Drawn ones are others: token t of a rollout has its own random numbers for the draft,
    the judgement and the draw, which come from the rollout's key and t alone. So a rollout is regenerated alone, as
    there; its first token is the plain sampler's.

    Args:
        graphdef: first half of `nnx.split(model)`, of a model with a layer for further tokens, which drafts; or of
            `nnx.split(WithDraft(model, draft))`.
        drafts: k, tokens drafted in a round.
        max_new_tokens, group_size, sampling, eos_id, pad_id, decode_dtype: see `make_generate`; the draft is tempered
            and truncated as the model is.

    Returns:
        A function like that of `make_generate`, which returns a `SpeculativeRollout`. The log-probs are those of the
        model, which the tokens were drawn from in law, whatever the draft was.

    Raises:
        ValueError: as `make_generate`; for less than one draft; from the returned function, for a model without a layer
            for further tokens.
    """
    require_at_least("drafts", drafts, 1)
    plan = DecodePlan.of(
        max_new_tokens=max_new_tokens,
        group_size=group_size,
        sampling=sampling,
        eos_id=eos_id,
        pad_id=pad_id,
        decode_dtype=decode_dtype,
    )
    return cast(SpeculativeGenerate, compiled_sampler(graphdef, plan, functools.partial(_generate, drafts)))


def _generate(
    drafts: int,
    merged: Transformer | WithDraft,
    plan: DecodePlan,
    prompt_tokens: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    keys: Key[Array, " B"],
    noise_key: PRNGKey | None,
) -> SpeculativeRollout:
    del noise_key
    read = jnp.where(prompt_mask, prompt_tokens, 0)  # what stands at padding may be no token
    if isinstance(merged, WithDraft):
        model = merged.model
        weights = DecodeWeights.of(model, plan.decode_dtype)
        draft = ModelDraft(DecodeWeights.of(merged.draft, plan.decode_dtype))
    else:
        model = merged
        if not model.further:
            raise ValueError("the model has no layer that predicts further tokens to draft with; its mtp_layers is 0.")
        weights = DecodeWeights.of(model, plan.decode_dtype, further=True)
        draft = FurtherDraft(weights)
    hidden, cache = model.prefill(read, prompt_mask)
    prompt = PromptCache.of(cache, weights.dtype)
    uniforms = _uniforms(keys, plan.max_new_tokens + drafts)
    judge = _Judge(plan, drafts, weights, prompt, draft, draft.begin(hidden, read, prompt_mask), uniforms)
    logits = jnp.repeat(model.logits(hidden[:, -1]).T, plan.group_size, axis=1)
    drawn = sample_tokens(logits, token_uniforms(keys, 0), plan.sampling)
    states = jnp.repeat(hidden[:, -1], plan.group_size, axis=0)
    progress = _first(judge, model.config, drawn[0].astype(prompt_tokens.dtype), drawn[1], states)

    def unfinished(progress: _Progress) -> Bool[Array, ""]:
        return jnp.any(_active(plan, progress))

    progress = jax.lax.while_loop(unfinished, functools.partial(_round, judge), progress)
    tokens, mask = repeat_prompts(prompt_tokens, prompt_mask, plan.group_size)
    return SpeculativeRollout(
        tokens=jnp.concatenate([tokens, progress.tokens], axis=1),
        token_mask=jnp.concatenate([mask, progress.mask], axis=1),
        response_mask=jnp.concatenate([jnp.zeros_like(mask), progress.mask], axis=1),
        log_prob_behaviour=jnp.pad(progress.log_probs, ((0, 0), (tokens.shape[1], 0))),
        group_ids=group_ids(prompt_tokens.shape[0], plan.group_size),
        steps=progress.steps,
        reached=progress.reached,
        kept=progress.kept,
        overlaps=progress.overlaps,
    )


def _active(plan: DecodePlan, progress: _Progress) -> Bool[Array, " B"]:
    return ~progress.ended & (progress.done < plan.max_new_tokens)


def _first(
    judge: _Judge,
    config: TransformerConfig,
    drawn: Int[Array, " B"],
    log_probs: Float[Array, " B"],
    hidden: Float[Array, "B D"],
) -> _Progress:
    """The first token of every row, which the prompt predicts, and what predicted it."""
    plan, rows, slots, columns = judge.plan, hidden.shape[0], judge.plan.max_new_tokens, judge.drafts + 1
    wide = jnp.promote_types(judge.weights.dtype, jnp.float32)
    states = jnp.zeros((rows, columns, hidden.shape[1]), wide).at[:, 0].set(hidden.astype(wide))
    none = jnp.zeros((rows, judge.drafts), jnp.int32)
    return _Progress(
        done=jnp.ones(rows, jnp.int32),
        ended=plan.ends(drawn),
        certain=_Certain(jnp.full((rows, columns), drawn[:, None], drawn.dtype), states, jnp.ones(rows, jnp.int32)),
        # The last token is never read, so it needs no slot.
        cache=ResponseCache.empty(config, rows, slots - 1, judge.weights.dtype),
        draft_cache=judge.draft.room(rows, slots - 1),
        tokens=jnp.full((rows, slots), plan.pad_id, drawn.dtype).at[:, 0].set(drawn),
        mask=jnp.zeros((rows, slots), bool).at[:, 0].set(True),
        log_probs=jnp.zeros((rows, slots), log_probs.dtype).at[:, 0].set(log_probs),
        steps=jnp.zeros(rows, jnp.int32),
        reached=none,
        kept=none,
        overlaps=none.astype(log_probs.dtype),
    )


def _uniforms(keys: Key[Array, " B"], count: int) -> Float[Array, "B R 5"]:
    """The random numbers of each row's tokens 0 .. count - 1: two of the draft, one of the judgement, two of the draw.

    A token may be drafted in several rounds, with the same numbers: all rounds but the last were ended by a token
    before it, so nothing that came of them is known to what follows. Made at once, they cost nothing in the loop.
    """

    def of_token(key: PRNGKey, number: Int[Array, ""]) -> Float[Array, " 5"]:
        return jax.random.uniform(jax.random.fold_in(key, number), (5,), jnp.float32)

    return jax.vmap(jax.vmap(of_token, (None, 0)), (0, None))(keys, jnp.arange(count))


def _propose(
    judge: _Judge, progress: _Progress, active: Bool[Array, " B"], uniforms: Float[Array, "B K 5"]
) -> tuple[Int[Array, "B k"], Float[Array, "V B k"], ResponseCache]:
    """The drafts of a round, the laws they were drawn from, and the draft's cache."""
    certain, draft, prompt = progress.certain, judge.draft, judge.draft_prompt
    counts = jnp.where(active, certain.counts, 0)
    starts = progress.done - certain.counts
    state, cache = draft.read(certain.tokens, certain.hidden, counts, starts, prompt, progress.draft_cache)
    tokens, laws = [], []
    for number in range(judge.drafts):
        laws.append(drawing_log_probs(decode_logits(draft.weights, state), judge.plan.sampling))
        tokens.append(sample_tokens(laws[-1], uniforms[:, number, :2], AS_IT_IS)[0].astype(certain.tokens.dtype))
        if number + 1 < judge.drafts:
            one, start = active.astype(jnp.int32), progress.done + number
            state, cache = draft.read(tokens[-1][:, None], state[:, None], one, start, prompt, cache)
    return jnp.stack(tokens, axis=1), jnp.stack(laws, axis=2), cache


def _round(judge: _Judge, progress: _Progress) -> _Progress:
    """One round of every row that has not ended."""
    plan, columns = judge.plan, jnp.arange(judge.drafts + 1)
    active, rows = _active(plan, progress), progress.done.shape[0]
    numbers = progress.done[:, None] + columns  # of the tokens that may be made
    uniforms = jnp.take_along_axis(judge.uniforms, numbers[..., None], axis=1)
    drafted, log_q, draft_cache = _propose(judge, progress, active, uniforms)
    newest = jnp.take_along_axis(progress.certain.tokens, progress.certain.counts[:, None] - 1, axis=1)
    read = jnp.concatenate([newest, drafted], axis=1)
    counts = jnp.where(active, judge.drafts + 1, 0)
    hidden, cache = read_columns(judge.weights, read, counts, progress.done - 1, judge.prompt, progress.cache)
    logits = decode_logits(judge.weights, hidden.reshape(-1, hidden.shape[2]))
    log_p = drawing_log_probs(logits, plan.sampling).reshape(-1, rows, judge.drafts + 1)
    tokens, count = judged(log_p, log_q, drafted, uniforms[..., 2:])

    # A response ends with its first end token, or where its columns do.
    before = jnp.cumsum(plan.ends(tokens), axis=1) - plan.ends(tokens)
    room = active[:, None] & (before == 0) & (numbers < plan.max_new_tokens)
    made = room & (columns <= count[:, None])
    where = (jnp.arange(rows)[:, None], jnp.where(made, numbers, plan.max_new_tokens))
    log_probs = jnp.take_along_axis(log_p, tokens[None], axis=0)[0].astype(progress.log_probs.dtype)
    added = jnp.sum(made, axis=1, dtype=jnp.int32)
    # Drafts are judged up to the first one that is not kept, whose column holds the token drawn instead.
    reached, kept = made[:, :-1], made[:, :-1] & (columns[:-1] < count[:, None])
    return _Progress(
        done=progress.done + added,
        ended=progress.ended | jnp.any(made & plan.ends(tokens), axis=1),
        certain=_Certain(tokens, hidden, jnp.where(active, added, progress.certain.counts)),
        cache=cache,
        draft_cache=draft_cache,
        tokens=progress.tokens.at[where].set(tokens, mode="drop"),
        mask=progress.mask.at[where].set(True, mode="drop"),
        log_probs=progress.log_probs.at[where].set(log_probs, mode="drop"),
        steps=progress.steps + active,
        reached=progress.reached + reached,
        kept=progress.kept + kept,
        overlaps=progress.overlaps + jnp.where(reached, overlap(log_p[..., :-1], log_q), 0),
    )
