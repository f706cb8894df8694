"""Token baselines: which estimator each has the smallest variance for, over a group that is the law of the policy.

The probabilities of the policy are multiples of 1/4, so that a group of 4^T responses holds every response exactly in
proportion to its probability: what a function computes from that group is an expectation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import token_baseline
from theory_checks.check import World
from theory_checks.check import compare

DERIVED = "derived (docs/theory.md)"
HORIZON, QUARTERS = 3, 4
ROWS = QUARTERS**HORIZON
CONTEXTS = 2**HORIZON - 1
OFFSETS = np.array([-0.5, -0.1, -1e-3, 0.0, 1e-3, 0.1, 0.5])


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """How many quarters each context gives to token 0, and the reward of each response."""
    quarters = generator.integers(1, QUARTERS, size=(count, CONTEXTS))
    return [(jnp.asarray(quarters), jnp.asarray(generator.random((count, 2**HORIZON))))]


def _group(quarters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[rows, T] contexts and tokens: each context's four quarters, distributed over its two tokens."""
    draws = np.indices((QUARTERS,) * HORIZON).reshape(HORIZON, -1)
    prefix, contexts, tokens = jnp.zeros(ROWS, int), [], []
    for t in range(HORIZON):
        context = 2**t - 1 + prefix
        token = (jnp.asarray(draws[t]) >= quarters[context]).astype(int)
        contexts.append(context)
        tokens.append(token)
        prefix = 2 * prefix + token
    return jnp.stack(contexts, 1), jnp.stack(tokens, 1)


def _measure(quarters: jax.Array, rewards: jax.Array) -> dict[str, jax.Array]:
    contexts, tokens = _group(quarters)
    first = quarters / QUARTERS
    p = jnp.stack([first, 1 - first], axis=1)
    reward = rewards[tokens @ (2 ** jnp.arange(HORIZON)[::-1])]
    score = (jax.nn.one_hot(tokens, 2) - p[contexts])[:, :, None, :] * jax.nn.one_hot(contexts, CONTEXTS)[..., None]
    score = score.reshape(ROWS, HORIZON, -1)
    spent = jnp.cumsum(score, axis=1)  # the score of everything up to t
    log_prob = jnp.log(jnp.take_along_axis(p[contexts], tokens[..., None], axis=2)[..., 0])
    every, one_group = jnp.ones(log_prob.shape, bool), jnp.zeros(ROWS, jnp.int32)
    arrays = (log_prob, jnp.sum(p * p, axis=1)[contexts], every)
    norms = token_baseline.spent_gradient(*arrays)
    optimal = token_baseline.optimal_token_baseline(reward, *arrays, one_group)
    own = token_baseline.own_token_baseline(reward, *arrays, one_group)
    centred = jnp.broadcast_to((reward - jnp.mean(reward))[:, None], optimal.shape)

    def variance(estimates):
        """Trace of the covariance over the rows, of the last axis."""
        return jnp.sum(jnp.var(estimates, axis=0), axis=-1)

    def prefix(advantages):
        return variance(advantages[..., None] * spent)

    def token(advantages):
        return variance(jnp.sum(advantages[..., None] * score, axis=1))

    moved_prefix = jnp.stack([prefix(optimal + offset) for offset in OFFSETS])
    moved = [optimal, *(own.at[:, t].add(offset) for t in range(HORIZON) for offset in OFFSETS)]
    return {
        "prefix": prefix(optimal),
        "prefix_least": jnp.min(jnp.concatenate([moved_prefix, prefix(own)[None], prefix(centred)[None]]), axis=0),
        "prefix_centred": prefix(centred),
        "token": token(own),
        "token_least": jnp.min(jnp.stack([token(x) for x in [*moved, centred]])),
        "token_optimal": token(optimal),
        "norms": norms,
        "norms_exact": jnp.sum(jnp.square(spent), axis=2),
        "norms_own": jnp.sum(jnp.square(score), axis=2),
        "mean": jnp.mean(jnp.sum(optimal[..., None] * score, axis=1), axis=0),
        "mean_own": jnp.mean(jnp.sum(own[..., None] * score, axis=1), axis=0),
        "gradient": jnp.mean(jnp.sum(reward[:, None, None] * score, axis=1), axis=0),
        "mean_dependent": jnp.mean(jnp.sum((reward[:, None] - norms)[..., None] * score, axis=1), axis=0),
    }


WORLD = World(name="token_baseline", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, **options):
    names = " ".join(f"objectives.token_baseline.{function}" for function in functions.split())
    options = {"world": WORLD, "paper": DERIVED, **options}
    return compare(f"token_baseline.{name}", statement, names, left, right, **options)


CHECKS = [
    _check(
        "spent_gradient",
        "W_t = |sum_{j<=t} grad log pi_j|^2 where contexts have logits of their own",
        "spent_gradient",
        lambda m: m["norms"],
        lambda m: m["norms_exact"],
        wrong=lambda m: m["norms_own"],
        equality=True,
    ),
    _check(
        "unbiased",
        "E sum_t (R - B_t) grad log pi_t = grad J with either baseline; one that depends on the token is biased",
        "optimal_token_baseline own_token_baseline",
        lambda m: np.stack([m["mean"], m["mean_own"]], 1),
        lambda m: np.stack([m["gradient"], m["gradient"]], 1),
        wrong_left=lambda m: np.stack([m["mean_dependent"], m["mean_dependent"]], 1),
        equality=True,
    ),
    _check(
        "optimal_for_prefixes",
        "Var[(R - B_t) sum_{j<=t} grad log pi_j] is least at E[R W_t] / E[W_t]; the mean reward has a larger one",
        "optimal_token_baseline",
        lambda m: m["prefix"],
        lambda m: m["prefix_least"],
        wrong_left=lambda m: m["prefix_centred"],
        paper="verl",
    ),
    _check(
        "own_for_tokens",
        "erratum F5.3: Var[sum_t (R - B_t) grad log pi_t] is least with the token's own norm, not with W_t",
        "own_token_baseline",
        lambda m: m["token"],
        lambda m: m["token_least"],
        wrong_left=lambda m: m["token_optimal"],
    ),
]
