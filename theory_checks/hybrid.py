"""Imitation and reinforcement in one gradient: the dense and the sparse part (arXiv 2512.23097)."""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.objectives import hybrid
from theory_checks import token_trees as trees
from theory_checks.check import Check
from theory_checks.check import Measured
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2512.23097"
DERIVED = "derived (docs/theory.md)"
VOCABULARY, HORIZON, WEIGHT, TOP = 4, 3, 1.5, 2


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """A student, an independent teacher, and rewards."""
    scale = {"noise": np.full(count, 1.5), "share": np.ones(count), "kind": np.arange(count) % 3}
    student, teacher, rewards = trees.draw(generator, worlds=count, vocabulary=VOCABULARY, horizon=HORIZON, **scale)
    return [(student, teacher, rewards)]


def _objective(policy: Any, teacher: Any, rewards: jax.Array) -> jax.Array:
    log_law = trees.sequence_log_probs(policy)
    return jnp.sum(jnp.exp(log_law) * (log_law - trees.sequence_log_probs(teacher) - WEIGHT * rewards))


def _contexts_kl(policy: Any, teacher: Any) -> jax.Array:
    return trees.per_sequence([categorical.kl(p, q) for p, q in zip(policy, teacher, strict=True)])


def _flat(policy: Any) -> jax.Array:
    return jnp.concatenate([z.ravel() for z in policy])


def _field(
    policy: Any,
    teacher: Any,
    rewards: jax.Array,
    *,
    rao_blackwell: bool = False,
    future: bool = True,
    baseline: float = 0.0,
    discount: float = 1.0,
) -> jax.Array:
    """Expected gradient of the hybrid loss: every sequence once, weighted by its probability under the student."""
    law = jnp.exp(trees.sequence_log_probs(policy))
    log_ratio = trees.token_log_ratios(policy, teacher)
    every = jnp.ones(log_ratio.shape, bool)
    divergence = _contexts_kl(policy, teacher) if rao_blackwell else log_ratio
    coefficient = hybrid.sparse_coefficient(
        divergence if future else jnp.zeros_like(divergence),
        hybrid.terminal_rewards(rewards, every),
        every,
        discount=discount,
        reward_weight=WEIGHT,
        baseline=jnp.full(rewards.shape, baseline),
    )
    uniform = [jnp.zeros_like(z) for z in policy]

    def loss(moving):
        log_prob = trees.token_log_ratios(moving, uniform) - float(np.log(VOCABULARY))
        losses = hybrid.hybrid_losses(_contexts_kl(moving, teacher), log_prob, coefficient)
        return jnp.sum(law * jnp.sum(losses, axis=1))

    return _flat(jax.grad(loss)(policy))


def _dense_only(policy: Any, teacher: Any) -> jax.Array:
    """The gradient of E sum_t k_t with the law of the contexts held fixed."""
    law = jax.lax.stop_gradient(jnp.exp(trees.sequence_log_probs(policy)))
    return _flat(jax.grad(lambda p: jnp.sum(law * jnp.sum(_contexts_kl(p, teacher), axis=1)))(policy))


def optimum(teacher: Any, rewards: jax.Array) -> tuple[Any, jax.Array]:
    """Conditionals of pi_T exp(lambda R), depth by depth, and -log of its normaliser."""
    level = trees.sequence_log_probs(teacher) + WEIGHT * rewards
    policy = []
    for logits in reversed(teacher):
        level = level.reshape(logits.shape)
        policy.insert(0, level)
        level = jax.nn.logsumexp(level, axis=1)
    return policy, -level[0]


def descend(policy: Any, teacher: Any, rewards: jax.Array, *, future: bool, steps: int, rate: float = 5.0) -> jax.Array:
    """J after each step of descent along the field, with the future divergence in it or without."""
    point, restore = jax.flatten_util.ravel_pytree(policy)

    def step(point, _):
        moved = point - rate * _field(restore(point), teacher, rewards, future=future)
        return moved, _objective(restore(moved), teacher, rewards)

    return jax.jit(lambda start: jax.lax.scan(step, start, None, length=steps)[1])(point)


