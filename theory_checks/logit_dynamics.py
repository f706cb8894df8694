"""What one policy-gradient step does to the logits of its context (arXiv 2506.12912)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import logit_dynamics
from jaxrl_llm.bounds import mismatch
from theory_checks.check import Check
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2506.12912"
DERIVED = "derived (docs/theory.md)"
VOCABULARY, WIDTH = 5, 12


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Policies from flat to peaked; one in four has its residual mass spread evenly, one in four on one action."""
    spread = np.array([0.3, 1.0, 3.0])[generator.integers(3, size=(count, 1))]
    logits = spread * generator.normal(size=(count, VOCABULARY))
    kind = np.arange(count) % 4
    action = generator.integers(VOCABULARY, size=count)
    others = np.arange(VOCABULARY)[None, :] != action[:, None]
    even = (kind == 1)[:, None] & others
    logits = np.where(even, 0.1, logits)
    alone = (kind == 2)[:, None] & others & (np.arange(VOCABULARY)[None, :] != (action[:, None] + 1) % VOCABULARY)
    logits = np.where(alone, -40.0, logits)
    step = generator.normal(size=count)
    network = generator.normal(size=(count, VOCABULARY, WIDTH)) / np.sqrt(WIDTH)
    return [tuple(jnp.asarray(x) for x in (logits, action, step, network))]


def _realised(update: jax.Array, network: jax.Array) -> dict[str, jax.Array]:
    """What a linear network z = M theta makes of the update: M M^T of it, between the extreme eigenvalues of M M^T."""
    theta_step = jax.grad(lambda theta: jnp.sum(jax.lax.stop_gradient(update) * (network @ theta)))(jnp.zeros(WIDTH))
    eigenvalues = jnp.linalg.eigvalsh(network @ network.T)
    norm = jnp.sqrt(jnp.sum(jnp.square(update)))
    return {
        "realised": jnp.sqrt(jnp.sum(jnp.square(network @ theta_step))),
        "kernel_low": eigenvalues[0] * norm,
        "kernel_high": eigenvalues[-1] * norm,
    }


def _measure(logits: jax.Array, action: jax.Array, step: jax.Array, network: jax.Array) -> dict[str, jax.Array]:
    p = jax.nn.softmax(logits)
    collision = jnp.sum(p * p)
    score = jax.jacrev(jax.nn.log_softmax)(logits)
    update = step * score[action]
    squares = jnp.sum(jnp.square(step * score), axis=1)
    low, high = logit_dynamics.update_norm_range(p[action], vocabulary=VOCABULARY, step=step)
    mean_low, mean_high = logit_dynamics.expected_update_norm_range(collision, step=step)

    def entropy(z):
        log_p = jax.nn.log_softmax(z)
        return -jnp.sum(jnp.exp(log_p) * log_p)

    changes = logit_dynamics.log_prob_changes(p, action, step=step)
    slope = jax.jvp(jax.nn.log_softmax, (logits,), (update,))[1]
    one_hot = jnp.where(jnp.arange(VOCABULARY) == action, 1.0, 0.0)
    return {
        **_realised(update, network),
        "square": jnp.sum(jnp.square(update)),
        "square_formula": logit_dynamics.squared_update_norm(p[action], collision, step=step),
        "square_wrong": jnp.square(step) * (1 - p[action] + collision),
        "norm": jnp.sqrt(jnp.sum(jnp.square(update))),
        "norm_formula": logit_dynamics.update_norm(p[action], collision, step=step),
        "low": low,
        "high": high,
        "mean_square": jnp.sum(p * squares),
        "mean_square_formula": logit_dynamics.expected_squared_update_norm(collision, step=step),
        "mean_norm": jnp.sum(p * jnp.sqrt(squares)),
        "mean_low_sharp": logit_dynamics.expected_update_norm_range_sharp(collision, vocabulary=VOCABULARY, step=step)[
            0
        ],
        "mean_low": mean_low,
        "mean_high": mean_high,
        "changes": changes,
        "slope": slope,
        "changes_wrong": step * (one_hot - p),
        "mean_change": jnp.sum(p * changes),
        "own_change": changes[action] * step,
        "entropy_slope": jax.jvp(entropy, (logits,), (update,))[1],
        "entropy_change": logit_dynamics.entropy_change(p, action, step=step),
        "noise_variance": mismatch.gaussian_log_prob_variance(p[action], collision, scale=step),
    }


WORLD = World(name="logit_dynamics", draw=_draw, measure=_measure)


def _check(name, statement, function, left, right, *, paper=PAPER, **options) -> Check:
    names = " ".join(f"bounds.{part}" for part in function.split())
    return compare(f"logit_dynamics.{name}", statement, names, left, right, world=WORLD, paper=paper, **options)


