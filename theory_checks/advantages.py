"""Which gradient an advantage has in expectation: every batch of a small group is enumerated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import advantages
from theory_checks import token_trees as trees
from theory_checks.check import Measured
from theory_checks.check import World
from theory_checks.check import compare

DERIVED = "derived (docs/theory.md)"
GAE = "arXiv 1506.02438"
VOCABULARY, HORIZON, GROUP = 2, 2, 3
SEQUENCES = VOCABULARY**HORIZON
PROMPTS = jnp.array([0, 0, 1])
"""Group ids of a batch of two prompts, one of which has a group of one."""


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """A policy, the rewards of its responses to two prompts, a guess of the value of each context, and one row."""
    policy = [jnp.asarray(generator.normal(size=(count, VOCABULARY**t, VOCABULARY))) for t in range(HORIZON)]
    rewards = generator.random((count, 2, SEQUENCES))
    rewards[::3] = rewards[::3] > 0.5  # equal rewards happen
    values = [jnp.asarray(generator.normal(size=(count, VOCABULARY**t))) for t in range(HORIZON)]
    row = generator.normal(size=(count, 2, 6)), generator.random((count, 6)) < 0.7
    return [(policy, jnp.asarray(rewards), values, jnp.asarray(row[0]), jnp.asarray(row[1]))]


def _scores(policy: Any) -> jax.Array:
    """[sequences, T, parameters]: gradient of the log-probability of each token of each sequence."""
    uniform = [jnp.zeros_like(z) for z in policy]
    slopes = jax.jacrev(lambda p: trees.token_log_ratios(p, uniform))(policy)
    return jnp.concatenate([x.reshape(SEQUENCES, HORIZON, -1) for x in slopes], axis=-1)


def _gradient(policy: Any, rewards: jax.Array) -> jax.Array:
    """grad J, exactly."""
    slope = jax.grad(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(p)) * rewards))(policy)
    return jnp.concatenate([x.ravel() for x in slope])


def _expected_estimate(law: jax.Array, scores: jax.Array, rewards: jax.Array, rule: Any) -> jax.Array:
    """E[(1/G) sum_i A_i grad log P(y_i)] over all batches of one response per row of `rewards`."""
    size = rewards.shape[0]
    draws = jnp.asarray(np.indices((SEQUENCES,) * size).reshape(size, -1).T)
    given = jax.vmap(lambda draw: rule(rewards[jnp.arange(size), draw]))(draws)
    weight = jnp.prod(law[draws], axis=1)
    per_sequence = jnp.zeros(SEQUENCES).at[draws].add(weight[:, None] * given / size)
    return per_sequence @ scores.sum(axis=1)


def _of_group(law: jax.Array, scores: jax.Array, rewards: jax.Array, exact: jax.Array) -> dict[str, jax.Array]:
    one = jnp.zeros(GROUP, jnp.int32)
    same = jnp.broadcast_to(rewards[0], (GROUP, SEQUENCES))
    mixed = rewards[PROMPTS]
    expected = functools.partial(_expected_estimate, law, scores)
    means = jnp.sum(law[None, :] * jnp.sign(rewards[0][:, None] - rewards[0][None, :]), axis=1)
    pairs = expected(same[:2], lambda r: advantages.group_normalised(r, one[:2], ddof=0))
    informative = advantages.informative_groups(rewards[0], jnp.array([0, 0, 1, 1]))
    normalised = advantages.group_normalised(rewards[0], jnp.array([0, 0, 1, 1]))
    return {
        "leave_one_out": expected(same, lambda r: advantages.leave_one_out(r, one)),
        "group_centred": expected(same, lambda r: advantages.group_centred(r, one)),
        "shrunk": exact[0] * (GROUP - 1) / GROUP,
        "batch_centred": expected(mixed, advantages.batch_centred),
        "batch_shrunk": (2 * exact[0] + exact[1]) / 3 * (1 - 1 / GROUP),
        "batch_unshrunk": (2 * exact[0] + exact[1]) / 3,
        "pairs": pairs,
        "rival": (law * means) @ scores.sum(axis=1),
        "scaled": advantages.group_normalised(3 * rewards[0] - 1, jnp.zeros(SEQUENCES, jnp.int32)),
        "unscaled": advantages.group_normalised(rewards[0], jnp.zeros(SEQUENCES, jnp.int32)),
        "scaled_centred": advantages.group_centred(3 * rewards[0] - 1, jnp.zeros(SEQUENCES, jnp.int32)),
        "uninformative": jnp.where(informative, 0.0, normalised),
        "informative": jnp.where(informative, normalised, 1.0),
        "batch_square": jnp.mean(jnp.square(advantages.batch_normalised(rewards[0], ddof=0))),
        "both_square": jnp.mean(
            jnp.square(advantages.group_centred_batch_normalised(rewards[0], jnp.array([0, 0, 1, 1]), ddof=0))
        ),
        "equal": jnp.all(rewards[0] == rewards[0][0]),
        "equal_groups": jnp.all(rewards[0][::2] == rewards[0][1::2]),
    }


def _of_gae(policy: Any, rewards: jax.Array, values: Any) -> dict[str, jax.Array]:
    law, scores = jnp.exp(trees.sequence_log_probs(policy)), _scores(policy)
    terminal = jnp.zeros((SEQUENCES, HORIZON)).at[:, -1].set(rewards)
    every = jnp.ones(terminal.shape, bool)
    true, after = [], rewards
    for logits in reversed(policy):
        after = jnp.sum(jax.nn.softmax(logits) * after.reshape(logits.shape), axis=1)
        true.insert(0, after)

    def estimate(value, trace):
        gains = advantages.generalised_advantage_estimation(terminal, trees.per_sequence(value), every, trace=trace)[0]
        return jnp.einsum("s,st,stp->p", law, gains, scores)

    return {
        "gae_any_value": estimate(values, 1.0),
        "gae_true_value": estimate(true, 0.5),
        "gae_guess": estimate(values, 0.5),
    }


def _of_row(row: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The recursion on one row with holes, against sums over the row without them."""
    discount, trace = 0.9, 0.7
    rewards, values = row

    def gae(trace):
        pair = advantages.generalised_advantage_estimation(
            rewards[None], values[None], mask[None], discount=discount, trace=trace
        )
        return pair[0][0], pair[1][0]

    place = jnp.cumsum(mask) - 1
    later = mask[None, :] & (place[None, :] >= place[:, None])
    steps = jnp.where(later, place[None, :] - place[:, None], 0).astype(rewards.dtype)
    following = mask[None, :] & (place[None, :] == place[:, None] + 1)
    delta = rewards + discount * jnp.sum(jnp.where(following, values[None, :], 0.0), axis=1) - values
    sums = jnp.sum(jnp.where(later, (discount * trace) ** steps * delta[None, :], 0.0), axis=1)
    returns = jnp.sum(jnp.where(later, discount**steps * rewards[None, :], 0.0), axis=1)
    return {
        "gae": gae(trace)[0],
        "gae_sums": jnp.where(mask, sums, 0.0),
        "gae_returns": gae(1.0)[1],
        "returns": jnp.where(mask, returns, 0.0),
        "gae_one_step": gae(0.0)[0],
        "deltas": jnp.where(mask, delta, 0.0),
    }


