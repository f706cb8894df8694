"""Which gradient each surrogate has: token by token at random ratios, and in expectation on a token tree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import surrogates
from theory_checks import token_trees as trees
from theory_checks.check import World
from theory_checks.check import compare

PPO = "arXiv 1707.06347"
VOCABULARY, HORIZON, TOKENS = 3, 2, 12
LOW, HIGH, DUAL, THRESHOLD = 0.2, 0.3, 3.0, 0.1


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Rows of tokens with ratios from 1/20 to 20, advantages of both signs, divergences, and a tree."""
    log_ratio = generator.uniform(-3, 3, size=(count, TOKENS)) * generator.random((count, 1))
    rows = (log_ratio, generator.normal(size=(count, TOKENS)), generator.uniform(0, 0.2, size=(count, TOKENS)))
    options = {"noise": np.geomspace(0.02, 2.0, count), "share": np.ones(count), "kind": np.arange(count) % 3}
    tree = trees.draw(generator, worlds=count, vocabulary=VOCABULARY, horizon=HORIZON, **options)
    return [(*(jnp.asarray(x) for x in rows), *tree)]


def _per_token(log_ratio: jax.Array, advantages: jax.Array, divergence: jax.Array) -> dict[str, jax.Array]:
    """Losses and their derivatives with respect to log pi, next to what they must be."""
    ratio = jnp.exp(log_ratio)
    side = {"clip_low": LOW, "clip_high": HIGH}

    def slope(loss):
        return jax.grad(lambda x: jnp.sum(loss(x)))(log_ratio)

    def on_policy(loss):
        return jax.grad(lambda x: jnp.sum(loss(x)))(jnp.zeros_like(log_ratio))

    losses = {
        "score": lambda x: surrogates.score_function(x, advantages),
        "weighted": lambda x: surrogates.importance_weighted(jnp.exp(x), advantages),
        "clipped": lambda x: surrogates.clipped(jnp.exp(x), advantages, **side),
        "dual": lambda x: surrogates.dual_clipped(jnp.exp(x), advantages, **side, dual_clip=DUAL),
        "cispo": lambda x: surrogates.clipped_weight(x, jnp.exp(x), advantages, **side),
        "dppo": lambda x: surrogates.divergence_masked(jnp.exp(x), advantages, divergence, threshold=THRESHOLD),
    }
    binds = surrogates.clip_binds(ratio, advantages, **side)
    outwards = advantages * log_ratio > 0
    flat = -advantages * ratio
    return {
        "free_slope": flat,
        "clipped_slope": slope(losses["clipped"]),
        "clipped_formula": jnp.where(binds, 0.0, flat),
        "gain": -losses["clipped"](log_ratio),
        "free_gain": ratio * advantages,
        "greedy_gain": jnp.maximum(ratio * advantages, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantages),
        "ceiling": jnp.where(advantages > 0, 1 + HIGH, LOW - 1) * jnp.abs(advantages),
        "dual_loss": jnp.where(advantages < 0, losses["dual"](log_ratio), 0.0),
        "single_loss": jnp.where(advantages < 0, losses["clipped"](log_ratio), 0.0),
        "dual_ceiling": DUAL * jnp.abs(advantages),
        "cispo_slope": slope(losses["cispo"]),
        "cispo_formula": -jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantages,
        "dppo_slope": slope(losses["dppo"]),
        "dppo_formula": jnp.where(outwards & (divergence > THRESHOLD), 0.0, flat),
        "dppo_both_ways": jnp.where(divergence > THRESHOLD, 0.0, flat),
        "on_policy": jnp.stack([on_policy(loss) for loss in losses.values()]),
        "off_policy": jnp.stack([slope(loss) for loss in losses.values()]),
        "minus_advantages": jnp.broadcast_to(-advantages, (len(losses), TOKENS)),
    }


def _length_one(log_ratio: jax.Array, advantages: jax.Array) -> dict[str, jax.Array]:
    """GSPO and clipped GRPO of the same sides, on responses of one token and of two."""
    gspo = dataclasses.replace(RECIPES["gspo"], clip_low=LOW, clip_high=HIGH)
    grpo = dataclasses.replace(gspo, ratio="token")

    def slope(recipe, length):
        rows = log_ratio.reshape(-1, length)

        def loss(log_prob):
            given = advantages[: rows.shape[0]]
            mask = jnp.ones(rows.shape, bool)
            terms = policy_loss(recipe, log_prob=log_prob, log_prob_old=0 * rows, advantages=given, response_mask=mask)
            return terms.loss[0] / terms.loss[1]

        return jax.grad(loss)(rows).ravel()

    return {"gspo": slope(gspo, 1), "grpo": slope(grpo, 1), "gspo_two": slope(gspo, 2), "grpo_two": slope(grpo, 2)}


