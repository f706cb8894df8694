"""How far noise in the logits can move probabilities: the (1 - p) law of arXiv 2512.23087 and what replaces it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.bounds import mismatch
from theory_checks.check import Check
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2512.23087"
DERIVED = "derived (docs/theory.md)"
VOCABULARY, TOKENS = 6, 8
NOISES = (0.01, 0.1, 0.5, 1.0, 2.0)


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Sequences of contexts from flat to peaked; random bounded noise, and the worst signs for token 0.

    The last context of each instance has two tokens that matter, (sigmoid(-e), sigmoid(e)): there TV is attained.
    """
    noise = np.asarray(NOISES)[np.arange(count) % len(NOISES)]
    spread = np.array([0.3, 1.0, 3.0, 6.0])[generator.integers(4, size=(count, TOKENS, 1))]
    logits = spread * generator.normal(size=(count, TOKENS, VOCABULARY))
    unit = generator.uniform(-1, 1, size=logits.shape)
    logits[:, -1] = np.array([0.0, 0.0, -80.0, -80.0, -80.0, -80.0])
    logits[:, -1, 0] = -noise
    unit[:, -1] = np.where(np.arange(VOCABULARY) == 0, 1.0, -1.0)
    return [(jnp.asarray(logits), jnp.asarray(unit), jnp.asarray(noise))]


def _sampled_moments(logits: jax.Array) -> dict[str, jax.Array]:
    """Second-order moments under N(0, s^2) noise, from exact derivatives at zero noise, per unit of s^2.

    E over e of a smooth f with f(0) = 0 is s^2 / 2 tr f''(0) + O(s^4): first derivatives average out.
    """

    def trace(f):
        return jnp.trace(jax.hessian(f)(jnp.zeros_like(logits))) / 2

    log_p = jax.nn.log_softmax(logits)

    def change(e, a):
        return jax.nn.log_softmax(logits + e)[a] - log_p[a]

    tokens = range(VOCABULARY)
    slopes = [jax.grad(change)(jnp.zeros_like(logits), a) for a in tokens]
    # p'_a D is what sampling weighs the change with; its expectation over p_a is the conditional one to this order.
    weighted = [
        trace(lambda e, a=a: jnp.exp(jax.nn.log_softmax(logits + e)[a] - log_p[a]) * change(e, a)) for a in tokens
    ]
    return {
        "variance": jnp.stack([jnp.sum(slope * slope) for slope in slopes]),
        "bias": jnp.stack(weighted),
        "expected_kl": trace(lambda e: categorical.kl(logits + e, logits)),
    }


def _measure(logits: jax.Array, unit: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
    before, after = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits + noise * unit)
    signs = jnp.where(jnp.arange(VOCABULARY) == 0, -1.0, 1.0)[None, :]
    p, q, change = jnp.exp(before), jnp.exp(after), after - before
    low, high = mismatch.log_prob_change_range(p, max_noise=noise)
    # Token 0 with all noise against it, and all noise for it.
    against = jax.nn.log_softmax(logits + noise * signs)[:, 0] - before[:, 0]
    towards = jax.nn.log_softmax(logits - noise * signs)[:, 0] - before[:, 0]
    # 1 - p without cancellation, by which the first-order law is judged near p = 1.
    rest = jax.nn.logsumexp(before[:, 1:], axis=1)
    printed = mismatch.first_order_log_prob_change(p[:, 0], max_noise=noise)
    collision = jnp.broadcast_to(jnp.sum(p[0] * p[0]), (VOCABULARY,))
    every = jnp.ones((1, TOKENS), bool)
    moments = _sampled_moments(logits[0])
    return {
        "change": change,
        "low": low,
        "high": high,
        "against": against,
        "towards": towards,
        "two_sided": mismatch.two_sided_log_prob_change(p, q, max_noise=noise),
        "two_sided_wrong": 2 * noise * (1 - jnp.maximum(p, q)),
        "uniform": mismatch.uniform_log_prob_change(p, max_noise=noise),
        "printed": printed,
        "printed_exact": 2 * noise * jnp.exp(rest),
        "violation": jnp.broadcast_to(mismatch.first_order_violation(noise), against.shape),
        "kl": jnp.stack([categorical.kl(logits, logits + noise * unit), categorical.kl(logits + noise * unit, logits)]),
        "kl_bound": jnp.broadcast_to(mismatch.kl_from_noise(noise), (2, TOKENS)),
        "tv": categorical.total_variation(logits, logits + noise * unit),
        "tv_bound": jnp.broadcast_to(mismatch.tv_from_noise(noise), (TOKENS,)),
        "sequence_change": jnp.abs(jnp.sum(against)),
        "sequence_bound": mismatch.sequence_log_prob_change(
            p[None, :, 0], jnp.exp(before + against[:, None])[None, :, 0], every, max_noise=noise
        )[0],
        "variance": moments["variance"],
        "variance_formula": mismatch.gaussian_log_prob_variance(p[0], collision, scale=1.0),
        "bias": moments["bias"],
        "bias_formula": mismatch.gaussian_sampled_bias(p[0], collision, scale=1.0),
        "expected_kl": moments["expected_kl"],
        "expected_kl_formula": mismatch.gaussian_expected_kl(collision[0], scale=1.0),
        "mean_bias": jnp.sum(p[0] * mismatch.gaussian_sampled_bias(p[0], collision, scale=1.0)),
    }


