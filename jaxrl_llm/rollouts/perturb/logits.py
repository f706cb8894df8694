"""What an inference engine does to the logits: (logits, keys of their contexts) in, logits out.

Noise must belong to the context, or the perturbed sampler would not be a policy: asked twice about one context, it must
give the same distribution. So each context has a key, made by folding its tokens into one root key, and a perturbation
draws its noise from that key alone. `context_keys` makes the keys of a whole text, `next_keys` those after one more
token; the sampler and the scoring pass thereby see the same noise.

Every function here has the signature of `LogitPerturbation` once its keywords are set by `functools.partial`, and
`chain_logits` composes them. Logits are the model's own, before temperature; -inf is probability zero and stays so.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm import categorical
from jaxrl_llm.rollouts.perturb.rounding import round_to_bf16
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey

LogitPerturbation = Callable[[Array, Array], Array]
"""(logits [*batch, V], keys [*batch]) -> logits [*batch, V]."""

LINK = 2**30
"""Folded into a key, with the place in a chain, for every perturbation but the first: far above any token."""

BF16_ROUNDOFF = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


def next_keys(keys: Key[Array, " B"], tokens: Int[Array, " B"]) -> Key[Array, " B"]:
    """Keys of the contexts that have these tokens behind them as well."""
    return jax.vmap(jax.random.fold_in)(keys, tokens)


def context_keys(
    key: PRNGKey, tokens: Int[Array, "B T"], token_mask: Bool[Array, "B T"] | None = None
) -> Key[Array, "B T"]:
    """The key of the context before each token: `key` with every real token before it folded in, in order.

    Args:
        key: of the engine: another key is another engine.
        tokens: texts.
        token_mask: which tokens are real; padding changes no key. None for all.

    Returns:
        one key per token; padding has that of the real tokens before it.
    """
    mask = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask.astype(bool)

    def step(keys: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        token, real = column
        return jax.vmap(jnp.where)(real, next_keys(keys, token), keys), keys

    start = jnp.broadcast_to(key, tokens.shape[:1])
    return jax.lax.scan(step, start, (tokens.T, mask.T))[1].T


def _draw(
    law: Callable[..., Array], logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], seed: int
) -> Float[Array, "*batch V"]:
    def one(key: Array) -> Array:
        return law(jax.random.fold_in(key, seed), logits.shape[-1:], logits.dtype)

    return jax.vmap(one)(keys.reshape(-1)).reshape(logits.shape)


def _require_scale(scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale}")


def gaussian_noise(
    logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], *, scale: float, seed: int = 0
) -> Float[Array, "*batch V"]:
    """z_k + e_k with e_k independent N(0, scale^2), the model of `bounds.mismatch.gaussian_sampled_bias`.

    Args:
        logits: of each context.
        keys: of each context.
        scale: standard deviation [nats].
        seed: of this noise; another seed is another noise.

    Returns:
        the logits of the perturbed policy.

    Raises:
        ValueError: a negative or infinite scale.
    """
    _require_scale(scale)
    return logits + scale * _draw(jax.random.normal, logits, keys, seed)


def bounded_noise(
    logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], *, scale: float, seed: int = 0
) -> Float[Array, "*batch V"]:
    """z_k + e_k with e_k independent and uniform in [-scale, scale], the model of the (1 - p) theorem.

    Args, Returns, Raises as `gaussian_noise`; scale is the largest |e_k| [nats].
    """
    _require_scale(scale)
    return logits + scale * (2 * _draw(jax.random.uniform, logits, keys, seed) - 1)


def relative_noise(
    logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], *, scale: float = BF16_ROUNDOFF, seed: int = 0
) -> Float[Array, "*batch V"]:
    """z_k (1 + e_k) with e_k independent and uniform in [-scale, scale]: rounding that is relative to the logit.

    Unlike the other two it depends on a constant that is added to all logits, as rounding does, and it is larger for
    entries that are far from zero, so that it need not be flat in p.

    Args, Returns, Raises as `gaussian_noise`; scale is the largest relative error.
    """
    _require_scale(scale)
    # An excluded entry is -inf, and -inf times a rounded 0 would be no number.
    noise = jnp.where(jnp.isinf(logits), jnp.zeros((), logits.dtype), logits)
    return logits + noise * scale * (2 * _draw(jax.random.uniform, logits, keys, seed) - 1)


def bf16_logits(logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"]) -> Float[Array, "*batch V"]:
    """Logits rounded to bfloat16; `keys` are not looked at."""
    del keys
    return round_to_bf16(logits)


def temperature_slip(
    logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], *, temperature: float
) -> Float[Array, "*batch V"]:
    """z / temperature, that the other side does not know of; `keys` are not looked at.

    Raises:
        ValueError: temperature <= 0.
    """
    del keys
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return logits / temperature


def top_p_slip(
    logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], *, top_p: float
) -> Float[Array, "*batch V"]:
    """Only the smallest set {p_k >= tau} of mass >= top_p; entries that tie with its last one stay too.

    The sampled law then lacks tokens that the trainer's has: KL(trainer || sampler) is infinite, and no importance
    weight can make up for what is never sampled. `keys` are not looked at.

    Raises:
        ValueError: top_p outside (0, 1].
    """
    del keys
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jnp.exp(categorical.log_probs(ordered))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    return categorical.restrict(logits, logits >= threshold)


def top_k_slip(logits: Float[Array, "*batch V"], keys: Key[Array, "*batch"], *, top_k: int) -> Float[Array, "*batch V"]:
    """Only the top_k largest entries; those that tie with the last one stay too. `keys` are not looked at.

    Raises:
        ValueError: top_k < 1.
    """
    del keys
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1 token, got {top_k}")
    threshold = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return categorical.restrict(logits, logits >= threshold)


def _link_keys(keys: Key[Array, "*batch"], place: int) -> Key[Array, "*batch"]:
    return next_keys(keys.reshape(-1), jnp.full(keys.size, place + LINK)).reshape(keys.shape)


def chain_logits(*perturbations: LogitPerturbation) -> LogitPerturbation:
    """One after the other, the first one first; without any, the identity.

    The first has the keys of the context, each later one keys of its own, so that two noises of one law and one seed
    are independent.
    """

    def chained(logits: Array, keys: Array) -> Array:
        for place, perturbation in enumerate(perturbations):
            logits = perturbation(logits, keys if place == 0 else _link_keys(keys, place))
        return logits

    return chained
