"""Summaries of parts of a vocabulary that lie on different devices, joined inside a shard_map by maxima and sums.

The formulas are those by which streaming.py combines two blocks, for any number of parts at once: with M = max m_i and
w_i = S_i e^{m_i - M}, S = sum w_i, centre = sum w_i centre_i / S, and every part is re-centred before it is added.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.streaming import Moments
from jaxrl_kernels._token_statistics.streaming import Rows
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import recentred


def local_targets(targets: Array, vocabulary: int, axis: str | None) -> Array:
    """Targets counted from the first token of this device's part; `vocabulary` is the size of that part."""
    return targets if axis is None else targets - (lax.axis_index(axis) * vocabulary).astype(targets.dtype)


def whole_vocabulary(vocabulary: int, axis: str | None) -> int:
    """Size of the vocabulary over all devices."""
    return vocabulary if axis is None else vocabulary * lax.axis_size(axis)


def join(part: Summary, axis: str | None) -> Summary:
    """Summary of all parts, the same on every device of the mesh axis; `part` itself where the axis is None."""
    if axis is None:
        return part
    policy, scale = _join_moments(part.policy, axis)
    shift = square = target_kept = ratio = reference = outside = top = beyond = None
    if part.shift is not None:
        moved = part.shift + (part.policy.maximum - policy.maximum) * part.policy.total
        shift = lax.psum(scale * moved, axis)
    if part.square is not None:
        square = lax.psum(scale**2 * part.square, axis)
    if part.target_kept is not None:
        target_kept = lax.psum(part.target_kept, axis)
    if part.ratio is not None:
        ratio = _join_moments(part.ratio, axis)[0]
    if part.reference is not None:
        reference, scale_ref = _join_moments(part.reference, axis)
        if part.reference_outside is not None:
            outside = lax.psum(scale_ref * part.reference_outside, axis)
    if part.policy_outside is not None:
        beyond = lax.psum(scale * part.policy_outside, axis)
    if part.top is not None:
        every = lax.all_gather(part.top, axis, axis=1, tiled=True)
        top = lax.pmax(lax.top_k(every, part.top.shape[1])[0], axis)
    target = lax.psum(part.target, axis)
    return Summary(policy, shift, square, target, target_kept, ratio, reference, outside, top, beyond)


def _join_moments(part: Moments, axis: str) -> tuple[Moments, Rows]:
    maximum = lax.pmax(part.maximum, axis)
    scale = jnp.exp(part.maximum - maximum)
    weight = part.total * scale
    total = lax.psum(weight, axis)
    if part.centre is None:
        return Moments(maximum, total), scale
    share = jnp.where(weight == 0, jnp.zeros_like(weight), part.centre * (weight / total))
    centre = lax.psum(share, axis)
    move = centre - part.centre
    spread = growth = None
    if part.spread is not None:
        spread = lax.psum(recentred(part.spread * scale, weight, move), axis)
    if part.growth is not None:
        growth = lax.psum(recentred(part.growth * scale, weight, -move), axis)
    return Moments(maximum, total, centre, spread, growth), scale


def add(sums: Variation, axis: str | None) -> Variation:
    """Sums over all parts."""
    return sums if axis is None else jax.tree.map(lambda x: lax.psum(x, axis), sums)
