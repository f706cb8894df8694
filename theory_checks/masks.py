"""Trust region masks by enumeration: what they accept, what sampled tests miss, and which gradient is left."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import masks
from jaxrl_llm.objectives import policy_loss
from theory_checks import token_trees as trees
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2512.23075"
DERIVED = "derived (docs/theory.md)"
VOCABULARY, HORIZON, THRESHOLD, BASELINE = 3, 3, 0.05, 0.4


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Trees in which some contexts have moved, near and far, and rewards."""
    options = {
        "noise": np.geomspace(0.1, 2.0, count),
        "share": generator.uniform(0.2, 1.0, count),
        "kind": np.arange(count) % 3,
    }
    return [trees.draw(generator, worlds=count, vocabulary=VOCABULARY, horizon=HORIZON, **options)]


def _hit_probability(mu: Any, kl: Any) -> jax.Array:
    """P_mu(some visited context has KL above the threshold), by backward recursion and not over sequences."""
    later = jnp.zeros(VOCABULARY**HORIZON)
    for logits, divergence in zip(reversed(mu), reversed(kl), strict=True):
        later = jnp.sum(jax.nn.softmax(logits) * later.reshape(logits.shape), axis=1)
        later = jnp.where(divergence > THRESHOLD, 1.0, later)
    return later[0]


