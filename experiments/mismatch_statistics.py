"""Exact statistics of two next-token distributions: what `mismatch_anatomy` measures in every context.

mu is the engine's distribution, pi the trainer's, x_a = log mu(a) - log pi(a). Sums run over the whole vocabulary, so
that an expectation over sampled tokens has no sampling noise. mu(a) may be 0 (top-p), pi(a) may not.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import mismatch

EDGES = np.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9])
"""Edges of the buckets of p = pi(a): below the first, between, above the last."""

SMALLEST_REST = 1e-30
"""Stands in for 1 - p where p is 1 to the last bit of the sum over the others."""

FLAT_BUCKETS = ("p < 0.1", "0.1 to 0.5", "0.5 to 0.9", "p > 0.9")
FLAT_STARTS = (0, 6, 8, 10)
"""First fine bucket of each of these."""

LOG_MIN_P = np.arange(-18.0, -1.9, 1.0)
"""Thresholds of the safe set."""


def precise_log_probs(log_p):
    """(log softmax, 1 - p), both to a relative precision near p = 1 too, where log p itself is lost in rounding.

    With S the sum of p_j / p_max over the others: log p_max = -log(1 + S) and 1 - p_max = S / (1 + S).
    """
    top = jax.nn.one_hot(jnp.argmax(log_p, axis=-1), log_p.shape[-1], dtype=bool)
    shifted = log_p - jnp.max(log_p, axis=-1, keepdims=True)
    others = jnp.sum(jnp.where(top, 0.0, jnp.exp(shifted)), axis=-1, keepdims=True)
    normalised = shifted - jnp.log1p(others)
    return normalised, jnp.where(top, others / (1 + others), -jnp.expm1(normalised))


def _variance(mu, values, mean):
    """Under mu, as a sum of squares: it cannot be negative."""
    return jnp.sum(mu * (values - mean[..., None]) ** 2, axis=-1)


@functools.partial(jax.jit, static_argnames="buckets")
def _statistics(log_mu, log_pi, *, buckets: tuple[float, ...]):
    (log_mu, _), (log_pi, rest) = precise_log_probs(log_mu), precise_log_probs(log_pi)
    mu, pi = jnp.exp(log_mu), jnp.exp(log_pi)
    possible = jnp.isfinite(log_mu)
    x = jnp.where(possible, log_mu - log_pi, 0.0)
    # mu log(mu / pi) - mu + pi: the same sum, every term of second order, so that rounding does not show.
    k3 = x + jnp.expm1(-x)
    kl = jnp.sum(jnp.where(possible, mu * k3, pi), axis=-1)
    expected = functools.partial(jnp.sum, axis=-1)
    collision = expected(pi * pi)
    rest = jnp.maximum(rest, SMALLEST_REST)
    range_ = (jnp.max(x, axis=-1) - jnp.min(x, axis=-1)) / 2
    noise = jnp.where(jnp.all(possible, axis=-1), range_, jnp.inf)
    printed = mismatch.first_order_log_prob_change(pi, max_noise=1.0) * noise[..., None]
    two_sided = mismatch.two_sided_log_prob_change(pi, mu, max_noise=1.0) * noise[..., None]
    statistics = {
        "kl": kl,
        "tv": expected(jnp.abs(mu - pi)) / 2,
        "collision": collision,
        "noise": noise,
        "above_printed": expected(jnp.where(jnp.abs(x) > printed * (1 + 1e-4) + 1e-6, mu, 0.0)),
        "largest_printed": jnp.max(jnp.abs(x) / jnp.maximum(printed, 1e-6), axis=-1),
        "largest_two_sided": jnp.max(jnp.abs(x) / jnp.maximum(two_sided, 1e-6), axis=-1),
        "k1_variance": _variance(mu, x, kl),
        "k2": expected(mu * x * x) / 2,
        "k2_variance": _variance(mu, x * x / 2, expected(mu * x * x) / 2),
        # Its mean is KL less pi's mass on what mu does not sample.
        "k3_variance": _variance(mu, k3, expected(mu * k3)),
        "k1_negative": expected(jnp.where(x < 0, mu, 0.0)),
    }
    spread = jnp.broadcast_to(collision[..., None], pi.shape)
    bias = mismatch.gaussian_sampled_bias(pi, spread, scale=1.0)
    variance = mismatch.gaussian_log_prob_variance(pi, spread, scale=1.0)
    weighted = {
        "mass": mu,
        "size": mu * jnp.abs(x),
        "ratio": mu * jnp.abs(x) / rest,
        "bias": mu * x,
        "law": mu * bias,
        "selection": (mu - pi) * x,
        "variance": pi * variance,
    }
    bucket = jax.nn.one_hot(jnp.searchsorted(jnp.asarray(buckets), pi), len(buckets) + 1)
    totals = jnp.einsum("rvk,rvb->krb", jnp.stack(list(weighted.values()), axis=-1), bucket, precision="highest")
    statistics |= {f"bucket_{name}": total for name, total in zip(weighted, totals, strict=True)}
    return statistics


@jax.jit
def _pruned(log_mu, log_pi, log_min_p):
    mu, pi = jax.nn.softmax(log_mu), jax.nn.softmax(log_pi)
    keep_mu, keep_pi = (z >= jnp.max(z, axis=-1, keepdims=True) + log_min_p for z in (log_mu, log_pi))
    # What a pruned side samples: renormalised on its own set.
    safe_mu, safe_pi = (jnp.where(keep, p, 0.0) for keep, p in ((keep_mu, mu), (keep_pi, pi)))
    safe_mu, safe_pi = (p / jnp.sum(p, axis=-1, keepdims=True) for p in (safe_mu, safe_pi))
    return {
        "pruned_mass": jnp.sum(jnp.where(keep_pi, 0.0, pi), axis=-1),
        "flips": jnp.sum(keep_mu != keep_pi, axis=-1),
        "missing_mass": jnp.sum(jnp.where(keep_mu, 0.0, safe_pi), axis=-1),
        "wasted_mass": jnp.sum(jnp.where(keep_pi, 0.0, safe_mu), axis=-1),
    }


def exact_statistics(log_mu: np.ndarray, log_pi: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of every context, [B, R] each; those by bucket of p or by threshold have one more axis.

    Args:
        log_mu: log-probabilities of the engine [B, R, V]; -inf where it gives none.
        log_pi: of the trainer.

    Returns:
        kl KL(mu || pi), tv, collision of pi; noise: the smallest e for which the logits of both differ by at most e
        (half the range of x), infinite where mu is truncated; above_printed: probability under mu that |x| exceeds 2 e
        (1 - p), and largest ratios to it and to the two-sided bound; variances of the estimators k1, k2, k3 under mu
        within the context, and the mean of k2; bucket_*: sums under mu of 1, |x|, |x| / (1 - p), x and its predicted
        bias / s^2; sums of (mu - pi) x, which is what being sampled by mu and not by pi adds to x, and of its
        prediction pi Var(x) / s^2; masses and flips of the safe sets at `LOG_MIN_P`.
    """
    made: list[dict[str, np.ndarray]] = []
    for mu, pi in zip(log_mu, log_pi, strict=True):  # a row at a time: [R, V] is what fits a cache
        row = dict(jax.device_get(_statistics(mu, pi, buckets=tuple(EDGES.tolist()))))
        pruned = [jax.device_get(_pruned(mu, pi, threshold)) for threshold in LOG_MIN_P]
        row |= {name: np.stack([one[name] for one in pruned], axis=-1) for name in pruned[0]}
        made.append(row)
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def bucket_means(part: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Mean over tokens that mu samples, by bucket of p; NaN where there is less than a thousandth of a token."""
    real = part["full_mask"]
    total, mass = part[f"bucket_{name}"][real].sum(axis=0), part["bucket_mass"][real].sum(axis=0)
    return np.where(mass > 1e-3, total / np.maximum(mass, 1e-30), np.nan)


def bucket_errors(part: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Standard errors of `bucket_means` over contexts."""
    real = part["full_mask"]
    mass, values = part["bucket_mass"][real], part[f"bucket_{name}"][real]
    spread = np.sqrt(((values - np.nan_to_num(bucket_means(part, name)) * mass) ** 2).sum(axis=0))
    return spread / np.maximum(mass.sum(axis=0), 1e-30)


def noise_scale(part: dict[str, np.ndarray]) -> float:
    """s of the Gaussian model, from E KL = s^2 (1 - C) / 2 over all contexts."""
    real = part["full_mask"]
    return float(np.sqrt(2 * part["kl"][real].sum() / (1 - part["collision"][real]).sum()))


def _flat_sums(part: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of |d| / (1 - p) and of mass in the four wide buckets, [responses, 4] each."""
    real = part["full_mask"][..., None]
    sums = [np.where(real, part[f"bucket_{name}"], 0).sum(axis=1) for name in ("ratio", "mass")]
    total, mass = (np.add.reduceat(one, FLAT_STARTS, axis=1) for one in sums)
    return total, mass


def _flat(total: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, float]:
    means = np.where(mass > 1e-3, total / np.maximum(mass, 1e-30), np.nan)
    largest = np.nanmax(means)
    return means, float(np.nanmin(means) / largest) if largest > 0 else 1.0


def flat_means(part: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean of |d| / (1 - p) over the tokens that the engine samples, in the four wide buckets."""
    return _flat(*(one.sum(axis=0) for one in _flat_sums(part)))[0]


def flatness(part: Mapping[str, np.ndarray]) -> float:
    """Smallest over largest of `flat_means`; 1 is the (1 - p) law, 0 its failure."""
    return _flat(*(one.sum(axis=0) for one in _flat_sums(part)))[1]


def flatness_interval(part: Mapping[str, np.ndarray], *, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the flatness, by bootstrap over responses: tokens of one response depend on each other."""
    total, mass = _flat_sums(part)
    generator, count = np.random.default_rng(0), len(total)
    chosen = generator.integers(0, count, (draws, count))
    found = [_flat(total[rows].sum(axis=0), mass[rows].sum(axis=0))[1] for rows in chosen]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
