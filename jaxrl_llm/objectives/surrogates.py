"""Per-token losses of the policy-gradient family, to be minimised; aggregation and masks come after.

rho_t is a ratio from `ratios.py`, through which the gradient flows; A_t the advantage, a constant. Every function is
elementwise, on arrays of one shape (`[B, T]`, or the flat rows of a kernel): broadcast a per-sequence advantage first,
`jnp.broadcast_to(advantages[:, None], ratio.shape)`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_same_shape


def _constant(advantages: Float[Array, "*shape"], other: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    require_same_shape(**{name: other}, advantages=advantages)
    require_dtype("floating", **{name: other}, advantages=advantages)
    return jax.lax.stop_gradient(advantages)


@checked
def score_function(log_prob: Float[Array, "*shape"], advantages: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """REINFORCE: loss_t = -A_t log pi(y_t|c_t), whose gradient is the policy gradient when the data are on-policy.

    Source: Williams 1992.

    Args:
        log_prob: of the sampled tokens under the trained policy [nats].
        advantages: per token.

    Returns:
        the loss of each token.

    Raises:
        ValueError, TypeError: if the arrays are not floating of one shape.
    """
    return -_constant(advantages, log_prob, "log_prob") * log_prob


@checked
def importance_weighted(ratio: Float[Array, "*shape"], advantages: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """loss_t = -A_t rho_t: the surrogate of trust-region methods, without a clip.

    Source: CPI / TRPO (Schulman et al. 2015, arXiv 1502.05477); the token surrogate of TRM (arXiv 2512.23075). Its
    gradient is -A_t rho_t grad log pi(y_t|c_t).
    """
    return -_constant(advantages, ratio, "ratio") * ratio


@checked
def clipped(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Float[Array, "*shape"]:
    """PPO clip with two sides: loss_t = -min( rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t ).

    Source: PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7); different sides are DAPO's clip-higher (arXiv
    2503.14476, eq. 10); with the geometric sequence ratio it is GSPO (arXiv 2507.18071, eq. 5).

    Args:
        ratio: per token, or one sequence ratio broadcast to its tokens.
        advantages: per token.
        clip_low: the lower end of the interval is 1 - clip_low.
        clip_high: the upper end of the interval is 1 + clip_high.

    Returns:
        the loss of each token; its gradient is 0 where the clip binds.

    Raises:
        ValueError, TypeError: if the arrays are not floating of one shape.
    """
    fixed = _constant(advantages, ratio, "ratio")
    return -jnp.minimum(ratio * fixed, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * fixed)


@checked
def dual_clipped(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
    dual_clip: ScalarLike = 3.0,
) -> Float[Array, "*shape"]:
    """PPO clip, and for A_t < 0 the gain bounded from below by dual_clip A_t (a large ratio cannot push without limit).

    loss_t = -max( min(rho_t A_t, clip(rho_t) A_t), dual_clip A_t ) where A_t < 0, else the PPO clip.
    Source: Ye et al. 2020, arXiv 1912.09729. `dual_clip` must exceed 1 + clip_high to have the meaning the paper gives
    it.
    """
    fixed = _constant(advantages, ratio, "ratio")
    loss = clipped(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return jnp.where(fixed < 0, jnp.minimum(loss, jnp.negative(dual_clip * fixed)), loss)


@checked
def clipped_weight(
    log_prob: Float[Array, "*shape"],
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: ScalarLike = 1.0,
    clip_high: ScalarLike = 4.0,
) -> Float[Array, "*shape"]:
    """CISPO: loss_t = -stop( clip(rho_t, 1 - clip_low, 1 + clip_high) ) A_t log pi(y_t|c_t); no token loses its
    gradient.

    Source: CISPO (MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5). The paper sets no lower end (clip_low >= 1) and does not
    print its upper one.

    Args:
        log_prob: of the sampled tokens under the trained policy [nats]; the gradient flows through it alone.
        ratio: per token; a constant to the gradient here.
        advantages: per token.
        clip_low: the lower end of the interval is 1 - clip_low.
        clip_high: the upper end of the interval is 1 + clip_high.

    Returns:
        the loss of each token.

    Raises:
        ValueError, TypeError: if the arrays are not floating of one shape.
    """
    fixed = _constant(advantages, log_prob, "log_prob")
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    return -weight * fixed * log_prob


@checked
def clip_binds(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Bool[Array, "*shape"]:
    """True where the PPO clip removes the gradient: (A_t > 0 and rho_t > 1 + clip_high) or (A_t < 0 and rho_t < 1 -
    clip_low).
    """
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


@checked
def divergence_masked(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    divergence_t: Float[Array, "*shape"],
    *,
    threshold: ScalarLike,
) -> Float[Array, "*shape"]:
    """DPPO-style: loss_t = -M_t A_t rho_t, where M_t drops tokens that leave the trust region and would move further
    out.

    M_t = 0 if divergence_t > threshold and (A_t > 0 and rho_t > 1, or A_t < 0 and rho_t < 1); else 1. The divergence is
    any per-context divergence between the policy that sampled and the trained one (exact TV or KL, or the two-event TV
    of the sampled token); M_t is a constant to the gradient.
    Source: DPPO (arXiv 2602.04879), which replaces the ratio test of PPO by a divergence test.
    """
    fixed = _constant(advantages, ratio, "ratio")
    outwards = ((fixed > 0) & (ratio > 1)) | ((fixed < 0) & (ratio < 1))
    dropped = outwards & ~(divergence_t <= threshold)
    return jnp.where(dropped, jnp.zeros((), ratio.dtype), -fixed * ratio)
