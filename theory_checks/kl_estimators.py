"""k1, k2, k3: what each estimates and which gradient each has as a loss, every token of a context once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.objectives import divergences
from theory_checks.check import World
from theory_checks.check import compare

SCHULMAN = "Schulman 2020"
DERIVED = "derived (docs/theory.md)"
VOCABULARY = 5


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """The logits of pi, of a reference from near to far, and of a third policy that samples."""
    shape = (count, VOCABULARY)
    pi = generator.normal(size=shape)
    reference = pi + np.geomspace(0.05, 2.0, count)[:, None] * generator.normal(size=shape)
    return [tuple(jnp.asarray(x) for x in (pi, reference, generator.normal(size=shape)))]


def _measure(pi: jax.Array, reference: jax.Array, sampler: jax.Array) -> dict[str, jax.Array]:
    p, mu = jax.nn.softmax(pi), jax.nn.softmax(sampler)
    log_q = jax.nn.log_softmax(reference)

    def expected(estimator):
        """Value and expected gradient with the tokens of pi fixed."""

        def loss(z):
            return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(z)) * estimator(jax.nn.log_softmax(z) - log_q))

        return jax.value_and_grad(loss)(pi)

    def off_policy(z):
        log_p = jax.nn.log_softmax(z)
        return jnp.sum(mu * divergences.importance_weighted_k1(jnp.exp(log_p - jnp.log(mu)), log_p - log_q))

    def off_policy_constant(z):
        log_p = jax.nn.log_softmax(z)
        return jnp.sum(mu * jax.lax.stop_gradient(jnp.exp(log_p - jnp.log(mu))) * (log_p - log_q))

    log_ratio = jax.nn.log_softmax(pi) - log_q
    values = {name: expected(estimator) for name, estimator in divergences.ESTIMATORS.items()}
    weighted = jax.value_and_grad(off_policy)(pi)
    straight = jnp.stack([values[name][1] for name in ("k1_straight_through", "k3_straight_through")])
    forward = jax.grad(categorical.kl)(pi, reference)
    return {
        "kl": categorical.kl(pi, reference),
        "values": jnp.stack([values[name][0] for name in ("k1", "k3", "k1_straight_through", "k3_straight_through")]),
        "value_k2": values["k2"][0],
        "beta_values": jnp.stack([jnp.sum(p * (log_ratio + b * jnp.expm1(-log_ratio))) for b in (-1.0, 0.5, 2.0)]),
        "beta_wrong": jnp.stack([jnp.sum(p * (log_ratio - b * jnp.expm1(log_ratio))) for b in (-1.0, 0.5, 2.0)]),
        "least_k3": jnp.min(divergences.k3(log_ratio)),
        "least_beta": jnp.min(log_ratio + 0.5 * jnp.expm1(-log_ratio)),
        "remainder": jnp.sum(p * jnp.abs(log_ratio) ** 3 * jnp.maximum(1.0, jnp.exp(-log_ratio))) / 6,
        "slope_k1": values["k1"][1],
        "slope_k2": values["k2"][1],
        "slope_k3": values["k3"][1],
        "slope_straight": straight,
        "forward": forward,
        "forward_twice": jnp.stack([forward, forward]),
        "backward": jax.grad(lambda z: categorical.kl(reference, z))(pi),
        "weighted": jnp.append(weighted[1], weighted[0]),
        "weighted_constant": jnp.append(jax.grad(off_policy_constant)(pi), weighted[0]),
        "weighted_exact": jnp.append(forward, categorical.kl(pi, reference)),
    }


WORLD = World(name="kl_estimators", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, *, paper=DERIVED, **options):
    names = " ".join(f"objectives.divergences.{function}" for function in functions.split())
    return compare(f"kl_estimators.{name}", statement, names, left, right, world=WORLD, paper=paper, **options)


CHECKS = [
    _check(
        "unbiased",
        "E_p k1 = E_p k3 = KL(p || q), and so with a straight-through gradient; k2 is biased",
        "k1 k3 k1_straight_through k3_straight_through",
        lambda m: m["values"],
        lambda m: np.repeat(m["kl"][:, None], 4, axis=1),
        wrong_left=lambda m: np.repeat(m["value_k2"][:, None], 4, axis=1),
        paper=SCHULMAN,
        equality=True,
    ),
    _check(
        "k3_is_one_of_many",
        "erratum F2.8: log(p/q) + b (q/p - 1) is unbiased for every b; with p/q in its place it is not",
        "k3",
        lambda m: m["beta_values"],
        lambda m: np.repeat(m["kl"][:, None], 3, axis=1),
        wrong_left=lambda m: m["beta_wrong"],
        equality=True,
    ),
    _check(
        "k3_not_negative",
        "k3 >= 0 on every token; b = 1/2 is not",
        "k3",
        lambda m: -m["least_k3"],
        lambda m: np.zeros_like(m["least_k3"]),
        wrong_left=lambda m: -m["least_beta"],
        paper=SCHULMAN,
    ),
    _check(
        "k2_bias",
        "|E_p k2 - KL| <= E_p[ |x|^3 max(1, exp(-x)) ] / 6, x = log p/q: third order",
        "k2",
        lambda m: np.abs(m["value_k2"] - m["kl"]),
        lambda m: m["remainder"],
        wrong=lambda m: m["remainder"] / 3,
    ),
    _check(
        "k1_gradient",
        "erratum P1: as a loss, on-policy, k1 has expected gradient 0",
        "k1",
        lambda m: m["slope_k1"],
        lambda m: np.zeros_like(m["slope_k1"]),
        wrong=lambda m: m["forward"],
        equality=True,
    ),
    _check(
        "k2_gradient",
        "as a loss, on-policy, k2 has expected gradient grad KL(pi || ref)",
        "k2",
        lambda m: m["slope_k2"],
        lambda m: m["forward"],
        wrong=lambda m: m["backward"],
        equality=True,
    ),
    _check(
        "k3_gradient",
        "as a loss, on-policy, k3 has expected gradient grad KL(ref || pi), that of the other KL",
        "k3",
        lambda m: m["slope_k3"],
        lambda m: m["backward"],
        wrong=lambda m: m["forward"],
        equality=True,
    ),
    _check(
        "straight_through_gradient",
        "the straight-through forms of k1 and k3 have expected gradient grad KL(pi || ref)",
        "k1_straight_through k3_straight_through",
        lambda m: m["slope_straight"],
        lambda m: m["forward_twice"],
        wrong=lambda m: np.stack([m["slope_k1"], m["slope_k3"]], 1),
        equality=True,
    ),
    _check(
        "importance_weighted",
        "tokens of mu: rho k1 with the gradient of rho has value and gradient of KL(pi || ref); without it, gradient 0",
        "importance_weighted_k1",
        lambda m: m["weighted"],
        lambda m: m["weighted_exact"],
        wrong_left=lambda m: m["weighted_constant"],
        equality=True,
    ),
]
