"""Log-probs of given tokens under the policy renormalised over the tokens that a grammar allows: what a trainer needs.

With logits z = hidden @ head / temperature and allowed tokens A,

    log p^A_a = z_a - log sum_{k in A} exp z_k        d log p^A_a / dz = e_a - p^A.

The gradient is zero outside A, so a token that a grammar forced teaches nothing.
"""

import functools

import jax
import jax.numpy as jnp

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.scoring import predicting
from jaxrl_llm.rollouts.scoring import response_columns
from jaxrl_llm.rollouts.texts import check_texts
from jaxrl_llm.rollouts.texts import require_arrays
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import UInt32

ROWS_AT_ONCE = 64
"""Rows whose logits exist at the same time: 12.6 MB for SmolLM2's vocabulary in float32."""


def unpack_mask(mask: UInt32[Array, "*shape W"], vocab_size: int) -> Bool[Array, "*shape V"]:
    """Packed masks of `GrammarRows.mask` as one truth value per token.

    Raises:
        ValueError: the masks are for another vocabulary, or not packed.
    """
    if mask.dtype != jnp.uint32 or mask.shape[-1] != -(-vocab_size // 32):
        raise ValueError(
            f"mask has dtype {mask.dtype} and {mask.shape[-1]} words; it must be uint32 with "
            f"{-(-vocab_size // 32)} words for {vocab_size} tokens."
        )
    bits = (mask[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(*mask.shape[:-1], -1)[..., :vocab_size].astype(bool)


def allowed_log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    mask: UInt32[Array, "N W"],
    *,
    vocabulary_axis: int = 1,
    temperature: float = 1.0,
) -> Float[Array, " N"]:
    """Log-probabilities of tokens among those that are allowed; the formula stands above.

    Logits of `ROWS_AT_ONCE` rows exist at a time, in the backward pass too, which computes them again. Gradients flow
    into `hidden` and `head`.

    Args:
        hidden: states that predict the targets.
        head: [D, V], or [V, D] with vocabulary_axis=0.
        targets: token ids in [0, V).
        mask: packed, as `GrammarRows.mask` gives them.
        vocabulary_axis: axis of `head` that runs over the vocabulary.
        temperature: divides the logits.

    Returns:
        [nats], in the wider of float32 and the inputs' dtype; -inf without a gradient for a target that is not allowed.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.

    Source: derived above; the sampler is `make_constrained_generate`.
    """
    if targets.shape != hidden.shape[:1] or mask.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {targets.shape} and mask {mask.shape}; both must have hidden's {hidden.shape[0]} rows."
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    vocabulary = head.shape[vocabulary_axis]
    formula = "nd,vd->nv" if vocabulary_axis == 0 else "nd,dv->nv"
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, head.dtype), jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(row: tuple[Array, Array, Array]) -> Array:
        state, target, words = (part[None] for part in row)
        logits = (
            jnp.einsum(formula, state, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)[0]
            / temperature
        )
        allowed = unpack_mask(words[0], vocabulary)
        inside = allowed[target[0]]
        # Where the target is outside everything counts: a finite number that is thrown away has no NaN as its gradient.
        total = jax.nn.logsumexp(jnp.where(allowed | ~inside, logits, -jnp.inf))
        # A token that alone is allowed has exactly 0, however a compiler rounds log 1.
        forced = jnp.sum(allowed) == 1
        return jnp.where(inside, jnp.where(forced, 0.0, logits[target[0]] - total), -jnp.inf)

    return jax.lax.map(one, (hidden, targets, mask), batch_size=min(ROWS_AT_ONCE, max(len(targets), 1)))


def score_constrained(
    model: Transformer,
    tokens: Int[Array, "B T"],
    token_mask: Bool[Array, "B T"],
    mask: UInt32[Array, "B R W"],
    *,
    temperature: float = 1.0,
    remat: bool = False,
) -> Float[Array, "B R"]:
    """Log-probs of response tokens under a model held by a grammar: the teacher-forced pass of constrained rollouts.

    Args:
        model: the policy that is asked.
        tokens: left-padded prompts followed by responses of R columns.
        token_mask: which tokens are real.
        mask: what was allowed at each response token, as `TokenMasker.replay` gives it.
        temperature: of the rollouts.
        remat: compute each layer again in the backward pass.

    Returns:
        [nats] per response token; they mean nothing at padding.

    Raises:
        TypeError, ValueError: as `score`, and masks that do not fit.
    """
    require_arrays(tokens=tokens, token_mask=token_mask, mask=mask)
    if mask.ndim != 3 or mask.shape[:1] != tokens.shape[:1]:
        raise ValueError(
            f"mask has shape {mask.shape}; it must be [B, R, W] with the {tokens.shape[0]} rows of tokens."
        )
    width = mask.shape[1]
    check_texts(tokens, token_mask, response_width=width, vocabulary=model.config.vocab_size)
    hidden = predicting(model(jnp.where(token_mask, tokens, 0), token_mask, remat=remat), width)
    head, axis = model.head()
    targets = response_columns(jnp.where(token_mask, tokens, 0), width)
    flat = allowed_log_probs(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        targets.reshape(-1),
        mask.reshape(-1, mask.shape[-1]),
        vocabulary_axis=axis,
        temperature=temperature,
    )
    return flat.reshape(targets.shape)
