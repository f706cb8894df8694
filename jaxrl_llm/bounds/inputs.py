"""What the surrogate-error bounds are functions of: how far the trained policy is from the one that sampled, and where.

mu is the policy that sampled, pi the trained one, c a context (prompt and tokens so far), d_t the distribution of
contexts at position t under mu. All divergences are those of the next-token distributions, KL(mu || pi) in nats.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide


@checked
def safe_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(max(x, 0)) with derivative 0 at 0 instead of infinity."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, jnp.ones((), x.dtype))), jnp.zeros((), x.dtype))


@checked
def tv_bound_from_kl(kl: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The largest TV that a KL allows by two classical inequalities: min( sqrt(KL/2), sqrt(1 - exp(-KL)) ).

    Pinsker's is the smaller one up to KL = 1.59 nats, Bretagnolle and Huber's beyond, where it stays below 1.

    Args:
        kl: a Kullback-Leibler divergence, in either direction [nats].

    Returns:
        an upper bound on the total variation [prob].
    """
    return jnp.minimum(safe_sqrt(kl / 2), safe_sqrt(-jnp.expm1(-kl)))


class BoundInputs(NamedTuple):
    """The quantities that the bounds of `surrogate_error.py` read. A pytree of arrays.

    Attributes:
        max_kl: delta, the largest KL(mu || pi) over contexts [nats].
        max_tv: eps, the largest TV(mu, pi) over contexts [prob].
        sequence_kl: KL between the laws of whole responses, sum_t E_{d_t} KL [nats].
        sequence_tv: TV between the laws of whole responses [prob].
        mean_tv_t: Dbar_t, E_{d_t} TV at each position t = 1..T [prob].

    The theorems hold when the first two are maxima over all reachable contexts and the others are expectations. From
    a sample they are estimates (`bound_inputs_from_tokens`), and so is what is computed from them.
    """

    max_kl: Float[Array, ""]
    max_tv: Float[Array, ""]
    sequence_kl: Float[Array, ""]
    sequence_tv: Float[Array, ""]
    mean_tv_t: Float[Array, " T"]

    @property
    def horizon(self) -> int:
        """T, the largest number of tokens a response may have."""
        return self.mean_tv_t.shape[-1]


def bound_inputs_from_scalars(
    *,
    max_kl: ScalarLike,
    horizon: int,
    max_tv: ScalarLike | None = None,
    sequence_kl: ScalarLike | None = None,
    sequence_tv: ScalarLike | None = None,
) -> BoundInputs:
    """Inputs from scalars; what is not given is filled with the largest value that the given ones allow.

    max_tv <= sqrt(max_kl / 2); sequence_kl <= T max_kl; sequence_tv <= sqrt(sequence_kl / 2) and <= T max_tv;
    Dbar_t <= max_tv at every position. Pinsker's inequality alone is used, as in the paper, and every TV is at most 1.

    Args:
        max_kl: delta [nats].
        horizon: T [tokens], >= 1.
        max_tv: eps [prob].
        sequence_kl: KL between the laws of whole responses [nats].
        sequence_tv: TV between the laws of whole responses [prob].

    Returns:
        the inputs with uniform Dbar_t = max_tv.

    Raises:
        ValueError: if horizon is smaller than 1.
    """
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}; it must be at least 1 token.")
    delta = jnp.asarray(max_kl, jnp.result_type(float))
    one = jnp.ones((), delta.dtype)
    eps = jnp.minimum(one, safe_sqrt(delta / 2)) if max_tv is None else jnp.asarray(max_tv, delta.dtype)
    kl = horizon * delta if sequence_kl is None else jnp.asarray(sequence_kl, delta.dtype)
    if sequence_tv is None:
        tv = jnp.minimum(jnp.minimum(one, safe_sqrt(kl / 2)), horizon * eps)
    else:
        tv = jnp.asarray(sequence_tv, delta.dtype)
    return BoundInputs(delta, eps, kl, tv, jnp.broadcast_to(eps, (horizon,)))


@checked
def bound_inputs_from_tokens(
    kl_t: Float[Array, "B T"], tv_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, horizon: int
) -> BoundInputs:
    """Inputs estimated from exact per-token divergences on sequences that mu sampled.

    The means are unbiased estimates of the expectations over contexts. The two maxima run over visited contexts only:
    they are estimates from below of the maxima over all reachable contexts, so a bound computed from them is an
    estimate on visited contexts and never a certificate (errata F2.7).

    max_kl, max_tv: maxima over response tokens. sequence_kl: mean over sequences of the sum of kl_t. mean_tv_t[k]:
    mean over all sequences of tv_t at their k-th response token, 0 for sequences that have ended, because both
    policies then do the same. sequence_tv: min(1, sum_t mean_tv_t, tv_bound_from_kl(sequence_kl)), an upper bound given
    the means; replace it by `sampled_sequence_tv` if you prefer its noise to this slack.

    Args:
        kl_t: exact KL(mu || pi) of the context of each token [nats].
        tv_t: exact TV(mu, pi) of the context of each token [prob].
        response_mask: true at the tokens that mu sampled.
        horizon: the largest number of response tokens that the sampler allows, not the longest of this batch.

    Returns:
        `BoundInputs` with horizon entries in mean_tv_t.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean; or horizon <
        1.
    """
    require_rank(2, "B T", kl_t=kl_t, tv_t=tv_t, response_mask=response_mask)
    require_same_shape(kl_t=kl_t, tv_t=tv_t, response_mask=response_mask)
    require_dtype("floating", kl_t=kl_t, tv_t=tv_t)
    require_dtype("boolean", response_mask=response_mask)
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}; it must be at least 1 token.")
    real = jnp.any(response_mask, axis=1)
    sequences = jnp.sum(real, dtype=kl_t.dtype)
    # The k-th response token of a row goes to slot k; tokens beyond the horizon would break its promise and are kept in
    # the last slot rather than lost. Masked tokens add zero.
    slot = jnp.clip(jnp.cumsum(response_mask, axis=1) - 1, 0, horizon - 1)
    tv = jnp.where(response_mask, tv_t, jnp.zeros((), tv_t.dtype))
    per_slot = jax.ops.segment_sum(tv.ravel(), slot.ravel(), num_segments=horizon)
    mean_tv_t = safe_divide(per_slot, jnp.broadcast_to(sequences, per_slot.shape))
    sequence_kl = safe_divide(masked_sum(kl_t, response_mask), sequences)
    zero, one = jnp.zeros((), kl_t.dtype), jnp.ones((), kl_t.dtype)
    sequence_tv = jnp.minimum(jnp.minimum(one, jnp.sum(mean_tv_t)), tv_bound_from_kl(sequence_kl))
    return BoundInputs(
        max_kl=jnp.maximum(masked_max(kl_t, response_mask), zero),
        max_tv=jnp.maximum(masked_max(tv_t, response_mask), zero),
        sequence_kl=sequence_kl,
        sequence_tv=sequence_tv,
        mean_tv_t=mean_tv_t,
    )