def _expected(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    """Expected gradients by enumeration, next to those of J and of the surrogate."""

    def flat(f):
        return jnp.concatenate([x.ravel() for x in jax.grad(f)(pi)])

    uniform = [jnp.zeros_like(z) for z in pi]
    law, law_mu = jax.lax.stop_gradient((jnp.exp(trees.sequence_log_probs(pi)), jnp.exp(trees.sequence_log_probs(mu))))
    spread = jnp.broadcast_to(rewards[:, None], (rewards.size, HORIZON))

    def score(p):
        return jnp.sum(law[:, None] * surrogates.score_function(trees.token_log_ratios(p, uniform), spread))

    def weighted(p):
        return jnp.sum(law_mu[:, None] * surrogates.importance_weighted(jnp.exp(trees.token_log_ratios(p, mu)), spread))

    return {
        "score_expected": flat(score),
        "minus_policy_gradient": -flat(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(p)) * rewards)),
        "weighted_expected": flat(weighted),
        "minus_surrogate_gradient": -flat(lambda p: trees.error_of_surrogate(p, mu, rewards)[1]),
    }


def _measure(log_ratio, advantages, divergence, pi, mu, rewards) -> dict[str, jax.Array]:
    return {
        **_per_token(log_ratio, advantages, divergence),
        **_length_one(log_ratio, advantages),
        **_expected(pi, mu, rewards),
    }


WORLD = World(name="surrogates", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, *, paper=PPO, **options):
    names = " ".join(f"objectives.surrogates.{function}" for function in functions.split())
    return compare(f"surrogates.{name}", statement, names, left, right, world=WORLD, paper=paper, **options)


CHECKS = [
    _check(
        "score_function",
        "on-policy, the expected gradient of -R sum_t log pi_t is -grad J",
        "score_function",
        lambda m: m["score_expected"],
        lambda m: m["minus_policy_gradient"],
        wrong=lambda m: -m["minus_policy_gradient"],
        paper="Williams 1992",
        equality=True,
    ),
    _check(
        "importance_weighted",
        "the expected gradient of -R sum_t rho_t is -grad L', and not -grad J",
        "importance_weighted",
        lambda m: m["weighted_expected"],
        lambda m: m["minus_surrogate_gradient"],
        wrong=lambda m: m["minus_policy_gradient"],
        paper="arXiv 2512.23075",
        equality=True,
    ),
    _check(
        "all_agree_on_policy",
        "at ratio 1 every surrogate has the gradient -A of REINFORCE",
        "score_function importance_weighted clipped dual_clipped clipped_weight divergence_masked",
        lambda m: m["on_policy"],
        lambda m: m["minus_advantages"],
        wrong_left=lambda m: m["off_policy"],
        equality=True,
    ),
    _check(
        "clipped_gradient",
        "d loss / d log pi = -A rho, and 0 exactly where A > 0, rho > 1 + high or A < 0, rho < 1 - low",
        "clipped clip_binds",
        lambda m: m["clipped_slope"],
        lambda m: m["clipped_formula"],
        wrong=lambda m: m["free_slope"],
        equality=True,
    ),
    _check(
        "clipped_is_pessimistic",
        "min(rho A, clip(rho) A) <= rho A: the clip never promises more",
        "clipped",
        lambda m: m["gain"],
        lambda m: m["free_gain"],
        wrong_left=lambda m: m["greedy_gain"],
    ),
    _check(
        "clipped_ceiling",
        "the gain is at most (1 + high) A for A > 0 and -(1 - low)|A| for A < 0",
        "clipped",
        lambda m: m["gain"],
        lambda m: m["ceiling"],
        wrong_left=lambda m: m["free_gain"],
    ),
    _check(
        "dual_clipped_ceiling",
        "erratum F2.9: for A < 0 the loss is at most dual_clip |A|; PPO's alone has no bound there",
        "dual_clipped",
        lambda m: m["dual_loss"],
        lambda m: m["dual_ceiling"],
        wrong_left=lambda m: m["single_loss"],
        paper="arXiv 1912.09729",
    ),
    _check(
        "clipped_weight_gradient",
        "CISPO: d loss / d log pi = -clip(rho) A, so that no token loses its gradient",
        "clipped_weight",
        lambda m: m["cispo_slope"],
        lambda m: m["cispo_formula"],
        wrong=lambda m: m["clipped_formula"],
        paper="arXiv 2506.13585",
        equality=True,
    ),
    _check(
        "divergence_masked_gradient",
        "DPPO: -A rho, and 0 where the divergence exceeds its threshold and the step would move outwards",
        "divergence_masked",
        lambda m: m["dppo_slope"],
        lambda m: m["dppo_formula"],
        wrong=lambda m: m["dppo_both_ways"],
        paper="arXiv 2602.04879",
        equality=True,
    ),
    compare(
        "surrogates.gspo_at_length_one",
        "responses of one token: GSPO has the gradient of clipped GRPO; of two tokens it has not",
        "objectives.policy_loss objectives.ratios.geometric_ratio",
        lambda m: m["gspo"],
        lambda m: m["grpo"],
        wrong_left=lambda m: m["gspo_two"],
        wrong=lambda m: m["grpo_two"],
        world=WORLD,
        paper="arXiv 2507.18071",
        equality=True,
    ),
]