CHECKS = [
    _check(
        "squared_norm",
        "|dz|^2 = (eta A)^2 (1 - 2 p_c + C)",
        "logit_dynamics.squared_update_norm",
        lambda m: m["square"],
        lambda m: m["square_formula"],
        wrong=lambda m: m["square_wrong"],
        equality=True,
    ),
    _check(
        "norm",
        "|dz| = |eta A| sqrt(1 - 2 p_c + C)",
        "logit_dynamics.update_norm",
        lambda m: m["norm"],
        lambda m: m["norm_formula"],
        wrong=lambda m: m["square_formula"],
        equality=True,
        # Near p_c = 1 the formula is a difference of numbers near 1, and the root doubles the digits lost.
        tolerance=1e-7,
    ),
    _check(
        "norm_lower",
        "|eta A| (1 - p_c) sqrt(V / (V - 1)) <= |dz|, attained by an even residual",
        "logit_dynamics.update_norm_range",
        lambda m: m["low"],
        lambda m: m["norm"],
        wrong_left=lambda m: 1.05 * m["low"],
    ),
    _check(
        "norm_upper",
        "|dz| <= |eta A| (1 - p_c) sqrt(2), attained by a residual on one action",
        "logit_dynamics.update_norm_range",
        lambda m: m["norm"],
        lambda m: m["high"],
        wrong=lambda m: 0.95 * m["high"],
    ),
    _check(
        "expected_squared_norm",
        "E_{c~p}|dz|^2 = (eta A)^2 (1 - C)",
        "logit_dynamics.expected_squared_update_norm",
        lambda m: m["mean_square"],
        lambda m: m["mean_square_formula"],
        wrong_left=lambda m: m["square"],
        equality=True,
    ),
    _check(
        "expected_norm_lower",
        "|eta A| (1 - C) / sqrt(2) <= E|dz|",
        "logit_dynamics.expected_update_norm_range",
        lambda m: m["mean_low"],
        lambda m: m["mean_norm"],
        wrong_left=lambda m: 1.7 * m["mean_low"],
        paper=DERIVED,
    ),
    _check(
        "expected_norm_lower_sharp",
        "|eta A| (1 - C) sqrt(V / (V - 1)) <= E|dz|: the mean of the lower end for each action, attained by uniform p",
        "logit_dynamics.expected_update_norm_range_sharp",
        lambda m: m["mean_low_sharp"],
        lambda m: m["mean_norm"],
        wrong_left=lambda m: 1.1 * m["mean_low_sharp"],
        paper=DERIVED,
    ),
    _check(
        "expected_norm_upper",
        "E|dz| <= |eta A| sqrt(1 - C)",
        "logit_dynamics.expected_update_norm_range",
        lambda m: m["mean_norm"],
        lambda m: m["mean_high"],
        wrong=lambda m: 0.9 * m["mean_high"],
        paper=DERIVED,
    ),
    _check(
        "log_prob_changes",
        "d log p_k = eta A (1[k = c] - p_k - p_c + C) for every k, by forward differentiation",
        "logit_dynamics.log_prob_changes",
        lambda m: m["changes"],
        lambda m: m["slope"],
        wrong_left=lambda m: m["changes_wrong"],
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "log_prob_changes_centred",
        "the changes have mean 0 under p, and the sampled one gains |dz|^2 / (eta A)",
        "logit_dynamics.log_prob_changes",
        lambda m: np.stack([m["mean_change"], m["own_change"]], 1),
        lambda m: np.stack([np.zeros_like(m["square"]), m["square"]], 1),
        wrong=lambda m: np.stack([np.zeros_like(m["square"]), m["norm"]], 1),
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "entropy_change",
        "dH = -eta A [p_c (log p_c + H) - sum_k p_k^2 (log p_k + H)], by forward differentiation",
        "logit_dynamics.entropy_change",
        lambda m: m["entropy_change"],
        lambda m: m["entropy_slope"],
        wrong_left=lambda m: -m["entropy_change"],
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "realised_upper",
        "erratum F5.1: a network z = M theta moves by at most the largest eigenvalue of M M^T times the formula",
        "logit_dynamics.update_norm",
        lambda m: m["realised"],
        lambda m: m["kernel_high"],
        wrong=lambda m: m["norm"],
        paper=DERIVED,
    ),
    _check(
        "realised_lower",
        "and by at least the smallest eigenvalue times the formula, which itself is no lower end",
        "logit_dynamics.update_norm",
        lambda m: m["kernel_low"],
        lambda m: m["realised"],
        wrong_left=lambda m: m["norm"],
        paper=DERIVED,
    ),
    _check(
        "same_factor_as_noise",
        "the variance of log-prob noise and the squared update have one factor, 1 - 2 p + C",
        "logit_dynamics.squared_update_norm mismatch.gaussian_log_prob_variance",
        lambda m: m["noise_variance"],
        lambda m: m["square"],
        wrong=lambda m: m["mean_square"],
        paper=DERIVED,
        equality=True,
    ),
]
