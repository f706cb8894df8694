"""From accumulated sums to statistics, and from row cotangents to the gradient of a block of logits.

With p the policy (renormalised on its safe set if there is one), q the reference, l = log p - log q, and g_x the
cotangent of statistic x,

    dz = g_logp (e_a - p) - g_H p (log p + H) + 2 g_C p (p - C)
       + g_KL p (l - KL) + g_KLr (p - q) + (1/2) g_TV p (sign l - E_p[sign l])

Each difference is taken between quantities of the same arithmetic: log p + H is (z - m) - E_p[z - m], and l - KL is d -
E_p[d], so that rows of dz sum to zero and nothing cancels when policy and reference are close.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Int

from jaxrl_kernels._token_statistics.elementary import across
from jaxrl_kernels._token_statistics.elementary import expm1
from jaxrl_kernels._token_statistics.streaming import NOTHING
from jaxrl_kernels._token_statistics.streaming import Block
from jaxrl_kernels._token_statistics.streaming import Moments
from jaxrl_kernels._token_statistics.streaming import Rows
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import chi_square
from jaxrl_kernels._token_statistics.streaming import divergence
from jaxrl_kernels._token_statistics.streaming import log_normaliser
from jaxrl_kernels._token_statistics.streaming import surprise
from jaxrl_kernels._token_statistics.types import DIFFERENTIABLE
from jaxrl_kernels._token_statistics.types import TokenStatistics


class Constants(NamedTuple):
    """Row constants that the gradient of a block needs."""

    maximum: Rows
    total: Rows
    shift: Rows | None = None
    collision: Rows | None = None
    floor: Rows | None = None
    maximum_ref: Rows | None = None
    total_ref: Rows | None = None
    centre: Rows | None = None
    gap: Rows | None = None  # log-normaliser of the policy minus that of the reference, without their cancellation
    sign: Rows | None = None
    outside: Rows | None = None  # weight of the policy where the reference has none; given if it may have none


class Variation(NamedTuple):
    """Sums of the total-variation sweep: (1/2) sum |p - q|, and E_p[sign(p - q)]."""

    distance: Rows
    sign: Rows


def difference(p: Block, q: Block, log_ratio: Block) -> Block:
    """p - q = sign(l) max(p, q) (1 - e^{-|l|}), l = log p - log q: no cancellation however close the two are."""
    return -jnp.sign(log_ratio) * lax.max(p, q) * expm1(-jnp.abs(log_ratio))


def variation(z: Block, z_ref: Block, constants: Constants) -> Variation:
    """Contribution of one block to the total variation; needs the normalisers of both distributions."""
    column = _across(constants._asdict(), z)
    log_ratio = (z - z_ref) - column["gap"]
    p = jnp.exp(z - column["maximum"]) / column["total"]
    q = jnp.exp(z_ref - column["maximum_ref"]) / column["total_ref"]
    distance = jnp.abs(difference(p, q, log_ratio))
    signed = p * jnp.sign(log_ratio)
    if "floor" in column:
        kept = z >= column["floor"]
        distance = jnp.where(kept, distance, q)
        signed = jnp.where(kept, signed, jnp.zeros((), z.dtype))
    return Variation(0.5 * jnp.sum(distance, axis=-1), jnp.sum(signed, axis=-1))


def _across(rows: Mapping[str, Rows | None], block: Block) -> dict[str, Block]:
    return {name: across(value, block) for name, value in rows.items() if value is not None}


def conclude(
    summary: Summary,
    wanted: tuple[str, ...],
    targets: Int[Array, " N"],
    vocabulary: int,
    floor: Rows | None,
    whole: Rows | None,
) -> tuple[TokenStatistics, Constants]:
    """Statistics and gradient constants of a whole vocabulary, all but the total variation."""
    policy, other = summary.policy, summary.reference
    log_total = jnp.log(policy.total)
    shift = collision = None
    values: dict[str, Array] = {"max_log_prob": -log_total}
    if summary.shift is not None:
        shift = summary.shift / policy.total
        values["entropy"] = log_total - shift
    if summary.square is not None:
        values["collision"] = collision = summary.square / policy.total**2
    if summary.top is not None:
        weight = jnp.sum(jnp.exp(summary.top - policy.maximum[:, None]), axis=-1)
        values["top_k_mass"] = lax.min(weight / policy.total, jnp.ones_like(weight))
    log_prob = (summary.target - policy.maximum) - log_total
    if summary.target_kept is not None and whole is not None:
        log_prob = jnp.where(summary.target_kept > 0, log_prob, -jnp.inf)
        values["kept_mass"] = lax.min(policy.total / whole, jnp.ones_like(whole))
        values["target_kept"] = summary.target_kept > 0
    in_range = (targets >= 0) & (targets < vocabulary)
    values["log_prob"] = jnp.where(in_range, log_prob, jnp.nan)
    constants = Constants(policy.maximum, policy.total, shift, collision, floor)
    if other is not None:
        compared, constants = _compared(summary, other, constants)
        values |= compared
    return _select(values, wanted, finite_rows(constants)), constants


def _select(values: dict[str, Array], wanted: tuple[str, ...], finite: Array) -> TokenStatistics:
    chosen = {name: value for name, value in values.items() if name in wanted}
    marked = {name: x if x.dtype == bool else jnp.where(finite, x, jnp.nan) for name, x in chosen.items()}
    return TokenStatistics(**marked)


def _compared(summary: Summary, other: Moments, constants: Constants) -> tuple[dict[str, Array], Constants]:
    """The statistics that compare with the reference, all but the total variation, and the constants with theirs."""
    policy, outside = summary.policy, summary.policy_outside
    values: dict[str, Array] = {}
    constants = constants._replace(maximum_ref=other.maximum, total_ref=other.total, outside=outside)
    if other.spread is not None and other.centre is not None:
        kl_reverse = divergence(other, policy, surprise(outside, policy.total))
        values["kl_reverse"] = kl_reverse
        constants = constants._replace(gap=kl_reverse - other.centre)
    if policy.spread is not None and policy.centre is not None:
        kl = divergence(policy, other, surprise(summary.reference_outside, other.total))
        gap, infinite = policy.centre - kl, jnp.zeros(kl.shape, bool)
        if outside is not None:
            infinite = outside > 0
            gap = jnp.where(infinite, log_normaliser(policy) - log_normaliser(other), gap)
        values["kl"] = jnp.where(infinite, jnp.inf, kl)
        if summary.ratio is not None:
            values["chi_square"] = jnp.where(infinite, jnp.inf, chi_square(policy, other, summary.ratio, kl))
        constants = constants._replace(centre=policy.centre, gap=gap)
    return values, constants


def finite_rows(constants: Constants) -> Bool[Array, " N"]:
    """Rows without NaN or inf. In the others no statistic is a number and none has a gradient, so that nothing of them
    reaches the head's cotangent."""
    sums = jax.tree.leaves(constants._replace(floor=None))
    return jnp.all(jnp.stack([jnp.isfinite(value) for value in sums]), axis=0)


