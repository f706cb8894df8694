"""What one policy-gradient step does to the logits of its context.

One sampled action c with advantage A and step size eta moves the logits by dz = eta A (e_c - p), p the policy, C =
sum_k p_k^2 its collision probability. Source: "Logit Dynamics in Softmax Policy Gradient Methods" (arXiv 2506.12912).

The formulas describe the step that the gradient asks for. A network realises dz = eta A K (e_c - p) with K its
empirical neural tangent kernel, whose norm lies between the extreme eigenvalues of K times the formula; contexts also
move each other. With temperature tau, divide by tau.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm import categorical
from jaxrl_llm.bounds.inputs import safe_sqrt
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_same_shape


@checked
def others_squared(p: Float[Array, "*shape"], collision: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """C - p_c^2 = sum over the other actions of p_k^2, held to [0, (1 - p_c)^2], between which it lies [prob].

    Near p_c = 1 the difference is below the rounding of C, and of either sign; the limits, both exact, are not.
    """
    rest = jnp.square(1 - p)
    return jnp.clip(collision - p * p, jnp.zeros((), p.dtype), rest)


@checked
def squared_update_norm(
    p: Float[Array, "*shape"], collision: Float[Array, "*shape"], *, step: ScalarLike = 1.0
) -> Float[Array, "*shape"]:
    """|dz|^2 = step^2 (1 - 2 p_c + C), step = eta A: the main formula of arXiv 2506.12912.

    Computed as (1 - p_c)^2 + `others_squared`, which does not cancel near p_c = 1 and is never negative.

    Args:
        p: probability p_c of the sampled action.
        collision: C of its context.
        step: learning rate times advantage.

    Returns:
        the squared Euclidean norm; 0 if and only if p_c = 1, at most 2 step^2.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(p=p, collision=collision)
    return jnp.square(step) * (jnp.square(1 - p) + others_squared(p, collision))


def _not_negative(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # 1 - C of a sum C that was rounded above 1.
    return jnp.maximum(x, jnp.zeros((), x.dtype))


@checked
def update_norm(
    p: Float[Array, "*shape"], collision: Float[Array, "*shape"], *, step: ScalarLike = 1.0
) -> Float[Array, "*shape"]:
    """|dz| = |step| sqrt(1 - 2 p_c + C). Args, Raises as `squared_update_norm`."""
    return safe_sqrt(squared_update_norm(p, collision, step=step))


@checked
def update_norm_range(
    p: Float[Array, "*shape"], *, vocabulary: int, step: ScalarLike = 1.0
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """|step| (1 - p_c) sqrt(V / (V - 1)) <= |dz| <= |step| (1 - p_c) sqrt(2), from p_c alone. Both ends are attained.

    The lower end by residual mass spread evenly, the upper by residual mass on one other action.

    Args:
        p: probability p_c of the sampled action.
        vocabulary: V, at least 2.
        step: learning rate times advantage.

    Returns:
        (smallest, largest) norm.

    Raises:
        ValueError: if vocabulary is smaller than 2.
    """
    if vocabulary < 2:
        raise ValueError(f"vocabulary is {vocabulary}; it must be at least 2, so that there is another action.")
    rest = jnp.abs(step) * (1 - p)
    return rest * (vocabulary / (vocabulary - 1)) ** 0.5, rest * 2**0.5


@checked
def expected_squared_update_norm(
    collision: Float[Array, "*shape"], *, step: ScalarLike = 1.0
) -> Float[Array, "*shape"]:
    """E_{c~p} |dz|^2 = step^2 (1 - C) = step^2 (1 - exp(-H2)), H2 the Renyi-2 entropy.

    Proposition 1 of EMPG (arXiv 2509.09265). It is monotone in H2, not in the Shannon entropy that EMPG uses (errata
    4.1).
    """
    return jnp.square(step) * _not_negative(1 - collision)


@checked
def expected_update_norm_range(
    collision: Float[Array, "*shape"], *, step: ScalarLike = 1.0
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """|step| (1 - C) / sqrt(2) <= E_{c~p} |dz| <= |step| sqrt(1 - C): what squares say about norms.

    The lower end is loose by a factor of at least sqrt(2), see `expected_update_norm_range_sharp` (errata F5.2).
    """
    rest = _not_negative(1 - collision)
    return jnp.abs(step) * rest / 2**0.5, jnp.abs(step) * safe_sqrt(rest)


@checked
def expected_update_norm_range_sharp(
    collision: Float[Array, "*shape"], *, vocabulary: int, step: ScalarLike = 1.0
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """|step| (1 - C) sqrt(V / (V - 1)) <= E_{c~p} |dz| <= |step| sqrt(1 - C); the uniform policy attains both ends.

    The lower end is the mean over c of the lower end of `update_norm_range`.

    Args:
        collision: C of the context.
        vocabulary: V, at least 2.
        step: learning rate times advantage.

    Returns:
        (smallest, largest) expected norm.

    Raises:
        ValueError: if vocabulary is smaller than 2.
    """
    one = jnp.ones((), collision.dtype)
    low, _ = update_norm_range(jnp.minimum(collision, one), vocabulary=vocabulary, step=step)
    return low, expected_update_norm_range(collision, step=step)[1]


@checked
def log_prob_changes(
    p: Float[Array, "*batch V"], action: Int[Array, "*batch"], *, step: ScalarLike = 1.0
) -> Float[Array, "*batch V"]:
    """First-order change of every log-probability: step (1[k = c] - p_k - p_c + C).

    The sampled action gains step (1 - 2 p_c + C). Another one changes by step (C - p_c - p_k): for A > 0 those with p_k
    < C - p_c rise too.

    Args:
        p: the policy.
        action: c, the sampled action.
        step: learning rate times advantage.

    Returns:
        d log p_k for every k [nats]; its mean under p is zero. NaN for an action outside the vocabulary.
    """
    chosen = categorical.at_target(p, action)[..., None]
    collision = jnp.sum(p * p, axis=-1, keepdims=True)
    hit = jax.nn.one_hot(action, p.shape[-1], dtype=p.dtype)
    return jnp.asarray(step, p.dtype) * (hit - p - chosen + collision)


@checked
def entropy_change(
    p: Float[Array, "*batch V"], action: Int[Array, "*batch"], *, step: ScalarLike = 1.0
) -> Float[Array, "*batch"]:
    """First-order change of the entropy: -step [ p_c (log p_c + H) - sum_k p_k^2 (log p_k + H) ].

    A covariance: reinforcing an action more likely than exp(-H) lowers the entropy, reinforcing a rarer one raises it,
    up to the second term.

    Args:
        p: the policy, all entries positive.
        action: c, the sampled action.
        step: learning rate times advantage.

    Returns:
        dH [nats]; NaN for an action outside the vocabulary.
    """
    log_p = jnp.log(p)
    surprise = p * (log_p + categorical.entropy(log_p)[..., None])
    chosen = categorical.at_target(surprise, action)
    return jnp.negative(step) * (chosen - jnp.sum(p * surprise, axis=-1))