WORLD = World(name="mismatch", draw=_draw, measure=_measure)


def _check(name, statement, function, left, right, *, paper=DERIVED, **options) -> Check:
    names = " ".join(f"bounds.mismatch.{part}" for part in function.split())
    return compare(f"mismatch.{name}", statement, names, left, right, world=WORLD, paper=paper, **options)


CHECKS = [
    _check(
        "range_upper",
        "D <= -log(p + (1 - p) exp(-2 e)) for |noise| <= e",
        "log_prob_change_range",
        lambda m: m["change"],
        lambda m: m["high"],
        wrong=lambda m: m["low"],
    ),
    _check(
        "range_lower",
        "-D <= log(p + (1 - p) exp(2 e))",
        "log_prob_change_range",
        lambda m: -m["change"],
        lambda m: -m["low"],
        wrong=lambda m: -m["high"],
    ),
    _check(
        "range_attained",
        "both ends of the range are attained by opposite signs on the token and the rest",
        "log_prob_change_range",
        lambda m: np.stack([m["against"], m["towards"]], 1),
        lambda m: np.stack([m["low"][..., 0], m["high"][..., 0]], 1),
        wrong=lambda m: np.stack([m["low"][..., 0], -m["low"][..., 0]], 1),
        equality=True,
    ),
    _check(
        "two_sided",
        "|D| <= 2 e (1 - min(p, p'))",
        "two_sided_log_prob_change",
        lambda m: np.abs(m["change"]),
        lambda m: m["two_sided"],
        wrong=lambda m: m["two_sided_wrong"],
    ),
    _check(
        "uniform",
        "|D| <= min(2 e, log(1 + (1 - p)(exp(2 e) - 1)))",
        "uniform_log_prob_change",
        lambda m: np.maximum(np.abs(m["change"])[..., 0], np.abs(m["against"])),
        lambda m: m["uniform"][..., 0],
        wrong=lambda m: 0.9 * m["uniform"][..., 0],
    ),
    _check(
        "first_order_upwards",
        "printed: D <= 2 e (1 - p), true upwards",
        "first_order_log_prob_change",
        lambda m: m["towards"],
        lambda m: m["printed"],
        wrong_left=lambda m: -m["against"],
        paper=PAPER,
    ),
    _check(
        "first_order_law_fails",
        "erratum F3.1: printed |D| <= 2 e (1 - p) is broken downwards on every token: 2 e (1 - p) <= max -D",
        "first_order_log_prob_change",
        lambda m: m["printed"],
        lambda m: -m["against"],
        wrong=lambda m: m["towards"],
    ),
    _check(
        "first_order_violation",
        "-D <= 2 e (1 - p) (exp(2 e) - 1) / (2 e), approached as p -> 1",
        "first_order_violation",
        lambda m: -m["against"],
        lambda m: m["violation"] * m["printed_exact"],
        wrong=lambda m: m["printed_exact"],
    ),
    _check(
        "kl",
        "KL <= e^2 / 2 in both directions",
        "kl_from_noise",
        lambda m: m["kl"],
        lambda m: m["kl_bound"],
        wrong=lambda m: m["kl_bound"] / 2,
    ),
    _check(
        "tv",
        "TV <= tanh(e / 2), attained",
        "tv_from_noise",
        lambda m: m["tv"],
        lambda m: m["tv_bound"],
        wrong=lambda m: 0.9 * m["tv_bound"],
    ),
    _check(
        "sequence",
        "|sum_t D_t| <= 2 e sum_t (1 - min(p_t, p'_t))",
        "sequence_log_prob_change",
        lambda m: m["sequence_change"],
        lambda m: m["sequence_bound"],
        wrong=lambda m: m["sequence_bound"] / 2,
    ),
    _check(
        "gaussian_variance",
        "Var D = s^2 (1 - 2 p + C) to second order, from exact derivatives",
        "gaussian_log_prob_variance",
        lambda m: m["variance"],
        lambda m: m["variance_formula"],
        wrong=lambda m: m["variance_formula"] - 1,
        equality=True,
    ),
    _check(
        "sampled_bias",
        "bias of a sampled token = s^2 (1/2 - 2 p + 3/2 C) to second order, from exact derivatives",
        "gaussian_sampled_bias",
        lambda m: m["bias"],
        lambda m: m["bias_formula"],
        wrong=lambda m: m["variance_formula"] / 2,
        equality=True,
    ),
    _check(
        "expected_kl",
        "E KL(p' || p) = s^2 (1 - C) / 2 = mean of the sampled bias, to second order",
        "gaussian_expected_kl gaussian_sampled_bias",
        lambda m: np.stack([m["expected_kl"], m["mean_bias"]], 1),
        lambda m: np.repeat(m["expected_kl_formula"][:, None], 2, axis=1),
        wrong=lambda m: np.repeat(2 * m["expected_kl_formula"][:, None], 2, axis=1),
        equality=True,
    ),
]
