"""Draw tokens from logits, and say under which log-probability each was drawn.

The distribution that samples is p_k = e_k / sum_j e_j with e_k = exp((z_k - max z) / temperature) on the kept entries
and 0 elsewhere. Kept are all entries by default. Truncations act in the order temperature, top-k, top-p, min-p, as in
llama.cpp's chain and in transformers, each on what the one before has left, renormalised:

- top-k: those of the smallest set {z_k >= tau} that has at least top_k members (Fan et al. 2018, arXiv:1805.04833);
- top-p: those of the smallest set {p_k >= tau} that has mass >= top_p (Holtzman et al. 2019, arXiv:1904.09751);
- min-p: those with p_k >= min_p * max_j p_j (Nguyen et al. 2024, arXiv:2407.01082).

Entries that tie with the last one kept are kept too, so top-k may keep more than top_k of them: the set depends on
probabilities only, never on token ids. top-p after top-k is the nucleus of the renormalised top-k distribution, never
larger than that of the whole softmax; min-p compares two probabilities and is the same before and after.

A draw inverts the cumulative distribution in two levels: a block of the vocabulary by one uniform number, an entry of
that block by a second one. It needs two random numbers per row instead of the V that Gumbel-max needs, one pass for the
maximum and one for the masses, and resolves probabilities far below the 2^-23 of one float32 uniform. No sort is made:
the thresholds of top-k and top-p are found by bisection over the bits of the float.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey

SMALLEST_BLOCK = 128
"""Entries per block of a small vocabulary; a larger one gets about as many blocks as entries per block."""


SMALLEST_TEMPERATURE = 1e-30
"""Above 0; far below, it is 0 in float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits before everything else; 0 means greedy, which records log-probability 0 because
            it draws with certainty.
        top_k: number of most likely tokens kept, at least 1, and more where some tie with the last of them; None for no
            such truncation, which the size of the vocabulary and more are too.
        top_p: mass of the nucleus (of what top_k keeps), in (0, 1]; None for no such truncation.
        min_p: smallest probability relative to the largest, in [0, 1]; None for no such truncation.

    Raises:
        ValueError: for a value outside its range, or a truncation of a greedy choice.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        # Compared first: a whole number may be too large for `isfinite`.
        if not (0 <= self.temperature < math.inf and self.temperature <= sys.float_info.max):
            raise ValueError(f"temperature must be finite and not negative (0 is greedy), got {self.temperature}")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {SMALLEST_TEMPERATURE}, got {self.temperature}")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k must be a whole number of tokens, at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.greedy and any(value is not None for value in (self.top_k, self.top_p, self.min_p)):
            raise ValueError("temperature 0 is greedy and keeps one token; top_k, top_p and min_p must be None")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether tokens may be left out that the model can draw."""
        return self.top_k is not None or self.top_p not in (None, 1) or self.min_p not in (None, 0)


def rollout_keys(
    key: PRNGKey, step: Int[Array, ""] | int, prompt_index: Int[Array, " N"], sample_index: Int[Array, " G"]
) -> Key[Array, "N G"]:
    """One key per rollout, whatever else is in the batch: fold_in of step, then prompt_index, then sample_index."""
    step_key = jax.random.fold_in(key, step)
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, prompt_index)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(prompt_keys, sample_index)


def token_uniforms(keys: Key[Array, " B"], token_index: Int[Array, ""] | Int[Array, " B"] | int) -> Float[Array, "B 2"]:
    """The two uniform numbers in [0, 1) with which each rollout draws its token number `token_index`, one of all or
    one of each.
    """

    def uniforms(key: PRNGKey, index: Int[Array, ""]) -> Float[Array, " 2"]:
        return jax.random.uniform(jax.random.fold_in(key, index), (2,), jnp.float32)

    return jax.vmap(uniforms)(keys, jnp.broadcast_to(token_index, keys.shape))


def sample_tokens(
    logits: Float[Array, "V B"], uniforms: Float[Array, "B 2"], settings: SamplingSettings
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token per column.

    Args:
        logits: vocabulary first, as `decode_logits` gives them; in float32 or wider; -inf is probability zero.
        uniforms: of `token_uniforms`; not looked at by a greedy choice.
        settings: temperature and truncation.

    Returns:
        The tokens, and their log-probabilities [nats] under the tempered, truncated and renormalised distribution that
        drew them. NaN for logits that are no distribution (a NaN or +inf among them, or all -inf); the token is then
        any.

    Raises:
        TypeError: for logits of another type.
    """
    if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.dtype.itemsize < 4:
        raise TypeError(f"logits must be in float32 or wider, got {logits.dtype}")
    blocks = _in_blocks(logits)
    maximum = jnp.max(blocks, axis=(0, 1))
    if settings.greedy:
        return _greedy(blocks)
    reach = _reach(blocks, maximum, len(logits), settings)
    return _drawn(blocks, maximum, reach, uniforms, settings.temperature)