def gradient_variances(policy: Any, teacher: Any, rewards: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Total variance of the gradient from one response, with l_u and with k_u in the sparse coefficient."""
    law = jnp.exp(trees.sequence_log_probs(policy))
    log_ratio, kl = trees.token_log_ratios(policy, teacher), _contexts_kl(policy, teacher)
    every = jnp.ones(log_ratio.shape, bool)
    uniform = [jnp.zeros_like(z) for z in policy]
    scores = jax.jacrev(lambda p: trees.token_log_ratios(p, uniform))(policy)
    scores = jnp.concatenate([x.reshape(*log_ratio.shape, -1) for x in scores], axis=-1)
    dense = jax.jacrev(lambda p: jnp.sum(_contexts_kl(p, teacher), axis=1))(policy)
    dense = jnp.concatenate([x.reshape(law.size, -1) for x in dense], axis=-1)

    def variance(divergence):
        terminal = hybrid.terminal_rewards(rewards, every)
        coefficient = hybrid.sparse_coefficient(divergence, terminal, every, reward_weight=WEIGHT)
        gradient = dense + jnp.einsum("st,stp->sp", coefficient, scores)
        return jnp.sum(law @ jnp.square(gradient)) - jnp.sum(jnp.square(law @ gradient))

    return variance(log_ratio), variance(kl)


def _dense(logits: jax.Array, teacher: jax.Array) -> dict[str, jax.Array]:
    """Closed forms of the dense part at one context."""
    gradient = hybrid.dense_gradient(logits, teacher)
    p = jax.nn.softmax(logits)
    difference = categorical.log_probs(logits) - categorical.log_probs(teacher)
    k = jnp.sum(p * difference)
    index = jnp.argsort(-p)[:TOP]
    q = jnp.exp(jax.nn.log_softmax(logits[index]))
    inner = jax.nn.log_softmax(logits[index]) - jax.nn.log_softmax(teacher[index])
    inside = jnp.zeros(VOCABULARY).at[index].set(1.0)
    part = jnp.sum(inside * p * (difference + 1))

    def top_gradient(f):
        return jax.grad(lambda z: f(z, teacher, k=TOP))(logits)

    return {
        "dense": gradient,
        "dense_exact": jax.grad(lambda z: categorical.kl(z, teacher))(logits),
        "dense_forward": p - jax.nn.softmax(teacher),
        "dense_square": jnp.sum(jnp.square(gradient)),
        "dense_bound": jnp.max(jnp.square(difference - k)) * jnp.sum(p * p),
        "kl": k,
        "with_tail": hybrid.top_k_kl_with_tail(logits, teacher, k=TOP),
        "renormalised": hybrid.top_k_kl_renormalised(logits, teacher, k=TOP),
        "partial": hybrid.top_k_kl_partial(logits, teacher, k=TOP),
        "partial_gradient": top_gradient(hybrid.top_k_kl_partial),
        "partial_formula": p * (inside * (difference + 1) - part),
        "renormalised_gradient": top_gradient(hybrid.top_k_kl_renormalised),
        "renormalised_formula": jnp.zeros(VOCABULARY).at[index].set(q * (inner - jnp.sum(q * inner))),
    }


def _measure(student: Any, teacher: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    best, value = optimum(teacher, rewards)
    world = (student, teacher, rewards)
    return {
        "exact": _flat(jax.grad(_objective)(*world)),
        "field": _field(*world),
        "field_baseline": _field(*world, baseline=0.4),
        "field_rao_blackwell": _field(*world, rao_blackwell=True),
        "field_no_future": _field(*world, future=False),
        "field_discount_0": _field(student, teacher, 0 * rewards, discount=0.0),
        "dense_only": _dense_only(student, teacher),
        "exact_no_reward": _flat(jax.grad(_objective)(student, teacher, 0 * rewards)),
        "value": _objective(*world),
        "optimum": value,
        "value_at_optimum": _objective(best, teacher, rewards),
        "value_at_teacher": _objective(teacher, teacher, rewards),
        "field_at_optimum": _field(best, teacher, rewards),
        "at_teacher": jnp.stack([_field(teacher, teacher, 0 * rewards, discount=g) for g in (0.0, 1.0)]),
        "at_teacher_with_reward": jnp.stack([_field(teacher, teacher, rewards, discount=g) for g in (0.0, 1.0)]),
        "no_future_at_optimum": _field(best, teacher, rewards, future=False),
        **_dense(student[0][0], teacher[0][0]),
    }


WORLD = World(name="hybrid", draw=_draw, measure=_measure)
SMALL, STEP = 2, 1e-4
"""Vocabulary and horizon of the trees whose Jacobian is taken, and the step of its differences."""


def _draw_small(generator: np.random.Generator, count: int) -> list[Any]:
    some = max(count // 4, 20)
    scale = {"noise": np.full(some, 1.5), "share": np.ones(some), "kind": np.zeros(some, int)}
    return [trees.draw(generator, worlds=some, vocabulary=SMALL, horizon=SMALL, **scale)]


def _measure_small(student: Any, teacher: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    """Jacobians of the field by differences: automatic ones would stop where the loss stops its gradient."""
    point, restore = jax.flatten_util.ravel_pytree(student)

    def along(move, discount):
        ahead, behind = (_field(restore(point + s * move), teacher, rewards, discount=discount) for s in (1, -1))
        return (ahead - behind) / (2 * STEP)

    moves = STEP * jnp.eye(point.size)
    return {f"jacobian_{g}": jax.vmap(lambda move, g=g: along(move, g))(moves) for g in (0.0, 0.5, 1.0)}


SMALL_WORLD = World(name="hybrid_jacobian", draw=_draw_small, measure=_measure_small)


def _by_hand(m: Measured) -> np.ndarray:
    # p = (.6, .4), p_T = (.5, .5)
    gradient = hybrid.dense_gradient(jnp.log(jnp.array([0.6, 0.4])), jnp.zeros(2))
    return np.tile(np.asarray(gradient), (m["kl"].size, 1))


def _check(name, statement, function, left, right, *, world=WORLD, paper=DERIVED, **options) -> Check:
    names = " ".join(f"objectives.hybrid.{part}" for part in function.split())
    return compare(f"hybrid.{name}", statement, names, left, right, world=world, paper=paper, **options)


CHECKS = [
    _check(
        "decomposition",
        "grad J = E sum_t [grad k_t + G_t grad log pi], G_t = sum_{u>t} l_u - lambda (R - b)",
        "sparse_coefficient hybrid_losses terminal_rewards",
        lambda m: m["field"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["field_no_future"],
        paper=PAPER,
        equality=True,
    ),
    _check(
        "baseline",
        "a constant baseline does not change the expected gradient",
        "sparse_coefficient",
        lambda m: m["field_baseline"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["field_no_future"],
        equality=True,
    ),
    _check(
        "rao_blackwell",
        "k_u in place of l_u in G_t: the same expectation",
        "sparse_coefficient",
        lambda m: m["field_rao_blackwell"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["field_no_future"],
        equality=True,
    ),
    _check(
        "discount_zero",
        "discount 0 without reward is the dense part alone: token-level on-policy distillation",
        "sparse_coefficient",
        lambda m: m["field_discount_0"],
        lambda m: m["dense_only"],
        wrong_left=lambda m: m["exact_no_reward"],
        equality=True,
    ),
    _check(
        "optimum_value",
        "J at pi_T exp(lambda R) = -log E_{pi_T} exp(lambda R)",
        "hybrid_losses",
        lambda m: m["value_at_optimum"],
        lambda m: m["optimum"],
        wrong_left=lambda m: m["value_at_teacher"],
        equality=True,
    ),
    _check(
        "optimum_is_least",
        "-J(pi) <= log E_{pi_T} exp(lambda R), attained; lambda E_{pi_T} R is too small",
        "hybrid_losses",
        lambda m: -np.stack([m["value"], m["value_at_optimum"]], 1),
        lambda m: -np.stack([m["optimum"], m["optimum"]], 1),
        wrong=lambda m: -np.stack([m["value_at_teacher"], m["value_at_teacher"]], 1),
    ),
    _check(
        "optimum_stationary",
        "the field vanishes at pi_T exp(lambda R); without the future divergence it does not",
        "sparse_coefficient hybrid_losses",
        lambda m: m["field_at_optimum"],
        lambda m: np.zeros_like(m["field_at_optimum"]),
        wrong_left=lambda m: m["no_future_at_optimum"],
        equality=True,
    ),
    _check(
        "teacher_is_stationary",
        "without reward the field vanishes at pi_T, at discount 0 and 1; with one it does not",
        "sparse_coefficient hybrid_losses",
        lambda m: m["at_teacher"],
        lambda m: np.zeros_like(m["at_teacher"]),
        wrong_left=lambda m: m["at_teacher_with_reward"],
        equality=True,
    ),
    _check(
        "gradient_field",
        "at discount 1 the Jacobian of the field is symmetric; at 0 and 1/2 it is not, so it is no gradient",
        "sparse_coefficient hybrid_losses",
        lambda m: m["jacobian_1.0"],
        lambda m: np.swapaxes(m["jacobian_1.0"], 1, 2),
        wrong_left=lambda m: m["jacobian_0.5"] + m["jacobian_0.0"],
        wrong=lambda m: np.swapaxes(m["jacobian_0.5"] + m["jacobian_0.0"], 1, 2),
        world=SMALL_WORLD,
        equality=True,
        # Central differences of step 1e-4.
        tolerance=1e-6,
    ),
    _check(
        "fixture",
        "p = (.6, .4), p_T = (.5, .5): dk/dz = (.0973116, -.0973116)",
        "dense_gradient",
        _by_hand,
        lambda m: np.tile([0.0973116, -0.0973116], (m["kl"].size, 1)),
        wrong=lambda m: np.tile([0.1, -0.1], (m["kl"].size, 1)),
        equality=True,
        tolerance=1e-7,
    ),
    _check(
        "dense_gradient",
        "dk/dz = p (l - k)",
        "dense_gradient",
        lambda m: m["dense"],
        lambda m: m["dense_exact"],
        wrong_left=lambda m: m["dense_forward"],
        equality=True,
    ),
    _check(
        "dense_norm",
        "|dk/dz|^2 <= max_v |l_v - k|^2 C(p)",
        "dense_gradient",
        lambda m: m["dense_square"],
        lambda m: m["dense_bound"],
        wrong=lambda m: m["dense_bound"] / 4,
    ),
    _check(
        "top_k_with_tail",
        "KL with one tail bucket <= KL; the part on the top k alone is no lower bound",
        "top_k_kl_with_tail",
        lambda m: m["with_tail"],
        lambda m: m["kl"],
        wrong_left=lambda m: np.maximum(m["partial"], m["renormalised"]),
    ),
    _check(
        "top_k_partial_gradient",
        "grad sum_S p l = p (1[v in S](l_v + 1) - sum_S p (l + 1))",
        "top_k_kl_partial",
        lambda m: m["partial_gradient"],
        lambda m: m["partial_formula"],
        wrong=lambda m: -m["partial_formula"],
        equality=True,
    ),
    _check(
        "top_k_renormalised_gradient",
        "grad KL(q || q_T) on the top k = q (l_q - KL), 0 elsewhere",
        "top_k_kl_renormalised",
        lambda m: m["renormalised_gradient"],
        lambda m: m["renormalised_formula"],
        wrong=lambda m: m["partial_formula"],
        equality=True,
    ),
]