def _measure(policy: Any, rewards: jax.Array, values: Any, row: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    law = jnp.exp(trees.sequence_log_probs(policy))
    exact = jnp.stack([_gradient(policy, r) for r in rewards])
    return {
        "exact": exact[0],
        **_of_group(law, _scores(policy), rewards, exact),
        **_of_gae(policy, rewards[0], values),
        **_of_row(row, mask),
    }


WORLD = World(name="advantages", draw=_draw, measure=_measure)


def _check(name, statement, functions, left, right, *, paper=DERIVED, equality=True, **options):
    names = " ".join(f"objectives.advantages.{function}" for function in functions.split())
    return compare(
        f"advantages.{name}", statement, names, left, right, world=WORLD, paper=paper, equality=equality, **options
    )


def _squares(m: Measured) -> np.ndarray:
    return np.stack([m["batch_square"], m["both_square"]], 1)


CHECKS = [
    _check(
        "leave_one_out",
        "E over all batches of (1/G) sum_i A_i grad log P(y_i) = grad J",
        "leave_one_out",
        lambda m: m["leave_one_out"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["group_centred"],
        paper="arXiv 2402.14740",
    ),
    _check(
        "group_centred",
        "with its own reward in the mean: (G - 1)/G grad J",
        "group_centred",
        lambda m: m["group_centred"],
        lambda m: m["shrunk"],
        wrong=lambda m: m["exact"],
    ),
    _check(
        "batch_centred",
        "the mean of a batch of several prompts: (B - 1)/B of the mean gradient",
        "batch_centred",
        lambda m: m["batch_centred"],
        lambda m: m["batch_shrunk"],
        wrong=lambda m: m["batch_unshrunk"],
    ),
    _check(
        "normalised_pairs",
        "groups of two over their deviation: grad of E sign(R(y) - R(y')), the rival y' held fixed; not grad J",
        "group_normalised",
        lambda m: m["pairs"],
        lambda m: m["rival"],
        wrong=lambda m: m["exact"],
    ),
    _check(
        "normalised_scale_free",
        "(R - mean)/std is the same for 3 R - 1",
        "group_normalised",
        lambda m: m["scaled"],
        lambda m: m["unscaled"],
        wrong_left=lambda m: m["scaled_centred"],
    ),
    _check(
        "uninformative",
        "a group of equal rewards has advantages of exactly 0",
        "informative_groups group_normalised",
        lambda m: m["uninformative"],
        lambda m: np.zeros_like(m["uninformative"]),
        wrong_left=lambda m: m["informative"],
    ),
    _check(
        "batch_normalised",
        "mean square 1 over the batch, with the mean of the batch or of the group, unless all are equal",
        "batch_normalised group_centred_batch_normalised",
        _squares,
        lambda m: 1.0 - np.stack([m["equal"], m["equal_groups"]], 1),
        wrong_left=lambda m: _squares(m) * (SEQUENCES - 1) / SEQUENCES,
    ),
    _check(
        "gae_sum",
        "A_t = sum_k (discount trace)^k delta_{t+k} over the response tokens, holes skipped",
        "generalised_advantage_estimation",
        lambda m: m["gae"],
        lambda m: m["gae_sums"],
        wrong=lambda m: m["deltas"],
        paper=GAE,
    ),
    _check(
        "gae_trace_one",
        "trace 1: A_t + V_t is the discounted return, the values telescope",
        "generalised_advantage_estimation",
        lambda m: m["gae_returns"],
        lambda m: m["returns"],
        wrong_left=lambda m: m["gae"],
        paper=GAE,
    ),
    _check(
        "gae_trace_zero",
        "trace 0: A_t is one temporal difference",
        "generalised_advantage_estimation",
        lambda m: m["gae_one_step"],
        lambda m: m["deltas"],
        wrong_left=lambda m: m["gae"],
        paper=GAE,
    ),
    _check(
        "gae_any_value",
        "trace 1: E sum_t A_t grad log pi_t = grad J for any value function; trace 0.5 needs the true one",
        "generalised_advantage_estimation",
        lambda m: m["gae_any_value"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["gae_guess"],
        paper=GAE,
    ),
    _check(
        "gae_true_value",
        "trace 0.5: E sum_t A_t grad log pi_t = grad J with the value function of the policy",
        "generalised_advantage_estimation",
        lambda m: m["gae_true_value"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["gae_guess"],
        paper=GAE,
    ),
]