def logit_gradient(
    z: Block,
    z_ref: Block | None,
    targets: Int[Array, " N"],
    start: int | Int[Array, ""],
    constants: Constants,
    cotangent: dict[str, Rows],
) -> Block:
    """Gradient of sum_x g_x statistic_x with respect to a block of (temperature-scaled) logits; absent cotangents are
    zero."""
    column = _across(constants._asdict(), z)
    g = _across(cotangent, z)
    centred = z - column["maximum"]
    weight = jnp.exp(centred)
    bracket = jnp.zeros_like(centred)
    if "log_prob" in g:
        bracket = bracket - g["log_prob"]
    if "entropy" in g:
        bracket = bracket - g["entropy"] * (centred - column["shift"])
    p = weight / column["total"]
    if "collision" in g:
        bracket = bracket + 2 * g["collision"] * (p - column["collision"])
    if z_ref is not None and "kl" in g:
        slope = (z - z_ref) - column["centre"]
        if "outside" in column:
            # Where the reference has no mass KL is infinite, without a gradient, or p is 0.
            slope = jnp.where(z_ref <= NOTHING, jnp.zeros((), z.dtype), slope)
        bracket = bracket + g["kl"] * slope
    if z_ref is not None and "total_variation" in g:
        bracket = bracket + 0.5 * g["total_variation"] * (jnp.sign((z - z_ref) - column["gap"]) - column["sign"])
    out = p * bracket
    if z_ref is not None and "kl_reverse" in g:
        q = jnp.exp(z_ref - column["maximum_ref"]) / column["total_ref"]
        out = out + g["kl_reverse"] * difference(p, q, (z - z_ref) - column["gap"])
    if "log_prob" in g:
        hit = lax.broadcasted_iota(targets.dtype, z.shape, 1) == across(targets - start, z)
        out = out + jnp.where(hit, g["log_prob"], jnp.zeros((), z.dtype))
    if "floor" in column:
        out = jnp.where(z >= column["floor"], out, jnp.zeros((), z.dtype))
    return out


def usable(values: TokenStatistics, cotangents: TokenStatistics) -> dict[str, Rows]:
    """The cotangents that carry a gradient: of statistics with a VJP, not known to be zero. They are zero where the
    statistic itself is not finite: a pruned target, one outside the vocabulary, a divergence that is infinite."""
    given = {name: (getattr(values, name), getattr(cotangents, name)) for name in DIFFERENTIABLE}
    return {
        name: jnp.where(jnp.isfinite(value), cotangent, jnp.zeros((), value.dtype))
        for name, (value, cotangent) in given.items()
        if cotangent is not None and not isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
    }
