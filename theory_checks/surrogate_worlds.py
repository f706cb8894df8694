"""Token trees measured for the theorems on the surrogate error, and the two-token worlds that attain its constants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import sampled_gain
from jaxrl_llm.bounds import sampled_sequence_tv
from jaxrl_llm.bounds import sampled_sequence_tv_one_sided
from jaxrl_llm.bounds import sampled_surrogate_error
from jaxrl_llm.bounds import sampled_surrogate_gain
from jaxrl_llm.bounds import sampled_weighted_deviation
from jaxrl_llm.bounds import sampled_worst_surrogate_error
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.bounds import tv_bound_from_kl
from jaxrl_llm.bounds.surrogate_error import average_only_from_kl
from jaxrl_llm.bounds.surrogate_error import pinsker_marginal_kl_closed_form
from jaxrl_llm.bounds.surrogate_error import trivial_error_bound
from jaxrl_llm.objectives.divergences import k3
from theory_checks import token_trees as trees
from theory_checks.check import World

SHAPES = ((2, 6), (4, 4))
"""(vocabulary, horizon) of the random trees; each takes one compilation."""

NO_CLAMP = jnp.inf
"""Exact identities hold without the clamp that guards sampled estimates."""


def two_token_worlds(count: int) -> tuple[Any, Any, jax.Array]:
    """`count` worlds of two tokens and two steps: those that attain Error = 2 eps^2, and six that jump.

    mu is uniform; pi moves by eps at the root, and after token 0 towards the rewarded token, after token 1 away from
    it. In three of the jumps mu always starts with token 0 and pi with token 1, and they disagree about the second
    token as well: |Error| is then 2, which is sum_t Dbar_t. In the last three mu almost never starts with token 1, pi
    does once in so many times and disagrees thereafter: |Error| is then D_KL, but for a percent.
    """
    eps = np.geomspace(1e-3, 0.45, count - 6)
    half = np.full_like(eps, 0.5)
    up, down = np.stack([half + eps, half - eps], -1), np.stack([half - eps, half + eps], -1)
    never = 1e-8  # its log is within the clamp of the sampled estimators
    yes, no = [never, 1 - never], [1 - never, never]
    jumps = [([[x, 1 - x], [no, yes]], [[1 - x, x], [yes, no]]) for x in (1e-6, 1e-7, never)]
    jumps += [([[1 - x, x], [no, yes]], [[1 - 1e-6, 1e-6], [no, no]]) for x in (0.02, 0.005, 0.01)]
    pi = [np.stack([up], 1), np.stack([up, down], 1)]
    mu = [np.full_like(x, 0.5) for x in pi]
    for policy, jump in ((pi, [p for p, _ in jumps]), (mu, [m for _, m in jumps])):
        policy[0] = np.concatenate([policy[0], [[root] for root, _ in jump]])
        policy[1] = np.concatenate([policy[1], [later for _, later in jump]])
    rewards = np.tile([1.0, 0.0, 1.0, 0.0], (count, 1))
    rewards[-3:] = [0.0, 0.0, 1.0, 0.0]
    return [jnp.log(jnp.asarray(p)) for p in pi], [jnp.log(jnp.asarray(m)) for m in mu], jnp.asarray(rewards)


def draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Random trees of every shape, with noise from 0.02 to 3 and three kinds of rewards, and the two-token worlds."""
    worlds = max(count // len(SHAPES), 6)
    batches: list[Any] = [two_token_worlds(16)]
    for vocabulary, horizon in SHAPES:
        batches.append(
            trees.draw(
                generator,
                worlds=worlds,
                vocabulary=vocabulary,
                horizon=horizon,
                noise=np.geomspace(0.02, 3.0, worlds),
                share=np.where(np.arange(worlds) % 2 == 0, 1.0, 0.2),
                kind=np.arange(worlds) % 3,
            )
        )
    return batches


def worst_pair(left: jax.Array, right: jax.Array) -> jax.Array:
    """[2]: the entry of left and right with the largest left / right; left > right there if it is anywhere."""
    tiny = 1e-9
    index = jnp.argmax((left + tiny) / (right + tiny))
    return jnp.stack([left[index], right[index]])


def _context_shift(pi: Any, mu: Any, inputs: Any) -> dict[str, jax.Array]:
    """TV between the laws of contexts at each position, next to every route that bounds it."""
    pairs = zip(trees.prefix_log_probs(pi)[:-1], trees.prefix_log_probs(mu)[:-1], strict=True)
    shift = jnp.stack([jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(m))) / 2 for p, m in pairs])
    before = jnp.arange(len(pi), dtype=shift.dtype)
    routes = {
        "coupling": before * inputs.max_tv,
        "pinsker": jnp.sqrt(before * inputs.max_kl / 2),
        "sequence_tv": jnp.broadcast_to(inputs.sequence_tv, shift.shape),
        "sequence_kl": jnp.broadcast_to(jnp.sqrt(inputs.sequence_kl / 2), shift.shape),
    }
    # At the first position both sides are 0.
    return {f"shift_{name}": worst_pair(shift[1:], jnp.minimum(route[1:], 1.0)) for name, route in routes.items()}


