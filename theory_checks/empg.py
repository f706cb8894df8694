"""Entropy-modulated policy gradients (arXiv 2509.09265): what the entropy says about the gradient, and the bonus."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.bounds import logit_dynamics
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.objectives import modulation
from theory_checks.check import Check
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2509.09265"
DERIVED = "derived (docs/theory.md)"
BATCH, STEPS, VOCABULARY = 5, 4, 7
ZETA = 0.1


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Batches of trajectories with one to four steps, their entropies and advantages, and a policy over tokens."""
    lengths = generator.integers(1, STEPS + 1, size=(count, BATCH))
    lengths[:, 0] = STEPS
    mask = np.arange(STEPS)[None, None, :] < lengths[:, :, None]
    logits = np.array([0.3, 1.0, 3.0])[generator.integers(3, size=(count, 1))] * generator.normal(
        size=(count, VOCABULARY)
    )
    arrays = (generator.uniform(0, 2, size=mask.shape), mask, generator.normal(size=(count, BATCH)), logits)
    return [tuple(jnp.asarray(x) for x in arrays)]


def _fixture() -> dict[str, jax.Array]:
    """The fixture of two trajectories, three and two steps, k = k' = 1, zeta = 0.1."""
    step_h = jnp.array([[0.2, 1.0, 0.6], [0.4, 0.8, 0.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    advantages = modulation.modulated_advantages(jnp.array([1.0, -1.0]), step_h, mask, clarity_weight=ZETA)
    opposite = modulation.modulated_advantages(jnp.array([-1.0, 1.0]), step_h, mask, clarity_weight=ZETA)
    expected = jnp.array([[1.333741, 0.377750, 0.687033], [-1.413147, -0.985377, 0.0]])
    return {"fixture": advantages, "fixture_wrong": opposite, "fixture_expected": expected}


def _policy(logits: jax.Array) -> dict[str, jax.Array]:
    """E|grad log pi|^2 by enumeration of actions, next to 1 - exp(-H2) and the same with Shannon's entropy."""
    p = jax.nn.softmax(logits)
    scores = jax.jacrev(jax.nn.log_softmax)(logits)
    collision = categorical.collision(logits)
    return {
        "mean_square": jnp.sum(p * jnp.sum(jnp.square(scores), axis=1)),
        "renyi": logit_dynamics.expected_squared_update_norm(collision),
        "shannon": -jnp.expm1(-categorical.entropy(logits)),
    }


def _measure(step_h: jax.Array, mask: jax.Array, advantages: jax.Array, logits: jax.Array) -> dict[str, jax.Array]:
    normalised = modulation.normalised_entropy(step_h, mask)
    scale = modulation.self_calibrating_scale(normalised, mask)
    zero = jnp.zeros(BATCH)
    final = modulation.modulated_advantages(advantages, step_h, mask, clarity_weight=ZETA)
    only_bonus = modulation.modulated_advantages(zero, step_h, mask, clarity_weight=ZETA)
    potential = jnp.where(mask, jnp.exp(-normalised), 0.0)
    shaped = modulation.potential_shaping(potential, mask)
    following = jnp.concatenate([mask[:, 1:], jnp.zeros((BATCH, 1), bool)], axis=1)
    last = mask & ~following
    # The telescoped sum of the shaping rewards from each step on.
    rest = jnp.cumsum(shaped[:, ::-1], axis=1)[:, ::-1]
    largest, smallest = jnp.max(jnp.where(mask, scale, 0.0)), jnp.min(jnp.where(mask, scale, jnp.inf))
    clarity = modulation.future_clarity(normalised, mask)
    return {
        "mean_scale": masked_mean(scale, mask),
        "mean_unscaled": masked_mean(jnp.exp(-normalised), mask),
        "mean_final": masked_mean(final, mask),
        "mean_modulated": masked_mean(advantages[:, None] * scale, mask),
        "scale_ratio": largest / smallest,
        "last": jnp.max(jnp.where(last, only_bonus, -jnp.inf)),
        "first_of_rest": jnp.min(jnp.where(following, only_bonus, jnp.inf)),
        "last_value": jnp.max(jnp.where(last, only_bonus, -jnp.inf)),
        "mean_bonus": -ZETA * masked_mean(clarity, mask),
        "normalised_low": jnp.min(jnp.where(mask, normalised, jnp.inf)),
        "normalised_high": jnp.max(jnp.where(mask, normalised, -jnp.inf)),
        "telescoped": jnp.where(mask, rest, 0.0),
        "one_term": shaped,
        "potential_bonus": modulation.potential_bonus(potential, mask),
        **_fixture(),
        **_policy(logits),
    }


WORLD = World(name="empg", draw=_draw, measure=_measure)
POLICIES = 48


def _draw_policies(generator: np.random.Generator, count: int) -> list[Any]:
    """Sets of policies, from flat to peaked within each set."""
    spread = generator.uniform(0.3, 4.0, (count, POLICIES, 1))
    return [(jnp.asarray(spread * generator.normal(size=(count, POLICIES, VOCABULARY))),)]


def _rank_correlation(one: jax.Array, other: jax.Array) -> jax.Array:
    """Spearman's: the correlation of the ranks."""
    ranks = [jnp.argsort(jnp.argsort(x)).astype(x.dtype) for x in (one, other)]
    return jnp.corrcoef(jnp.stack(ranks))[0, 1]


def _measure_policies(logits: jax.Array) -> dict[str, jax.Array]:
    mean_square = jax.vmap(_policy)(logits)["mean_square"]
    return {
        "rank_renyi": _rank_correlation(mean_square, -jnp.log(categorical.collision(logits))),
        "rank_shannon": _rank_correlation(mean_square, categorical.entropy(logits)),
    }


POLICY_SETS = World(name="empg_policies", draw=_draw_policies, measure=_measure_policies)
COOLING, BISECTIONS = 0.1, 50
"""Weight of the entropy of the root that makes the fixed point unique, and how finely it is found."""


def _draw_branches(generator: np.random.Generator, count: int) -> list[Any]:
    """What the two branches return, and how uncertain the policy is before the choice and on each branch."""
    return [(jnp.asarray(generator.random((count, 2))), jnp.asarray(generator.uniform(0, 2, size=(count, 3))))]


def _fixed_point(returns: jax.Array, bonus: jax.Array) -> jax.Array:
    """Log-odds z of branch 1 at which the exact policy gradient E[A grad log p] + cooling grad H vanishes."""

    def slope(z):
        p = jnp.stack([jax.nn.sigmoid(-z), jax.nn.sigmoid(z)])
        score = jnp.stack([-p[1], p[0]])
        return jnp.sum(p * (returns + bonus) * score) - COOLING * p[0] * p[1] * z

    def halve(_, ends):
        middle = (ends[0] + ends[1]) / 2
        up = slope(middle) > 0
        return jnp.where(up, middle, ends[0]), jnp.where(up, ends[1], middle)

    return jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.array(-30.0), jnp.array(30.0)))[0]


def _measure_branches(returns: jax.Array, entropies: jax.Array) -> dict[str, jax.Array]:
    root = jnp.stack([entropies[0], entropies[0]])
    normalised = modulation.normalised_entropy(jnp.stack([root, entropies[1:]], axis=1), jnp.ones((2, 2), bool))
    steps = jnp.ones((2, 2), bool)
    clarity = modulation.future_clarity(normalised, steps)
    potential = jnp.exp(-normalised)
    zeta = 0.5
    return {
        "without_bonus": _fixed_point(returns, jnp.zeros(2)),
        "closed_form": (returns[1] - returns[0]) / COOLING,
        "with_clarity": _fixed_point(returns, zeta * clarity[:, 0]),
        "with_clarity_formula": (returns[1] - returns[0] + zeta * (clarity[1, 0] - clarity[0, 0])) / COOLING,
        "with_potential": _fixed_point(returns, zeta * modulation.potential_bonus(potential, steps)[:, 0]),
        "with_one_term": _fixed_point(returns, zeta * modulation.potential_shaping(potential, steps)[:, 0]),
    }


BRANCHES = World(name="empg_branches", draw=_draw_branches, measure=_measure_branches)


def _check(name, statement, functions, left, right, *, world=WORLD, paper=PAPER, **options) -> Check:
    names = " ".join(functions)
    return compare(f"empg.{name}", statement, names, left, right, world=world, paper=paper, **options)


CHECKS = [
    _check(
        "proposition_1",
        "E_{a~pi}|grad_z log pi(a)|^2 = 1 - exp(-H2): Renyi, and not Shannon (erratum F4.1)",
        ("bounds.logit_dynamics.expected_squared_update_norm",),
        lambda m: m["mean_square"],
        lambda m: m["renyi"],
        wrong=lambda m: m["shannon"],
        equality=True,
    ),
    _check(
        "shannon_upper",
        "E|grad_z log pi|^2 <= 1 - exp(-H), since H2 <= H: Shannon's entropy bounds it from one side only",
        ("bounds.logit_dynamics.expected_squared_update_norm",),
        lambda m: m["mean_square"],
        lambda m: m["shannon"],
        wrong_left=lambda m: 1.3 * m["mean_square"],
        paper=DERIVED,
    ),
    _check(
        "rank_correlation",
        "over policies, E|grad_z log pi|^2 has rank correlation 1 with Renyi's H2; with Shannon's H it has not",
        ("bounds.logit_dynamics.expected_squared_update_norm",),
        lambda m: m["rank_renyi"],
        lambda m: np.ones_like(m["rank_renyi"]),
        wrong_left=lambda m: m["rank_shannon"],
        world=POLICY_SETS,
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "scale_mean_one",
        "the self-calibrating scale has mean 1 over the steps of the batch",
        ("objectives.modulation.self_calibrating_scale",),
        lambda m: m["mean_scale"],
        lambda m: np.ones_like(m["mean_scale"]),
        wrong_left=lambda m: m["mean_unscaled"],
        equality=True,
    ),
    _check(
        "scale_ratio",
        "largest / smallest scale = exp(k) = e",
        ("objectives.modulation.self_calibrating_scale", "objectives.modulation.normalised_entropy"),
        lambda m: m["scale_ratio"],
        lambda m: np.full_like(m["scale_ratio"], np.e),
        wrong_left=lambda m: 1 / m["scale_ratio"],
        equality=True,
    ),
    _check(
        "normalised_range",
        "min-max normalisation reaches 0 and 1 on every batch",
        ("objectives.modulation.normalised_entropy",),
        lambda m: np.stack([m["normalised_low"], m["normalised_high"]], 1),
        lambda m: np.tile([0.0, 1.0], (m["normalised_low"].size, 1)),
        wrong=lambda m: np.tile([1.0, 0.0], (m["normalised_low"].size, 1)),
        equality=True,
    ),
    _check(
        "centred",
        "the final advantages have mean 0 over steps; the scaled ones do not (erratum F4.4)",
        ("objectives.modulation.modulated_advantages",),
        lambda m: m["mean_final"],
        lambda m: np.zeros_like(m["mean_final"]),
        wrong_left=lambda m: m["mean_modulated"],
        equality=True,
    ),
    _check(
        "last_step_penalty",
        "erratum F4.2: with no advantage at all, the last step gets -zeta mean f",
        ("objectives.modulation.future_clarity", "objectives.modulation.modulated_advantages"),
        lambda m: m["last_value"],
        lambda m: m["mean_bonus"],
        wrong=lambda m: -m["mean_bonus"],
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "last_step_below_all_others",
        "and that is below what every other step gets",
        ("objectives.modulation.future_clarity", "objectives.modulation.modulated_advantages"),
        lambda m: m["last"],
        lambda m: m["first_of_rest"],
        wrong_left=lambda m: m["first_of_rest"],
        wrong=lambda m: m["last"],
        paper=DERIVED,
    ),
    _check(
        "potential_telescopes",
        "the shaping rewards from a step on sum to minus its potential; one term alone is another number",
        ("objectives.modulation.potential_shaping", "objectives.modulation.potential_bonus"),
        lambda m: m["telescoped"],
        lambda m: m["potential_bonus"],
        wrong_left=lambda m: m["one_term"],
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "two_branches_clarity",
        "two branches: the fixed point is (R_1 - R_0 + zeta (f_1 - f_0)) / cooling, so clarity moves it (erratum F4.3)",
        ("objectives.modulation.future_clarity",),
        lambda m: m["with_clarity"],
        lambda m: m["with_clarity_formula"],
        wrong=lambda m: m["closed_form"],
        world=BRANCHES,
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "two_branches_potential",
        "the summed potential leaves the fixed point at (R_1 - R_0) / cooling; one of its terms alone does not",
        ("objectives.modulation.potential_bonus", "objectives.modulation.potential_shaping"),
        lambda m: m["with_potential"],
        lambda m: m["without_bonus"],
        wrong_left=lambda m: m["with_one_term"],
        world=BRANCHES,
        paper=DERIVED,
        equality=True,
    ),
    _check(
        "fixture",
        "two trajectories by hand: (1.333741, .377750, .687033), (-1.413147, -.985377)",
        ("objectives.modulation.modulated_advantages",),
        lambda m: m["fixture"],
        lambda m: m["fixture_expected"],
        wrong_left=lambda m: m["fixture_wrong"],
        equality=True,
        tolerance=1e-6,
    ),
]
