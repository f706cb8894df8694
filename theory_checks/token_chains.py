"""The bounds on the surrogate error on long responses: token chains of 16 to 4096 tokens, exactly by recursion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import surrogate_error_bounds
from theory_checks import chain_worlds as chains
from theory_checks.check import Check
from theory_checks.check import Measured
from theory_checks.check import Sides
from theory_checks.check import World

PAPER = "arXiv 2512.23075"
DERIVED = "derived (docs/theory.md)"
STATES = 6
HORIZONS = (16, 64, 256)
COUNTED = 64
"""Length of the responses whose tokens are counted one by one."""
LONG, SMALL = (16, 64, 256, 1024, 4096), 1e-6
"""Horizons and divergence per token of the statement on growth."""


def _rare(horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of token 1 under mu and pi: once in a response, or almost never where the policies differ much."""
    total = np.array([1e-3, 1e-2, 0.1, 1.0, 5.0, 10.0])
    q = np.where(total < 2, 1.0, 1e-5) / horizon
    p = np.array([chains.shifted_probability(a, b / horizon, upwards=True) for a, b in zip(q, total, strict=True)])
    return q, p, total


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Random maps and policies at every horizon, near to far apart, and the independent rare tokens."""
    batches, each = [], max(count // len(HORIZONS), 8)
    for horizon in HORIZONS:
        q, p, _ = _rare(horizon)
        move = np.eye(STATES)[generator.integers(STATES, size=(each, STATES, 2))]
        mu = 1.5 * generator.normal(size=(each, STATES, 2))
        pi = mu + np.geomspace(0.003, 1.5, each)[:, None, None] * generator.normal(size=mu.shape)
        rare_mu, rare_pi = (np.log(np.stack([1 - x, x], -1))[:, None].repeat(STATES, 1) for x in (q, p))
        rewards = generator.random((each + len(q), STATES))
        moves = np.concatenate([move, np.tile(chains.counter(STATES), (len(q), 1, 1, 1))])
        worlds = (np.concatenate([pi, rare_pi]), np.concatenate([mu, rare_mu]), moves, rewards)
        # The length of the last array is the horizon.
        batches.append(tuple(jnp.asarray(x) for x in (*worlds, np.zeros((len(rewards), horizon)))))
    return batches


def _measure(pi, mu, move, rewards, steps) -> dict[str, jax.Array]:
    horizon = steps.shape[0]
    chain = chains.Chain(pi, mu, move)
    found = chains.measure(chain, horizon=horizon)
    bounds = surrogate_error_bounds(found.inputs)
    return {
        "error": jnp.sum(rewards * found.excess),
        "gain": jnp.sum(rewards * (found.last_pi - found.last_mu)),
        "difference": chains.performance_differences(chain, rewards, horizon=horizon),
        "worst": found.worst,
        "shift": jnp.sum(jnp.abs(found.last_pi - found.last_mu)) / 2,
        "pinsker": jnp.minimum(1.0, jnp.sqrt(found.inputs.sequence_kl / 2)),
        "unified_printed": bounds.unified_printed,
        "unified_sharp": bounds.unified_sharp,
        "linear": bounds.sharp["linear"],
        "sequence_kl": bounds.sharp["sequence_kl"],
    }


WORLD = World(name="token_chains", draw=_draw, measure=_measure)


def _draw_counts(generator: np.random.Generator, count: int) -> list[Any]:
    """Independent tokens, and what their binomial counts say about them."""
    worlds = min(max(count // 20, 8), 50)
    q = np.exp(generator.uniform(np.log(0.01), np.log(0.9), worlds))
    p = q + generator.uniform(-0.3, 0.3, worlds) * np.minimum(q, 1 - q)
    counts = [chains.independent_tokens(q, p, horizon) for horizon in (COUNTED, COUNTED - 1)]
    policies = [np.log(np.stack([1 - x, x], -1))[:, None].repeat(COUNTED + 1, 1) for x in (p, q)]
    closed = (counts[0].worst, counts[0].sequence_tv, counts[1].worst)
    return [tuple(jnp.asarray(x) for x in (*policies, *closed))]


def _measure_counts(pi, mu, worst, sequence_tv, shorter) -> dict[str, jax.Array]:
    found = chains.measure(chains.Chain(pi, mu, jnp.asarray(chains.counter(COUNTED + 1))), horizon=COUNTED)
    return {
        "recursion": jnp.stack([found.worst, jnp.sum(jnp.abs(found.last_pi - found.last_mu)) / 2]),
        "closed": jnp.stack([worst, sequence_tv]),
        "shorter": jnp.stack([shorter, sequence_tv]),
    }


COUNT_WORLD = World(name="token_chain_counts", draw=_draw_counts, measure=_measure_counts)


def _draw_growth(generator: np.random.Generator, count: int) -> list[Any]:
    del generator, count
    q = 1 / np.array(LONG)
    p = chains.shifted_probability(q, SMALL, upwards=True)
    worst = [chains.independent_tokens(a, b, horizon).worst for a, b, horizon in zip(q, p, LONG, strict=True)]
    return [(jnp.asarray(LONG, jnp.float64), jnp.asarray(np.array(worst)))]


def _measure_growth(horizon: jax.Array, worst: jax.Array) -> dict[str, jax.Array]:
    return {"horizon": horizon, "worst": worst}


GROWTH_WORLD = World(name="token_chain_growth", draw=_draw_growth, measure=_measure_growth)


def _check(
    name, statement, functions, left, right, *, wrong=None, wrong_left=None, world=WORLD, paper=DERIVED, **options
) -> Check:
    def sides(m: Measured) -> Sides:
        return Sides(left(m), right(m))

    def twin(m: Measured) -> Sides:
        return Sides((wrong_left or left)(m), (wrong or right)(m))

    names = tuple(f"bounds.{part}" for part in functions.split())
    return Check(
        name=f"token_chains.{name}",
        paper=paper,
        statement=statement,
        functions=names,
        world=world,
        sides=sides,
        wrong=twin,
        **options,
    )


CHECKS = [
    _check(
        "sequence_kl",
        "the largest |Error| over rewards <= D_KL, at T = 16, 64, 256",
        "surrogate_error.sequence_kl_sharp",
        lambda m: m["worst"],
        lambda m: m["sequence_kl"],
        wrong=lambda m: 0.8 * m["sequence_kl"],
    ),
    _check(
        "linear",
        "the largest |Error| over rewards <= sum_t Dbar_t",
        "surrogate_error.linear_sharp",
        lambda m: m["worst"],
        lambda m: m["linear"],
        wrong=lambda m: 0.8 * m["linear"],
    ),
    _check(
        "unified_sharp",
        "the largest |Error| over rewards <= the smallest sharp bound",
        "surrogate_error.surrogate_error_bounds",
        lambda m: m["worst"],
        lambda m: m["unified_sharp"],
        wrong=lambda m: 0.8 * m["unified_sharp"],
    ),
    _check(
        "unified_printed",
        "the largest |Error| over rewards <= the smallest printed bound",
        "surrogate_error.surrogate_error_bounds",
        lambda m: m["worst"],
        lambda m: m["unified_printed"],
        wrong=lambda m: m["unified_printed"] / 10,
        paper=PAPER,
    ),
    _check(
        "worst_reward",
        "|Error| = |sum_s R(s) x(s)| <= sum_s max(0, -x(s)) for every reward of the last state",
        "sampled.sampled_worst_surrogate_error",
        lambda m: np.abs(m["error"]),
        lambda m: m["worst"],
        wrong=lambda m: 0.5 * m["worst"],
    ),
    _check(
        "performance_difference",
        "the forward recursion = sum_t (E_{d_t^pi} - E_{d_t^mu}) g_t by a backward one",
        "surrogate_error.surrogate_error_bounds",
        lambda m: m["difference"],
        lambda m: m["error"],
        wrong_left=lambda m: m["gain"],
        paper=PAPER,
        equality=True,
    ),
    _check(
        "context_shift",
        "TV of the laws of the last state <= min(1, sqrt(D_KL / 2))",
        "inputs.tv_bound_from_kl",
        lambda m: m["shift"],
        lambda m: m["pinsker"],
        wrong=lambda m: 0.5 * m["pinsker"],
        paper=PAPER,
    ),
    _check(
        "counts",
        "independent tokens: the recursion over counts = the binomial sum, for the worst error and for TV",
        "sampled.sampled_worst_surrogate_error sampled.sampled_sequence_tv",
        lambda m: m["recursion"],
        lambda m: m["closed"],
        wrong=lambda m: m["shorter"],
        world=COUNT_WORLD,
        equality=True,
    ),
    _check(
        "growth",
        "T delta / 2 <= the largest |Error| of tokens that come once in a response, at T = 16 to 4096: linear growth",
        "surrogate_error.sequence_kl_sharp",
        lambda m: m["horizon"] * SMALL / 2,
        lambda m: m["worst"],
        wrong_left=lambda m: m["horizon"] ** 1.5 * SMALL * 2 / 3,
        world=GROWTH_WORLD,
    ),
    _check(
        "growth_limit",
        "the largest |Error| <= T delta: where the printed bound grows like T^(3/2)",
        "surrogate_error.sequence_kl_sharp surrogate_error.pinsker_marginal_kl_closed_form",
        lambda m: m["worst"],
        lambda m: m["horizon"] * SMALL,
        wrong=lambda m: m["horizon"] * SMALL / 2,
        world=GROWTH_WORLD,
    ),
]
