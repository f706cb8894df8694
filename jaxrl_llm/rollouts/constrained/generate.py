"""Sample responses that are texts of a grammar, under the policy renormalised over the tokens that it allows.

In a context whose allowed tokens are A, token a is drawn with

    p^A_a = exp(z_a / temperature) / sum_{k in A} exp(z_k / temperature)        a in A, and 0 elsewhere,

before truncations, which act on what is allowed. The program of a step is compiled; the loop runs on the host, which
advances the grammars by the tokens that were drawn. A mask depends on tokens and not on logits, so it is made while the
device reads the same tokens.

The product of p^A along a text is a distribution over the grammar's texts, though not the policy's own conditioned on
the grammar: that would weigh each token by what may still follow. It is the policy that acts, so its log-probs are
those that ratios and policy gradients need (`score_constrained` computes them again).
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.constrained.grammars import Grammar
from jaxrl_llm.rollouts.constrained.scoring import unpack_mask
from jaxrl_llm.rollouts.constrained.token_masks import TokenMasker
from jaxrl_llm.rollouts.generate import check_prompts
from jaxrl_llm.rollouts.responses import DecodePlan
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.responses import as_rollout
from jaxrl_llm.rollouts.responses import read_last
from jaxrl_llm.rollouts.responses import read_prompts
from jaxrl_llm.rollouts.responses import ready
from jaxrl_llm.rollouts.responses import record_draw
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class GenerateConstrained(Protocol):
    """What `make_constrained_generate` returns."""

    def __call__(
        self,
        state: nnx.State,
        prompt_tokens: Int[Array, "N P"],
        prompt_mask: Bool[Array, "N P"],
        key: PRNGKey,
        step: Int[Array, ""] | int,
        prompt_index: Int[Array, " N"],
        sample_index: Int[Array, " G"] | None = None,
        *,
        grammars: Sequence[Grammar | None],
    ) -> Rollout:
        """Sample responses to each prompt in its own grammar; None writes what it likes."""
        ...


def make_constrained_generate(
    graphdef: nnx.GraphDef[Transformer],
    masker: TokenMasker,
    *,
    max_new_tokens: int,
    group_size: int,
    sampling: SamplingSettings,
    pad_id: int,
    decode_dtype: jnp.dtype | type | None = None,
) -> GenerateConstrained:
    """A sampler as `make_generate` makes it, with the same random numbers, for responses in a grammar.

    A response is one of its grammar's texts if it ends; one that max_new_tokens cuts off is the beginning of one.

    Args:
        graphdef: first half of `nnx.split(model)`.
        masker: of the model's tokenizer; its `end_ids` end a response.
        max_new_tokens, group_size, sampling, pad_id, decode_dtype: see `make_generate`.

    Returns:
        A function of (state, prompt_tokens [N, P], prompt_mask [N, P], key, step, prompt_index [N],
        sample_index [G] = 0 .. G - 1, grammars=[..] of each prompt) that returns a Rollout; `log_prob_behaviour` is
        log p^A of each token [nats], 0 for one that the grammar forced.

    Raises:
        ValueError: as `make_generate`; from the returned function also for another number of grammars than prompts, a
            masker for another vocabulary than the model's, and a grammar that does not fit the tokenizer.
        RuntimeError: from the returned function, see `GrammarRows.mask`.
    """
    for name, size in (("max_new_tokens", max_new_tokens), ("group_size", group_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    dtype = None if decode_dtype is None else jnp.dtype(decode_dtype)
    plan = DecodePlan(max_new_tokens, group_size, sampling, masker.end_ids, pad_id, dtype)

    @jax.jit
    def begin(state, *arguments):
        model = nnx.merge(graphdef, state)
        return read_prompts(model, plan, *ready(model.config, plan, *arguments), None)

    def draw(keys, logits, mask, progress):
        allowed = unpack_mask(mask, len(logits)).T
        progress = record_draw(plan, keys, jnp.where(allowed, logits, -jnp.inf), progress)
        return jax.lax.dynamic_index_in_dim(progress.tokens, progress.count - 1, axis=1, keepdims=False), progress

    def read(begun, progress):
        return read_last(plan, begun, progress)

    draw, read = jax.jit(draw, donate_argnums=3), jax.jit(read, donate_argnums=1)
    finish = jax.jit(lambda *arguments: as_rollout(plan, *arguments))

    def generate(state, prompt_tokens, prompt_mask, key, step, prompt_index, sample_index=None, *, grammars):
        vocabulary = nnx.merge(graphdef, state).config.vocab_size
        check_prompts(prompt_tokens, prompt_mask, vocabulary=vocabulary)
        if masker.vocab_size != vocabulary:
            raise ValueError(f"masker is for {masker.vocab_size} tokens; the model has {vocabulary}.")
        if len(grammars) != len(prompt_tokens):
            raise ValueError(
                f"grammars has {len(grammars)} entries; it must have {len(prompt_tokens)}, one per prompt."
            )
        rows = masker.start([grammar for grammar in grammars for _ in range(group_size)])
        begun, logits, progress = begin(state, prompt_tokens, prompt_mask, key, step, prompt_index, sample_index)
        for number in range(max_new_tokens):
            # The device is still busy with the logits.
            drawn, progress = draw(begun.keys, logits, rows.mask(), progress)
            unfinished = [row for row in range(len(rows)) if not rows.is_finished(row)]
            tokens = np.asarray(drawn)
            for row in unfinished:
                rows.advance(row, tokens[row])
            if number + 1 == max_new_tokens or all(map(rows.is_finished, unfinished)):
                break
            logits, progress = read(begun, progress)
        return finish(prompt_tokens, prompt_mask, progress)

    return generate