def sample_rows(
    logits: Float[Array, "V B"],
    uniforms: Float[Array, "B 2"],
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """`sample_tokens` with a temperature and a nucleus of each column's own.

    Args:
        logits: as for `sample_tokens`.
        uniforms: of `token_uniforms`.
        temperature: divides the logits; 0 is greedy, at least `SMALLEST_TEMPERATURE` otherwise.
        top_p: mass of the nucleus in (0, 1]; 1 keeps every token. While it is 1 in all columns it costs nothing.

    Returns:
        As `sample_tokens`.
    """
    blocks = _in_blocks(logits)
    maximum = jnp.max(blocks, axis=(0, 1))
    greedy = temperature == 0
    temperature = jnp.where(greedy, 1, temperature).astype(logits.dtype)
    top_p = jnp.where(greedy, 1, top_p).astype(logits.dtype)
    whole = jnp.full_like(maximum, jnp.inf)

    def truncated() -> Float[Array, " B"]:
        return jnp.where(top_p < 1, _nucleus_reach(blocks, maximum, None, temperature, top_p), whole)

    reach = jax.lax.cond(jnp.any(top_p < 1), truncated, lambda: whole)
    drawn, likeliest = _drawn(blocks, maximum, reach, uniforms, temperature), _greedy(blocks)
    return jnp.where(greedy, likeliest[0], drawn[0]), jnp.where(greedy, likeliest[1], drawn[1])


def _greedy(blocks: Float[Array, "blocks size B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    block_max = jnp.max(blocks, axis=1)
    block = jnp.argmax(block_max, axis=0)
    entry = jnp.argmax(_take_block(blocks, block), axis=0)
    # A maximum that is NaN or infinite is of no distribution, and what it chose is not certain.
    certain = jnp.where(jnp.isfinite(jnp.max(block_max, axis=0)), jnp.zeros(block.shape, blocks.dtype), jnp.nan)
    return (block * blocks.shape[1] + entry).astype(jnp.int32), certain


def _drawn(
    blocks: Float[Array, "blocks size B"],
    maximum: Float[Array, " B"],
    reach: Float[Array, " B"] | None,
    uniforms: Float[Array, "B 2"],
    temperature: Float[Array, " B"] | float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    masses = jnp.sum(_weights(blocks, maximum, reach, temperature), axis=1)
    block = _invert(masses, uniforms[:, 0])
    chosen = _take_block(blocks, block)
    entry = _invert(_weights(chosen, maximum, reach, temperature), uniforms[:, 1])
    logit = jnp.take_along_axis(chosen, entry[None], axis=0)[0]
    log_prob = (logit - maximum) / temperature - jnp.log(jnp.sum(masses, axis=0))
    return (block * blocks.shape[1] + entry).astype(jnp.int32), log_prob


def drawing_log_probs(logits: Float[Array, "V B"], settings: SamplingSettings) -> Float[Array, "V B"]:
    """Log-probabilities [nats] of every token under the distribution that `sample_tokens` draws from.

    -inf for what is left out; 0 for the one token of a greedy choice. NaN for logits that are no distribution.

    Args:
        logits: as of `sample_tokens`.
        settings: temperature and truncation.
    """
    maximum = jnp.max(logits, axis=0)
    if settings.greedy:
        best = jnp.arange(len(logits))[:, None] == jnp.argmax(logits, axis=0)
        return jnp.where(jnp.isfinite(maximum), jnp.where(best, 0.0, -jnp.inf), jnp.nan).astype(logits.dtype)
    # Thresholds are found on the blocks that `sample_tokens` sums over: another order may round to another set.
    reach = _reach(_in_blocks(logits), maximum, len(logits), settings)
    below = maximum - logits
    kept = jnp.ones_like(below, bool) if reach is None else below <= reach
    return jax.nn.log_softmax(jnp.where(kept, -below / settings.temperature, -jnp.inf), axis=0)


def _in_blocks(logits: Float[Array, "V B"]) -> Float[Array, "blocks size B"]:
    vocabulary, columns = logits.shape
    balanced = 1 << math.ceil(math.log2(vocabulary) / 2)
    size = min(max(SMALLEST_BLOCK, balanced), vocabulary)
    padding = -vocabulary % size
    if padding:
        logits = jnp.pad(logits, ((0, padding), (0, 0)), constant_values=-jnp.inf)
    return logits.reshape(-1, size, columns)


def _take_block(blocks: Float[Array, "blocks size B"], block: Int[Array, " B"]) -> Float[Array, "size B"]:
    return jnp.take_along_axis(blocks, block[None, None], axis=0)[0]


def _weights(
    logits: Float[Array, "... B"],
    maximum: Float[Array, " B"],
    reach: Float[Array, " B"] | None,
    temperature: Float[Array, " B"] | float,
) -> Float[Array, "... B"]:
    # exp((z - max) / temperature) where max - z <= reach. Membership is decided on max - z, a single subtraction, so
    # that all passes over the logits agree about it; exp may round differently in a vectorised pass and a scalar one.
    below = maximum - logits
    weights = jnp.exp(-below / temperature)
    return weights if reach is None else jnp.where(below <= reach, weights, 0)


def _reach(
    blocks: Float[Array, "blocks size B"], maximum: Float[Array, " B"], vocabulary: int, settings: SamplingSettings
) -> Float[Array, " B"] | None:
    """How far below the maximum [logits, before temperature] an entry may lie and be kept; None if every entry is."""
    reach = None
    if settings.top_k is not None and settings.top_k < vocabulary:
        reach = _top_k_reach(blocks, maximum, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1:
        reach = _nucleus_reach(blocks, maximum, reach, settings.temperature, settings.top_p)
    if settings.min_p is not None and settings.min_p > 0:
        furthest = jnp.full_like(maximum, -settings.temperature * math.log(settings.min_p))
        reach = furthest if reach is None else jnp.minimum(reach, furthest)
    return reach


def _top_k_reach(blocks: Float[Array, "blocks size B"], maximum: Float[Array, " B"], top_k: int) -> Float[Array, " B"]:
    """Distance of the entry number top_k from the maximum: the smallest reach that keeps at least so many entries."""

    def enough(reach: Float[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.sum(maximum - blocks <= reach, axis=(0, 1)) >= top_k

    # Where fewer entries are possible the end is infinity, which keeps the impossible ones too, with weight 0.
    return _smallest(enough, jnp.full_like(maximum, jnp.inf))


def _nucleus_reach(
    blocks: Float[Array, "blocks size B"],
    maximum: Float[Array, " B"],
    within: Float[Array, " B"] | None,
    temperature: Float[Array, " B"] | float,
    top_p: Float[Array, " B"] | float,
) -> Float[Array, " B"]:
    """Smallest reach whose kept mass is at least top_p of the mass `within` a reach, or of all, to the last bit."""
    wanted = top_p * jnp.sum(_weights(blocks, maximum, within, temperature), axis=(0, 1))
    # Beyond this distance exp underflows to 0, so nothing further away can be needed.
    furthest = temperature * -math.log(jnp.finfo(blocks.dtype).smallest_subnormal)

    def enough(reach: Float[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.sum(_weights(blocks, maximum, reach, temperature), axis=(0, 1)) >= wanted

    # An end that is `within` at most has the mass that was wanted a part of.
    end = jnp.broadcast_to(jnp.asarray(furthest, maximum.dtype), maximum.shape)
    return _smallest(enough, end if within is None else jnp.minimum(end, within))


def _smallest(enough: Callable[[Float[Array, " B"]], Bool[Array, " B"]], end: Float[Array, " B"]) -> Float[Array, " B"]:
    """The smallest float in [0, end] of each column that is enough; `enough` never turns false as a float grows.

    The bits of non-negative floats, read as integers, are ordered as the floats are, so halving an interval of integers
    visits floats of every scale and ends on neighbouring ones after as many steps as the interval has bits.
    """
    integer = {4: jnp.int32, 8: jnp.int64}[end.dtype.itemsize]
    high = end.view(integer)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        found = enough(middle.view(end.dtype))
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    _, high = jax.lax.fori_loop(0, 8 * end.dtype.itemsize, halve, (jnp.zeros_like(high), high))
    return high.view(end.dtype)


def _invert(weights: Float[Array, "M B"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Index drawn with probability weights / sum(weights); never one of weight zero, whatever the sums round to."""
    size = weights.shape[0]
    # A triangular product instead of cumsum: one small operation where a scan would be a chain of them.
    ones = jnp.tril(jnp.ones((size, size), weights.dtype))
    cumulative = jnp.matmul(ones, weights, precision=jax.lax.Precision.HIGHEST)
    possible = weights > 0
    total = jnp.max(jnp.where(possible, cumulative, 0), axis=0)
    return jnp.argmax(possible & (cumulative > uniform * total), axis=0)
