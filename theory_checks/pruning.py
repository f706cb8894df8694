"""What it costs to optimise the policy on a pruned vocabulary, and the gradient of the pruned objective."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.bounds import pruning as bounds
from jaxrl_llm.objectives import pruning
from theory_checks import pruned_training
from theory_checks import token_trees as trees
from theory_checks.check import Check
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2512.23087"
DERIVED = "derived (docs/theory.md)"
VOCABULARY, HORIZON = 4, 3
THRESHOLD = 0.3
LOG_MIN_P = float(np.log(THRESHOLD))


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    pi, infer, rewards = trees.draw(
        generator,
        worlds=count,
        vocabulary=VOCABULARY,
        horizon=HORIZON,
        noise=np.full(count, 0.3),
        share=np.ones(count),
        kind=np.arange(count) % 3,
    )
    return [([1.5 * z for z in pi], [1.5 * z for z in infer], rewards)]


def _pruned(policy: Any) -> Any:
    return [categorical.restrict(z, categorical.safe_set(z, log_min_p=LOG_MIN_P)) for z in policy]


def _law(policy: Any) -> jax.Array:
    return jnp.exp(trees.sequence_log_probs(policy))


def _token_values(policy: Any) -> tuple[jax.Array, jax.Array]:
    return pruned_training.token_values(policy, log_min_p=LOG_MIN_P)


def _flat(policy: Any) -> jax.Array:
    return jnp.concatenate([z.ravel() for z in policy])


def _gradients(pi: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    exact = jax.grad(lambda p: jnp.sum(_law(_pruned(p)) * rewards))(pi)
    unpruned = jax.grad(lambda p: jnp.sum(_law(p) * rewards))(pi)

    def loss(p):
        log_prob, kept = _token_values(p)
        weight = jnp.exp(jnp.sum(jax.lax.stop_gradient(log_prob), axis=1))
        law = jnp.where(jnp.all(kept, axis=1), weight, 0.0)
        return jnp.sum(law * (rewards - 0.5) * jnp.sum(log_prob, axis=1))

    ours = jax.grad(loss)(pi)
    outside = [~categorical.safe_set(z, log_min_p=LOG_MIN_P) for z in pi]
    return {
        "gradient": _flat(ours),
        "gradient_exact": _flat(exact),
        "gradient_unpruned": _flat(unpruned),
        "gradient_outside": jnp.where(_flat(outside), _flat(ours), 0.0),
        "unpruned_outside": jnp.where(_flat(outside), _flat(unpruned), 0.0),
    }


def _weights(pi: Any, infer: Any) -> dict[str, jax.Array]:
    """E_{mu_S'}[w f] and E_{pi_S}[f 1(all tokens in S')] for a fixed f."""
    log_prob, kept = _token_values(pi)
    log_behaviour, kept_behaviour = _token_values(infer)
    possible = jnp.all(kept_behaviour, axis=1)
    law_infer = jnp.where(possible, jnp.exp(jnp.sum(log_behaviour, axis=1)), 0.0)
    law_train = jnp.where(jnp.all(kept, axis=1), jnp.exp(jnp.sum(log_prob, axis=1)), 0.0)
    every = jnp.ones(kept.shape, bool)
    weights = pruning.pruned_sequence_weights(log_prob, log_behaviour, kept, every, cap=jnp.inf)
    f = jnp.linspace(-1.0, 2.0, weights.size)
    # One context: the root. Token weights are unbiased for functions of one token in the same sense.
    token = pruning.pruned_token_weights(log_prob, log_behaviour, kept, every, cap=jnp.inf)[:, 0]
    return {
        "weighted": jnp.sum(law_infer * weights * f),
        "reachable": jnp.sum(jnp.where(possible, law_train * f, 0.0)),
        "all_train": jnp.sum(law_train * f),
        "missing": jnp.sum(jnp.where(possible, 0.0, law_train)),
        "token_weighted": jnp.sum(law_infer * token),
        "token_reachable": jnp.sum(
            jnp.where(categorical.safe_set(infer[0][0], log_min_p=LOG_MIN_P), jax.nn.softmax(_pruned(pi)[0][0]), 0.0)
        ),
    }


def _measure(pi: Any, infer: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    keep = [categorical.safe_set(z, log_min_p=LOG_MIN_P) for z in pi]
    masses = [categorical.kept_mass(z, k) for z, k in zip(pi, keep, strict=True)]
    pruned = _pruned(pi)
    law, law_pruned = _law(pi), _law(pruned)
    mass_t = trees.per_sequence(masses)
    row = jnp.ones((1, HORIZON), bool)

    def expected(estimate):
        return jnp.sum(law_pruned * jax.vmap(lambda m: estimate(m[None], row).value)(mass_t))

    every_mass = jnp.concatenate(masses)
    tv_context = [categorical.total_variation(z, p) for z, p in zip(pi, pruned, strict=True)]
    smallest = jnp.min(every_mass)
    return {
        "bias": jnp.abs(jnp.sum((law - law_pruned) * rewards)),
        "indicator_bias": jnp.abs(jnp.sum(jnp.where(law_pruned > 0, law - law_pruned, 0.0))),
        "tv": jnp.sum(jnp.abs(law - law_pruned)) / 2,
        "leaves": jnp.sum(jnp.where(law_pruned > 0, 0.0, law)),
        "identity": expected(bounds.sampled_total_variation),
        "linear": expected(bounds.sampled_bias_bound),
        "worst": bounds.worst_case_bias_bound(smallest_kept_mass=smallest, horizon=HORIZON),
        "pruned_mass": 1 - smallest,
        "worst_mass": bounds.worst_case_pruned_mass(log_min_p=LOG_MIN_P, vocabulary=VOCABULARY),
        "worst_mass_one_less": bounds.worst_case_pruned_mass(log_min_p=LOG_MIN_P, vocabulary=2),
        "tv_context": jnp.concatenate(tv_context),
        "tv_context_formula": bounds.context_total_variation(every_mass),
        **_gradients(pi, rewards),
        **_weights(pi, infer),
    }


WORLD = World(name="pruning", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, *, world=WORLD, paper=DERIVED, **options) -> Check:
    names = " ".join(functions)
    return compare(f"pruning.{name}", statement, names, left, right, world=world, paper=paper, **options)


def _both(m: Any, name: str) -> np.ndarray:
    """Of every step of the training, without and with pruning."""
    return np.stack([m[f"{name}_full"], m[f"{name}_pruned"]], axis=1)


CHECKS = [
    _check(
        "context_total_variation",
        "TV(pi, pi_S) = 1 - Z in every context",
        ("bounds.pruning.context_total_variation",),
        lambda m: m["tv_context"],
        lambda m: m["tv_context_formula"],
        wrong=lambda m: m["tv_context_formula"] / 2,
        equality=True,
    ),
    _check(
        "sequence_total_variation",
        "TV of the sequence laws = P_pi(some token leaves) = 1 - E_{pi_S}[prod Z]",
        ("bounds.pruning.sampled_total_variation",),
        lambda m: np.stack([m["identity"], m["leaves"]], 1),
        lambda m: np.repeat(m["tv"][:, None], 2, axis=1),
        wrong_left=lambda m: np.stack([m["linear"], m["leaves"]], 1),
        equality=True,
    ),
    _check(
        "bias",
        "|J - J_S| <= span TV; the printed factor 2 is not needed",
        ("bounds.pruning.sampled_total_variation",),
        lambda m: np.maximum(m["bias"], m["indicator_bias"]),
        lambda m: m["identity"],
        wrong=lambda m: m["identity"] / 2,
        paper=PAPER,
    ),
    _check(
        "bias_attained",
        "the indicator of the responses that stay inside attains it",
        ("bounds.pruning.sampled_total_variation",),
        lambda m: m["indicator_bias"],
        lambda m: m["tv"],
        wrong_left=lambda m: m["bias"],
        equality=True,
    ),
    _check(
        "data_dependent_bias",
        "|J - J_S| <= span TV <= span E_{pi_S} sum_t (1 - Z_t)",
        ("bounds.pruning.sampled_bias_bound",),
        lambda m: np.maximum(m["bias"], m["tv"]),
        lambda m: m["linear"],
        wrong=lambda m: m["linear"] / 2,
    ),
    _check(
        "worst_case_bias",
        "|J - J_S| <= span min(1, T (1 - min Z))",
        ("bounds.pruning.worst_case_bias_bound",),
        lambda m: np.maximum(m["bias"], m["tv"]),
        lambda m: m["worst"],
        wrong=lambda m: m["worst"] / (2 * HORIZON),
        paper=PAPER,
    ),
    _check(
        "worst_case_mass",
        "1 - Z <= (V - 1) r / (1 + (V - 1) r) for min-p with threshold r",
        ("bounds.pruning.worst_case_pruned_mass",),
        lambda m: m["pruned_mass"],
        lambda m: m["worst_mass"],
        wrong=lambda m: m["worst_mass_one_less"],
    ),
    _check(
        "gradient",
        "grad J_S = E_{pi_S}[(R - b) sum_t grad log pi_S]",
        ("objectives.pruning.pruned_log_prob",),
        lambda m: m["gradient"],
        lambda m: m["gradient_exact"],
        wrong=lambda m: m["gradient_unpruned"],
        equality=True,
    ),
    _check(
        "gradient_outside",
        "the gradient is exactly 0 on pruned logits",
        ("objectives.pruning.pruned_log_prob",),
        lambda m: m["gradient_outside"],
        lambda m: np.zeros_like(m["gradient_outside"]),
        wrong_left=lambda m: m["unpruned_outside"],
        equality=True,
        tolerance=0.0,
    ),
    _check(
        "sequence_weights",
        "E_{mu_S'}[w f] = E_{pi_S}[f 1(all tokens in S')]",
        ("objectives.pruning.pruned_sequence_weights",),
        lambda m: m["weighted"],
        lambda m: m["reachable"],
        wrong=lambda m: m["all_train"],
        equality=True,
    ),
    _check(
        "missing_mass",
        "|E_{mu_S'}[w f] - E_{pi_S} f| <= max|f| P_{pi_S}(some token outside S')",
        ("objectives.pruning.pruned_sequence_weights",),
        lambda m: np.abs(m["weighted"] - m["all_train"]),
        lambda m: 2 * m["missing"],
        wrong=lambda m: 0.1 * m["missing"],
    ),
    _check(
        "token_weights",
        "E_{mu_S'}[w_1] = pi_S-mass of S' at the root",
        ("objectives.pruning.pruned_token_weights",),
        lambda m: m["token_weighted"],
        lambda m: m["token_reachable"],
        wrong=lambda m: m["token_reachable"] / 2,
        equality=True,
    ),
    _check(
        "training_log_ratio",
        "training on a noisy mu: E_mu sum_t |log ratio| <= 2 E_mu sum_t e(c_t) (1 - min(p_t, p'_t)) at every step",
        ("bounds.mismatch.two_sided_log_prob_change",),
        lambda m: m["log_ratio_full"],
        lambda m: m["log_ratio_bound_full"],
        wrong=lambda m: m["log_ratio_bound_full"] / 2,
        world=pruned_training.WORLD,
    ),
    _check(
        "training_value",
        "|J(pi) - J_S(pi)| <= P_pi(some token leaves) at every step of that training",
        ("objectives.pruning.pruned_log_prob",),
        lambda m: np.abs(m["reward_pruned"] - m["pruned_reward_pruned"]),
        lambda m: m["leaves_pruned"],
        wrong=lambda m: m["leaves_pruned"] / 2,
        world=pruned_training.WORLD,
    ),
    _check(
        "training_update",
        "|expected update - grad J_S| <= sqrt(2 T) TV(mu_S', pi_S), without and with pruning",
        ("objectives.pruning.pruned_log_prob",),
        lambda m: _both(m, "update_error"),
        lambda m: _both(m, "update_bound"),
        wrong=lambda m: _both(m, "update_bound") / 6,
        world=pruned_training.WORLD,
    ),
    _check(
        "training_corrected",
        "with sequence weights it is at most sqrt(T / 2) P_{pi_S}(some token outside S'): 0 where the sets agree",
        ("objectives.pruning.pruned_sequence_weights",),
        lambda m: _both(m, "corrected_error"),
        lambda m: _both(m, "missed"),
        wrong_left=lambda m: _both(m, "update_error"),
        world=pruned_training.WORLD,
    ),
]