def _acceptance(pi: Any, mu: Any) -> dict[str, jax.Array]:
    reached, kl, tv = trees.divergences(pi, mu)
    law = jnp.exp(trees.sequence_log_probs(mu))
    log_ratio, kl_t = trees.token_log_ratios(pi, mu), trees.per_sequence(kl)
    every = jnp.ones(log_ratio.shape, bool)
    ratio = jnp.exp(log_ratio)
    by_maximum = masks.accept_by_maximum(kl_t, every, threshold=THRESHOLD)
    by_average = masks.accept_by_average(kl_t, every, threshold=THRESHOLD)
    both = masks.accept_by_both(kl_t, every, maximum=2 * THRESHOLD, average=THRESHOLD)
    inside = jnp.abs(log_ratio) <= jnp.sqrt(2 * THRESHOLD)
    near = jnp.abs(ratio - 1) <= jnp.sqrt(2 * THRESHOLD)
    deviation = jnp.mean(jnp.abs(ratio - 1), axis=1)
    level, flat, falling = 0.2, jnp.full(HORIZON, 0.3), jnp.arange(HORIZON, 0, -1.0) ** 2
    weighted = masks.accept_by_weighted_ratio_deviation(ratio, every, flat, threshold=level)
    falls = masks.accept_by_weighted_ratio_deviation(ratio, every, falling, threshold=level)
    rejects = ~masks.accept_by_ratio_deviation(ratio, every, threshold=level)
    mean_tv = sum((jnp.sum(d * v) for d, v in zip(reached, tv, strict=True)), jnp.zeros(())) / HORIZON
    estimate = jnp.mean(jnp.expm1(log_ratio) - log_ratio, axis=1)
    backwards = jnp.mean(jnp.expm1(-log_ratio) + log_ratio, axis=1)
    middle = jnp.sort(estimate)[estimate.size // 2]
    return {
        "accepted": jnp.sum(jnp.where(by_maximum, law, 0.0)),
        "accepted_average": jnp.sum(jnp.where(by_average, law, 0.0)),
        "not_hit": 1 - _hit_probability(mu, kl),
        "both": both.astype(float),
        "both_directly": ((jnp.max(kl_t, 1) <= 2 * THRESHOLD) & (jnp.mean(kl_t, 1) <= THRESHOLD)).astype(float),
        "by_average": by_average.astype(float),
        "sampled": masks.accept_by_sampled_maximum(log_ratio, every, threshold=THRESHOLD).astype(float),
        "ratio_inside": jnp.all(inside, axis=1).astype(float),
        "ratio_near": jnp.all(near, axis=1).astype(float),
        "sampled_average": masks.accept_by_sampled_average(log_ratio, every, threshold=middle).astype(float),
        "below_middle": (estimate <= middle).astype(float),
        "backwards_below_middle": (backwards <= middle).astype(float),
        "mean_k3": jnp.sum(law * estimate),
        "mean_backwards": jnp.sum(law * backwards),
        "mean_kl": jnp.sum(law * jnp.mean(kl_t, axis=1)),
        "deviation_rejects": rejects.astype(float),
        "weighted_rejects": (~weighted).astype(float),
        "falling_rejects": (~falls).astype(float),
        "rejected_mass": jnp.sum(jnp.where(rejects, law, 0.0)),
        "markov": 2 * mean_tv / level,
        "deviation": jnp.sum(law * deviation),
        "two_mean_tv": 2 * mean_tv,
    }


def _flip(mu: Any) -> dict[str, jax.Array]:
    """At the root, pi exchanges the probabilities of two tokens; one row per sampled token."""
    logits = mu[0][0]
    log_p = jax.nn.log_softmax(logits)
    log_ratio = (log_p[jnp.array([0, 2, 1])] - log_p)[:, None]
    kl = categorical.kl(logits, logits[jnp.array([0, 2, 1])])
    threshold = jnp.minimum(kl, jnp.square(log_ratio[1, 0]) / 2) / 2
    every = jnp.ones((VOCABULARY, 1), bool)
    maximum = masks.accept_by_sampled_maximum(log_ratio, every, threshold=threshold)
    both = masks.accept_by_sampled_both(log_ratio, every, maximum=threshold, average=threshold)
    exact = masks.accept_by_maximum(jnp.broadcast_to(kl, (VOCABULARY, 1)), every, threshold=threshold)
    p = jnp.exp(log_p)
    return {
        "flip_sampled": jnp.sum(jnp.where(maximum, p, 0.0)),
        "flip_unseen": p[0],
        "flip_exact": jnp.sum(jnp.where(exact, p, 0.0)),
        "flip_both": jnp.sum(jnp.where(both, p, 0.0)),
    }


def _gradients(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    """The expected gradient of the TRM recipe, and the gradient of the masked surrogate with the mask frozen."""
    law, log_mu = jnp.exp(trees.sequence_log_probs(mu)), trees.token_log_ratios(mu, [jnp.zeros_like(z) for z in mu])
    kl = trees.per_sequence(trees.divergences(pi, mu)[1])
    accepted = jnp.max(kl, axis=1) <= THRESHOLD
    recipe = dataclasses.replace(RECIPES["trm_max"], mask_maximum=THRESHOLD)

    def flat(f):
        return jnp.concatenate([x.ravel() for x in jax.grad(f)(pi)])

    def loss(p, recipe, baseline):
        terms = policy_loss(
            recipe,
            log_prob=trees.token_log_ratios(p, [jnp.zeros_like(z) for z in p]),
            log_prob_behaviour=log_mu,
            advantages=law * (rewards - baseline) * law.size,
            response_mask=jnp.ones(log_mu.shape, bool),
            # From the trained policy itself: its gradient must not leak through the mask.
            kl_t=trees.per_sequence(trees.divergences(p, mu)[1]),
        )
        return terms.loss[0] / jnp.maximum(terms.loss[1], 1)

    def masked_surrogate(p, weights):
        return -jnp.sum(law * weights * jnp.sum(jnp.exp(trees.token_log_ratios(p, mu)), axis=1))

    only_accepted = dataclasses.replace(recipe, normalise_by="accepted")
    slope = flat(lambda p: loss(p, recipe, 0.0))
    return {
        "masked_slope": slope,
        "masked_exact": flat(lambda p: masked_surrogate(p, jnp.where(accepted, rewards, 0.0))),
        "masked_accepted": flat(lambda p: loss(p, only_accepted, 0.0)),
        "baseline_slope": slope - flat(lambda p: loss(p, recipe, BASELINE)),
        "baseline_exact": BASELINE * flat(lambda p: masked_surrogate(p, jnp.where(accepted, 1.0, 0.0))),
    }


def _measure(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    return {**_acceptance(pi, mu), **_flip(mu), **_gradients(pi, mu, rewards)}


WORLD = World(name="masks", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, *, paper=PAPER, **options):
    names = " ".join(f"objectives.{function}" for function in functions.split())
    return compare(f"masks.{name}", statement, names, left, right, world=WORLD, paper=paper, **options)


CHECKS = [
    _check(
        "accepted_never_left",
        "P_mu(accepted by the maximum) = 1 - P_mu(some context above the threshold), by backward recursion",
        "masks.accept_by_maximum",
        lambda m: m["accepted"],
        lambda m: m["not_hit"],
        wrong_left=lambda m: m["accepted_average"],
        equality=True,
    ),
    _check(
        "average_is_weaker",
        "at one threshold the maximum test accepts no more than the average test",
        "masks.accept_by_maximum masks.accept_by_average",
        lambda m: m["accepted"],
        lambda m: m["accepted_average"],
        wrong_left=lambda m: m["accepted_average"],
        wrong=lambda m: m["accepted"],
    ),
    _check(
        "both_tests",
        "both tests: max_t KL and mean_t KL at thresholds of their own; the average alone accepts more",
        "masks.accept_by_both",
        lambda m: m["both"],
        lambda m: m["both_directly"],
        wrong_left=lambda m: m["by_average"],
        equality=True,
    ),
    _check(
        "sampled_interval",
        "max_t k2 <= delta iff every ratio lies in exp(-+ sqrt(2 delta)), which is not |rho - 1| <= sqrt(2 delta)",
        "masks.accept_by_sampled_maximum",
        lambda m: m["sampled"],
        lambda m: m["ratio_inside"],
        wrong=lambda m: m["ratio_near"],
        equality=True,
    ),
    _check(
        "sampled_average",
        "mean_t (rho - 1 - log rho) <= delta, rho = pi/mu, and not its inverse",
        "masks.accept_by_sampled_average",
        lambda m: m["sampled_average"],
        lambda m: m["below_middle"],
        wrong=lambda m: m["backwards_below_middle"],
        equality=True,
    ),
    _check(
        "sampled_average_unbiased",
        "E_mu of that statistic = E_mu mean_t KL(mu || pi); with the inverse ratio it is another number",
        "masks.accept_by_sampled_average divergences.k3",
        lambda m: m["mean_k3"],
        lambda m: m["mean_kl"],
        wrong_left=lambda m: m["mean_backwards"],
        equality=True,
    ),
    _check(
        "sampled_misses_flips",
        "erratum F2.15: two tokens exchanged, sampled tests accept whenever a third one was drawn; the exact one never",
        "masks.accept_by_sampled_maximum masks.accept_by_sampled_both",
        lambda m: np.stack([m["flip_sampled"], m["flip_both"]], 1),
        lambda m: np.stack([m["flip_unseen"], m["flip_unseen"]], 1),
        wrong_left=lambda m: np.stack([m["flip_exact"], m["flip_exact"]], 1),
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "masked_gradient",
        "the expected gradient is that of E_mu[M R sum_t rho_t], M frozen, over all sequences; not over the accepted",
        "masks.accept_by_maximum policy_loss",
        lambda m: m["masked_slope"],
        lambda m: m["masked_exact"],
        wrong_left=lambda m: m["masked_accepted"],
        equality=True,
    ),
    _check(
        "baseline_remains",
        "erratum F2.16: a baseline b changes the masked gradient by b grad E_mu[M sum_t rho_t], which is not 0",
        "masks.accept_by_maximum policy_loss",
        lambda m: m["baseline_slope"],
        lambda m: m["baseline_exact"],
        wrong=lambda m: np.zeros_like(m["baseline_exact"]),
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "deviation_mean",
        "E_mu mean_t |rho_t - 1| = (2/T) sum_t Dbar_t",
        "masks.accept_by_ratio_deviation",
        lambda m: m["deviation"],
        lambda m: m["two_mean_tv"],
        wrong=lambda m: m["two_mean_tv"] / 2,
        equality=True,
    ),
    _check(
        "deviation_rejects",
        "SER rejects a mass of at most (2/T) sum_t Dbar_t / threshold (Markov)",
        "masks.accept_by_ratio_deviation",
        lambda m: m["rejected_mass"],
        lambda m: m["markov"],
        wrong=lambda m: m["markov"] / 2,
        paper=DERIVED,
    ),
    _check(
        "equal_weights",
        "LN-TRM with equal weights is SER; with falling weights it is another test",
        "masks.accept_by_weighted_ratio_deviation masks.accept_by_ratio_deviation",
        lambda m: m["weighted_rejects"],
        lambda m: m["deviation_rejects"],
        wrong_left=lambda m: m["falling_rejects"],
        equality=True,
    ),
]
