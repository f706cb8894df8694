"""What goes into and comes out of the per-token statistics."""

from typing import NamedTuple

from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

ALWAYS = ("log_prob", "entropy", "collision", "max_log_prob")
"""Statistics that need the policy alone."""

WITH_TOP_K = ("top_k_mass",)
"""Statistics that need the number of tokens to look at."""

WITH_REFERENCE = ("kl", "kl_reverse", "total_variation", "chi_square")
"""Statistics that compare the policy with a reference."""

DIFFERENTIABLE = ("log_prob", "entropy", "collision", "kl", "kl_reverse", "total_variation")
"""Statistics with a VJP; the others carry no gradient."""


class Reference(NamedTuple):
    """The distribution that the policy is compared with: softmax(hidden @ head / temperature). No gradient flows into
    it.

    hidden: [N, D'] hidden states; the width may differ from the policy's.
    head: [D', V], or [V, D'] when the policy's head is given with vocabulary_axis=0.
    """

    hidden: Float[Array, "N D_ref"]
    head: Float[Array, "_ _"]


class ReferenceLogits(NamedTuple):
    """The distribution that the policy is compared with, from logits that exist already: softmax(logits / temperature).
    No gradient flows into it.

    logits: [N, V], soft-capped if that is meant: the cap of the call acts on logits that a head makes. One of -inf (or
        below -1e30) is a probability of 0: kl and chi_square are +inf, without a gradient, where the policy has mass
        there, and kl_reverse and total_variation are finite. A row of such logits alone counts as NaN.
    """

    logits: Float[Array, "N V"]


class TokenStatistics(NamedTuple):
    """Per-token statistics of p = softmax(logits), against q = softmax(reference logits); absent ones are None.

    All in the wider of float32 and the inputs' dtype; l_k = log p_k - log q_k.

    log_prob: log p_a of the target a [nats].
    entropy: -sum_k p_k log p_k [nats].
    collision: sum_k p_k^2 [prob].
    max_log_prob: max_k log p_k [nats]; no gradient.
    kl: KL(p || q) = sum_k p_k l_k [nats].
    kl_reverse: KL(q || p) = -sum_k q_k l_k [nats].
    total_variation: (1/2) sum_k |p_k - q_k| [prob].
    chi_square: sum_k p_k^2 / q_k - 1 [1]; no gradient.
    top_k_mass: mass of the top_k most likely tokens [prob]; no gradient.
    kept_mass: mass of the safe set under the policy before it was renormalised [prob]; no gradient.
    target_kept: whether the target is in the safe set [bool].
    """

    log_prob: Float[Array, " N"] | None = None
    entropy: Float[Array, " N"] | None = None
    collision: Float[Array, " N"] | None = None
    max_log_prob: Float[Array, " N"] | None = None
    kl: Float[Array, " N"] | None = None
    kl_reverse: Float[Array, " N"] | None = None
    total_variation: Float[Array, " N"] | None = None
    chi_square: Float[Array, " N"] | None = None
    top_k_mass: Float[Array, " N"] | None = None
    kept_mass: Float[Array, " N"] | None = None
    target_kept: Bool[Array, " N"] | None = None