def _per_context(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    """Performance differences, the advantage lemma, and inequalities between divergences in each context."""
    difference, reached_pi, reached_mu = (jnp.concatenate(x) for x in trees.performance_differences(pi, mu, rewards))
    _, kl, tv = trees.divergences(pi, mu)
    kl, tv = jnp.concatenate(kl), jnp.concatenate(tv)
    log_mu = jnp.concatenate([jax.nn.log_softmax(m) for m in mu])
    log_pi = jnp.concatenate([jax.nn.log_softmax(p) for p in pi])
    estimate = jnp.sum(jnp.exp(log_mu) * k3(log_mu - log_pi), axis=1)
    wrong = jnp.sum(jnp.exp(log_mu) * k3(log_pi - log_mu), axis=1)
    worst = jnp.argmax(jnp.abs(estimate - kl))
    return {
        "performance_difference": jnp.sum((reached_pi - reached_mu) * difference),
        "performance_sum": jnp.sum((reached_pi + reached_mu) * difference),
        "advantage": worst_pair(jnp.abs(difference), tv),
        "tv_from_kl": worst_pair(tv, tv_bound_from_kl(kl)),
        "k3": jnp.stack([estimate[worst], kl[worst]]),
        "k3_wrong": jnp.stack([jnp.max(jnp.abs(wrong - kl)), jnp.zeros(())]),
    }


def _sampled(pi: Any, mu: Any, rewards: jax.Array, inputs: Any) -> dict[str, jax.Array]:
    """Every sampled estimate on every sequence once, in proportion to its probability under mu: an expectation."""
    law = jnp.exp(trees.sequence_log_probs(mu))
    ratios = trees.token_log_ratios(pi, mu)
    every = jnp.ones(ratios.shape, bool)
    # The estimates are means over rows, so that a row of weight w enters with w times the number of rows.
    weighted = law * rewards * law.size
    row = jnp.ones((1, ratios.shape[1]), bool)
    after = jnp.arange(ratios.shape[1], dtype=ratios.dtype)[::-1]
    weights = jnp.minimum(after * inputs.max_tv, 1.0)

    def expected(estimate):
        return jnp.sum(law * jax.vmap(lambda x: estimate(x[None]).value)(ratios))

    return {
        "ratio_form": sampled_surrogate_error(ratios, every, weighted, limit=NO_CLAMP).value,
        "ratio_form_wrong": -sampled_surrogate_error(ratios, every, weighted, limit=NO_CLAMP).value,
        "sampled_surrogate": sampled_surrogate_gain(ratios, every, weighted, limit=NO_CLAMP).value,
        "sampled_gain": sampled_gain(ratios, every, weighted, limit=NO_CLAMP).value,
        "worst_reward": expected(lambda x: sampled_worst_surrogate_error(x, row, limit=NO_CLAMP)),
        "weighted_deviation": expected(lambda x: sampled_weighted_deviation(x, row, weights, limit=NO_CLAMP)),
        "sampled_tv": expected(lambda x: sampled_sequence_tv(x, row, limit=NO_CLAMP)),
        "sampled_tv_one_sided": expected(lambda x: sampled_sequence_tv_one_sided(x, row, limit=NO_CLAMP)),
    }


def measure(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    """Everything the theorems on the surrogate error speak of, in one tree."""
    gain, surrogate, error = trees.error_of_surrogate(pi, mu, rewards)
    inputs = trees.bound_inputs(pi, mu)
    law = jnp.exp(trees.sequence_log_probs(mu))
    mean_reward = jnp.sum(law * rewards)
    bounds = surrogate_error_bounds(inputs)
    ratios = jnp.exp(trees.token_log_ratios(pi, mu))
    baseline = 0.3
    return {
        "error": error,
        "gain": gain,
        "surrogate": surrogate,
        "unified_printed": bounds.unified_printed,
        "unified_sharp": bounds.unified_sharp,
        "average_from_kl": average_only_from_kl(inputs),
        "closed_form": pinsker_marginal_kl_closed_form(inputs),
        "trivial": trivial_error_bound(reward_range=(0.0, 1.0), mean_reward=mean_reward, surrogate_gain=surrogate),
        "sequence_tv": inputs.sequence_tv,
        "sum_mean_tv": jnp.sum(inputs.mean_tv_t),
        "horizon": jnp.asarray(float(len(pi))),
        "two_tokens": jnp.asarray(float(len(pi) == 2)),
        "max_tv": inputs.max_tv,
        "printed_surrogate": jnp.sum(law * (rewards - baseline) * jnp.sum(ratios, axis=1)),
        "offset": len(pi) * (mean_reward - baseline),
        **{f"printed_{name}": value for name, value in bounds.printed.items()},
        **{f"sharp_{name}": value for name, value in bounds.sharp.items()},
        **_context_shift(pi, mu, inputs),
        **_per_context(pi, mu, rewards),
        **_sampled(pi, mu, rewards, inputs),
    }


WORLD = World(name="surrogate_error", draw=draw, measure=measure)
