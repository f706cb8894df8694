"""Importance ratios and what truncating or masking them costs: every sequence of a token tree, weighted by mu."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import corrections
from jaxrl_llm.objectives import ratios
from theory_checks import token_trees as trees
from theory_checks.check import World
from theory_checks.check import compare

DERIVED = "derived (docs/theory.md)"
VOCABULARY, HORIZON = 3, 3
CAP, LOW, HIGH = 1.5, 0.6, 1.4
"""A cap and an interval whose ends are not inverse to each other."""


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Policies from near to far, and rewards."""
    options = {"noise": np.geomspace(0.02, 2.0, count), "share": np.ones(count), "kind": np.arange(count) % 3}
    return [trees.draw(generator, worlds=count, vocabulary=VOCABULARY, horizon=HORIZON, **options)]


def _moments(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    law_pi, law = jnp.exp(trees.sequence_log_probs(pi)), jnp.exp(trees.sequence_log_probs(mu))
    log_ratio = trees.token_log_ratios(pi, mu)
    every = jnp.ones(log_ratio.shape, bool)
    token = ratios.token_ratio(log_ratio, every)
    sequence = ratios.sequence_ratio(log_ratio, every)
    geometric = ratios.geometric_ratio(log_ratio, every)
    truncated = corrections.sequence_truncated(log_ratio, every, cap=CAP)[:, 0]
    masked = corrections.sequence_masked(log_ratio, every, low=LOW, high=HIGH)[:, 0]
    inside = (sequence >= LOW) & (sequence <= HIGH)
    gain = jnp.sum(law_pi * rewards)
    return {
        "token_mean": law @ token,
        "token_mean_pi": law_pi @ token,
        "sequence_mean": law @ sequence,
        "geometric_mean": law @ geometric,
        "geometric_mean_pi": law_pi @ geometric,
        "reweighted": jnp.sum(law * sequence * rewards),
        "first_order": jnp.sum(law * (1 + jnp.sum(token - 1, axis=1)) * rewards),
        "gain": gain,
        "truncation_bias": gain - jnp.sum(law * truncated * rewards),
        "lost_mass": 1 - jnp.sum(law * truncated),
        "lost_mass_formula": jnp.sum(jnp.maximum(law_pi - CAP * law, 0)),
        "above_cap": jnp.sum(jnp.where(sequence > CAP, law_pi, 0.0)),
        "above_cap_mu": jnp.sum(jnp.where(sequence > CAP, law, 0.0)),
        "second_moment": jnp.sum(law * jnp.square(truncated)),
        "second_moment_free": jnp.sum(law * jnp.square(sequence)),
        "masked_gain": jnp.sum(law * masked * rewards),
        "inside_gain": jnp.sum(jnp.where(inside, law_pi * rewards, 0.0)),
        "log_geometric": jnp.abs(jnp.log(geometric)),
        "log_sequence": jnp.abs(jnp.log(sequence)),
        "log_largest": jnp.max(jnp.abs(log_ratio), axis=1),
        **_per_token(law, law_pi, log_ratio),
    }


def _per_token(law: jax.Array, law_pi: jax.Array, log_ratio: jax.Array) -> dict[str, jax.Array]:
    """Token-level weights on the first token, where the laws of contexts agree."""
    every = jnp.ones(log_ratio.shape, bool)
    ratio = jnp.exp(log_ratio[:, 0])
    kept = corrections.token_masked(log_ratio, every, low=LOW, high=HIGH)[:, 0]
    log_mean = jnp.mean(log_ratio, axis=1)
    inverse = (1 / ratio >= LOW) & (1 / ratio <= HIGH)
    return {
        "token_kept": jnp.sum(law * kept),
        "token_inside": jnp.sum(jnp.where((ratio >= LOW) & (ratio <= HIGH), law_pi, 0.0)),
        "token_inside_inverse": jnp.sum(jnp.where(inverse, law_pi, 0.0)),
        "token_truncated": jnp.sum(law * corrections.token_truncated(log_ratio, every, cap=CAP)[:, 0]),
        "token_lost": jnp.sum(law * jnp.maximum(ratio - CAP, 0.0)),
        "accepted": corrections.geometric_masked(log_ratio, every, low=0.9, high=1.1)[:, 0],
        "accepted_directly": ((log_mean >= jnp.log(0.9)) & (log_mean <= jnp.log(1.1))).astype(float),
        "accepted_all": jnp.where(jnp.all(jnp.abs(log_ratio) <= jnp.log(1.1), axis=1), 1.0, 0.0),
    }


def _slopes(pi: Any, mu: Any) -> dict[str, jax.Array]:
    """GSPO's ratio of a sequence, and the form that carries its gradient token by token."""

    def flat(f):
        slope = jax.grad(lambda p: jnp.sum(weights * f(trees.token_log_ratios(p, mu))))(pi)
        return jnp.concatenate([x.ravel() for x in slope])

    every = jnp.ones((VOCABULARY**HORIZON, HORIZON), bool)
    weights = jnp.sin(jnp.arange(VOCABULARY**HORIZON, dtype=float))
    return {
        "sequence_slope": flat(lambda x: ratios.geometric_ratio(x, every)),
        "token_form_slope": flat(lambda x: jnp.mean(ratios.geometric_token_ratio(x, every), axis=1)),
        "token_ratio_slope": flat(lambda x: jnp.mean(ratios.token_ratio(x, every), axis=1)),
    }


def _measure(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    return {**_moments(pi, mu, rewards), **_slopes(pi, mu)}


WORLD = World(name="corrections", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, *, paper=DERIVED, **options):
    names = " ".join(f"objectives.{function}" for function in functions.split())
    return compare(f"corrections.{name}", statement, names, left, right, world=WORLD, paper=paper, **options)


CHECKS = [
    _check(
        "token_ratio_mean",
        "E_mu rho_t = 1 at every position",
        "ratios.token_ratio",
        lambda m: m["token_mean"],
        lambda m: np.ones_like(m["token_mean"]),
        wrong_left=lambda m: m["token_mean_pi"],
        equality=True,
    ),
    _check(
        "sequence_ratio_mean",
        "E_mu prod_t rho_t = 1; the geometric mean of GSPO does not have mean 1",
        "ratios.sequence_ratio ratios.sequence_log_ratio",
        lambda m: m["sequence_mean"],
        lambda m: np.ones_like(m["sequence_mean"]),
        wrong_left=lambda m: m["geometric_mean"],
        equality=True,
    ),
    _check(
        "sequence_ratio_reweights",
        "E_mu[prod_t rho_t R] = J(pi); the first order 1 + sum_t (rho_t - 1) is not",
        "ratios.sequence_ratio",
        lambda m: m["reweighted"],
        lambda m: m["gain"],
        wrong_left=lambda m: m["first_order"],
        equality=True,
    ),
    _check(
        "geometric_ratio_mean",
        "E_mu (prod_t rho_t)^(1/T) <= 1 (Jensen): GSPO's weights sum to less than the sample",
        "ratios.geometric_ratio",
        lambda m: m["geometric_mean"],
        lambda m: np.ones_like(m["geometric_mean"]),
        wrong_left=lambda m: m["geometric_mean_pi"],
    ),
    _check(
        "geometric_ratio_between",
        "|log of the geometric ratio| <= max_t |log rho_t|, so opposite tokens cancel; the product may exceed it",
        "ratios.geometric_ratio",
        lambda m: m["log_geometric"],
        lambda m: m["log_largest"],
        wrong_left=lambda m: m["log_sequence"],
    ),
    _check(
        "geometric_token_form",
        "mean_t stop(s) rho_t / stop(rho_t) has the gradient of s, the geometric ratio",
        "ratios.geometric_token_ratio",
        lambda m: m["token_form_slope"],
        lambda m: m["sequence_slope"],
        wrong_left=lambda m: m["token_ratio_slope"],
        paper="arXiv 2507.18071",
        equality=True,
    ),
    _check(
        "geometric_masked",
        "accept iff low <= exp(mean_t log w_t) <= high; asking it of every token is another test",
        "corrections.geometric_masked",
        lambda m: m["accepted"],
        lambda m: m["accepted_directly"],
        wrong_left=lambda m: m["accepted_all"],
        equality=True,
    ),
    _check(
        "truncation_bias",
        "J(pi) - E_mu[min(w, cap) R] <= P_pi(w > cap): what is lost lies above the cap under pi, not under mu",
        "corrections.sequence_truncated",
        lambda m: m["truncation_bias"],
        lambda m: m["above_cap"],
        wrong=lambda m: m["above_cap_mu"],
    ),
    _check(
        "truncation_mass",
        "1 - E_mu min(w, cap) = sum_y (P^pi - cap P^mu)^+",
        "corrections.sequence_truncated",
        lambda m: m["lost_mass"],
        lambda m: m["lost_mass_formula"],
        wrong=lambda m: m["above_cap"],
        equality=True,
    ),
    _check(
        "truncation_second_moment",
        "E_mu min(w, cap)^2 <= cap, whatever the policies; without the cap there is no bound",
        "corrections.sequence_truncated",
        lambda m: m["second_moment"],
        lambda m: np.full_like(m["second_moment"], CAP),
        wrong_left=lambda m: m["second_moment_free"],
    ),
    _check(
        "token_truncated",
        "E_mu min(w_1, cap) = 1 - E_mu (w_1 - cap)^+",
        "corrections.token_truncated",
        lambda m: m["token_truncated"],
        lambda m: 1 - m["token_lost"],
        wrong=lambda m: np.ones_like(m["token_lost"]),
        equality=True,
    ),
    _check(
        "token_masked",
        "IcePop: E_mu[w 1(low <= w <= high)] = P_pi(low <= w <= high); erratum F2.14 has the inverse ratio",
        "corrections.token_masked",
        lambda m: m["token_kept"],
        lambda m: m["token_inside"],
        wrong=lambda m: m["token_inside_inverse"],
        equality=True,
    ),
    _check(
        "sequence_masked",
        "E_mu[w 1(low <= w <= high) R] = E_pi[R 1(low <= w <= high)]",
        "corrections.sequence_masked",
        lambda m: m["masked_gain"],
        lambda m: m["inside_gain"],
        wrong=lambda m: m["gain"],
        equality=True,
    ),
]
