"""The rule that makes a drafted token a token of the model's own law, as pure functions.

A draft proposes a token d from q; it is kept with probability min(1, p(d) / q(d)), and otherwise a token is drawn from
what p has more than q. Whatever q is, the result has the law p:

    q(v) min(1, p(v)/q(v)) + (1 - sum_u min(p(u), q(u))) r(v) = min(p(v), q(v)) + (p(v) - q(v))+ = p(v)
    r = (p - q)+ / sum_u (p(u) - q(u))+

Leviathan et al. 2023 (arXiv:2211.17192), section 2.3 and appendix A.1; Chen et al. 2023 (arXiv:2302.01318), theorem 1.
Here p and q are what is drawn from: tempered, truncated and renormalised (`rollouts.sampling.drawing_log_probs`). The
vocabulary is the first axis, as `decode_logits` gives it.
"""

import jax.numpy as jnp

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

AS_IT_IS = SamplingSettings()
"""Of log-probabilities that are tempered and truncated already."""


def acceptance(log_p: Float[Array, "*batch"], log_q: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """min(1, p / q) [prob]: how likely a drafted token is kept (Leviathan et al. 2023, section 2.3).

    Args:
        log_p: of the drafted token under the model [nats]; -inf: the token is never kept.
        log_q: under the draft [nats]. NaN, of a draft that is no distribution, gives NaN, below which no number is.

    Returns:
        the probability, elementwise.
    """
    impossible = jnp.isneginf(log_p)
    ratio = jnp.exp(jnp.minimum(jnp.where(impossible, 0, log_p) - log_q, 0))
    return jnp.where(impossible, 0, ratio)


def residual_log_probs(log_p: Float[Array, "V ..."], log_q: Float[Array, "V ..."]) -> Float[Array, "V ..."]:
    """log (p - q)+ up to a constant [nats]: what is drawn where a drafted token was not kept (ibid., section 2.3).

    Log-probabilities as logits, not normalised. Where p is nowhere above q, which only rounding can reject, and where q
    is no distribution, it is p.

    Args:
        log_p: of the model.
        log_q: of the draft.

    Returns:
        logits of the draw.
    """
    more = jnp.exp(log_p) - jnp.exp(log_q)
    # NaN is not above 0: of a draft that is no distribution nothing is taken away.
    return jnp.where(jnp.any(more > 0, axis=0), jnp.log(jnp.maximum(more, 0)), log_p)


def overlap(log_p: Float[Array, "V ..."], log_q: Float[Array, "V ..."]) -> Float[Array, "..."]:
    """sum_v min(p_v, q_v) = 1 - TV(p, q) [prob]: how often a token of q is kept (ibid., corollary 3.6)."""
    return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=0)


def tokens_per_step(rate: Float[Array, "*batch"] | float, drafts: int) -> Float[Array, "*batch"]:
    """Tokens that a pass of the model brings, were drafts kept independently of each other [tokens per step]:

        1 + a + .. + a^k = (1 - a^(k + 1)) / (1 - a)

    Leviathan et al. 2023, equation (1).

    Args:
        rate: a, how often a draft is kept that is reached [prob].
        drafts: k.

    Returns:
        the expected number, from 1 to k + 1.

    Raises:
        ValueError: for less than one draft.
    """
    require_at_least("drafts", drafts, 1)
    return jnp.sum(jnp.asarray(rate)[..., None] ** jnp.arange(drafts + 1), axis=-1)


def judged(
    log_p: Float[Array, "V B K"],
    log_q: Float[Array, "V B k"],
    drafted: Int[Array, "B k"],
    uniforms: Float[Array, "B K 3"],
) -> tuple[Int[Array, "B K"], Int[Array, " B"]]:
    """The tokens of a round.

    Args:
        log_p: log-probabilities of the model after the last token and after each draft, K = k + 1 [nats].
        log_q: those that the drafts were drawn from.
        drafted: the drafts.
        uniforms: in [0, 1): the first judges the draft of its column, the others draw in its place.

    Returns:
        the tokens: kept drafts, then the one that was drawn; what stands behind it means nothing. And how many drafts
        were kept.
    """
    at = drafted[None]
    p_drafted, q_drafted = (jnp.take_along_axis(law, at, axis=0)[0] for law in (log_p[..., :-1], log_q))
    kept = uniforms[:, :-1, 0] < acceptance(p_drafted, q_drafted)
    count = jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)
    # After k kept drafts nothing was proposed: all of p is left.
    left = jnp.concatenate([residual_log_probs(log_p[..., :-1], log_q), log_p[..., -1:]], axis=2)
    last = jnp.take_along_axis(left, count[None, :, None], axis=2)[..., 0]
    numbers = jnp.take_along_axis(uniforms, count[:, None, None], axis=1)[:, 0, 1:]
    drawn = sample_tokens(last, numbers, AS_IT_IS)[0].astype(drafted.dtype)
    columns = jnp.arange(log_p.shape[2])
    return jnp.where(columns < count[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), drawn[:, None]), count
