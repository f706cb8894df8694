"""Checks of gradients: on-policy the loss must follow the policy gradient, and nothing else may move the policy.

With z the logits of a context, p their softmax and a the sampled token, -A grad_z log p_a = A (p - e_a). The checks
read the coefficient of each token off the gradient with respect to the logits.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.testing.batch import CONSTANT_FIELDS
from jaxrl_llm.testing.batch import Batch
from jaxrl_llm.testing.batch import on_policy
from jaxrl_llm.testing.batch import with_policies
from jaxrl_llm.testing.case import Case
from jaxrl_llm.testing.case import NotApplicable
from jaxrl_llm.testing.case import number
from jaxrl_llm.testing.promises import AGGREGATIONS


def _coefficients(batch: Batch, gradient: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficient of -grad log p_a in the gradient of each token, and the largest part that is not along it."""
    direction = np.asarray(jax.nn.softmax(batch.logits, axis=-1), np.float64)
    rows, columns = np.indices(batch.tokens.shape)
    direction[rows, columns, np.asarray(batch.tokens)] -= 1
    coefficient = (gradient * direction).sum(-1) / (direction * direction).sum(-1)
    return coefficient, float(np.max(np.abs(gradient - coefficient[..., None] * direction)))


def _weights(mask: np.ndarray, aggregation: str) -> np.ndarray:
    """Weight of each response token under one of the named rules; the constant of "-norm" is left out."""
    lengths, tokens = mask.sum(1, keepdims=True), mask.sum()
    sequences = (lengths > 0).sum()
    weight = {
        "token-mean": np.full(mask.shape, 1.0 / tokens),
        "token-sum": np.ones(mask.shape),
        "seq-mean-token-sum": np.full(mask.shape, 1.0 / sequences),
        "seq-mean-token-sum-norm": np.full(mask.shape, 1.0 / sequences),
        "seq-mean-token-mean": 1.0 / (sequences * np.maximum(lengths, 1)) * np.ones(mask.shape),
    }[aggregation]
    return np.where(mask, weight, 0.0)


def _without_scale(case: Case, weight: np.ndarray, aggregation: str) -> np.ndarray:
    """Weights up to the factors that the promises leave open: the scale of a group's advantages, a constant length."""
    if case.promises.given and aggregation != "seq-mean-token-sum-norm":
        return weight
    ids = np.asarray(case.batch.group_ids)
    if case.promises.advantages != "group":
        ids = np.zeros_like(ids)
    out = np.empty_like(weight)
    for own in np.unique(ids):
        part = weight[ids == own]
        out[ids == own] = part / max(np.abs(part).mean(), 1e-30)
    return out


def on_policy_gradient(case: Case) -> Iterator[str]:
    """With old = behaviour = pi every ratio is 1, and the gradient is sum_t w_t A_t (-grad log pi)."""
    batch = on_policy(case.batch)
    gradient = case.policy_gradient(batch)
    mask, advantages = np.asarray(batch.response_mask), case.signs(batch)
    coefficient, rest = _coefficients(batch, gradient)
    size = float(np.max(np.abs(coefficient)))
    if size == 0 or not np.isfinite(size):
        yield f"On-policy the gradient that the advantages cause is {size}: the ratio of pi to itself stops it."
        return
    if rest > 20 * case.tolerance * size:
        yield (
            "On-policy the gradient is not along grad log pi of the sampled tokens: its other part is "
            f"{number(rest / size)} of it."
        )
    seen = np.where(mask, coefficient / advantages, 0.0)
    for aggregation in AGGREGATIONS if case.promises.aggregation is None else (case.promises.aggregation,):
        expected = _without_scale(case, _weights(mask, aggregation), aggregation)
        scaled = _without_scale(case, seen, aggregation)
        if np.max(np.abs(scaled - expected)) <= 20 * case.tolerance * np.max(expected):
            case.found["token_weights"] = aggregation
            return
    yield from _describe_weights(case, mask, seen)


def _describe_weights(case: Case, mask: np.ndarray, seen: np.ndarray) -> Iterator[str]:
    if np.all(seen[mask] < 0):
        yield "On-policy the gradient has the wrong sign: the loss pushes down what has a positive advantage."
        return
    # Up to the scale that the promises leave open, which would hide nothing within a group.
    seen = _without_scale(case, seen, AGGREGATIONS[0])
    spread = [(np.ptp(w[m]), i) for i, (w, m) in enumerate(zip(seen, mask, strict=True))]
    worst, row = max(spread)
    if worst > 20 * case.tolerance * np.max(np.abs(seen)) and case.promises.advantages != "token":
        low, high = seen[row][mask[row]].min(), seen[row][mask[row]].max()
        yield (
            "On-policy, tokens of one sequence have different weights on their advantage, from "
            f"{number(low)} to {number(high)}: ratios, or something else, are not 1."
        )
        return
    lengths = mask.sum(1)
    by_length = ", ".join(
        f"{number(seen[np.flatnonzero(lengths == n)[0]].sum() / n)} at length {n}" for n in sorted(set(lengths))
    )
    name = case.promises.aggregation
    promised = f"not those of {name!r}" if name else "those of no aggregation that has a name"
    yield (
        f"On-policy the gradient is that of -A log pi with token weights that are {promised}: {by_length}. "
        f"Either the sum is divided by something else, or the advantages are not those of {case.promises.advantages!r}."
    )


def no_advantage(case: Case) -> Iterator[str]:
    """With zero advantages (equal rewards) and ref = pi there is nothing to learn, so the gradient is zero."""
    if case.promises.regularised:
        raise NotApplicable("the loss promises a regulariser that acts without advantages")
    outcome = case.run(case.without_advantages(on_policy(case.batch)))
    size = float(np.max(np.abs(outcome.gradient)))
    if not size <= case.tolerance * max(case.scale, 1e-30):
        what = "zero advantages" if case.promises.given else "equal rewards"
        hint = (
            "a KL term with a gradient where pi = ref (k1 as a loss has one), or an entropy bonus; pass "
            "regularised=True if it is meant"
        )
        if not case.promises.given:
            hint += "; or a rounding of the mean divided by a standard deviation of nearly 0"
        yield f"With {what} and pi = ref the gradient is {number(size)} and not 0: {hint}."


def sign(case: Case) -> Iterator[str]:
    """Also off-policy, raising the log-prob of a token with positive advantage never raises the loss."""
    gradient = case.policy_gradient(case.batch)
    coefficient, _ = _coefficients(case.batch, gradient)
    mask, advantages = np.asarray(case.batch.response_mask), case.signs(case.batch)
    wrong = mask & (coefficient * np.sign(advantages) < -20 * case.tolerance * np.max(np.abs(coefficient)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        direction = "raises" if advantages[row, column] > 0 else "lowers"
        yield (
            f"Raising the log-prob of token {column} of sequence {row}, whose advantage is "
            f"{number(advantages[row, column])}, {direction} the loss; so do {int(wrong.sum())} of {int(mask.sum())} "
            "tokens."
        )


def advantage_scaling(case: Case) -> Iterator[str]:
    """Advantages of twice the size cause twice the loss; rewards count relative to each other only."""
    batch, nothing = case.batch, case.run(case.without_advantages(case.batch)).value
    if case.promises.given:
        double = case.run(batch._replace(advantages=2 * batch.advantages)).value - nothing
        expected = 2 * (case.base.value - nothing)
        if case.differ(double, expected):
            yield (
                f"Doubling the advantages changes the loss they cause from {number(case.base.value - nothing)} to "
                f"{number(double)} instead of {number(expected)}: the advantages do not enter linearly."
            )
        return
    ids = np.asarray(batch.group_ids)
    shift = np.where(ids == ids[0], 0.5, -0.25) if case.promises.advantages == "group" else np.full(ids.shape, 0.5)
    moved = case.run(batch._replace(rewards=batch.rewards + jnp.asarray(shift, batch.rewards.dtype)))
    if case.differ(moved.gradient, case.base.gradient, factor=10):
        among = "a group" if case.promises.advantages == "group" else "the batch"
        change = number(np.max(np.abs(moved.gradient - case.base.gradient)))
        yield (
            f"Adding a constant to all rewards of {among} changes the gradient, by up to {change}: the rewards are not "
            f"compared within {among}."
        )


def stop_gradient(case: Case) -> Iterator[str]:
    """Old, behaviour and reference policies, advantages and rewards are constants to the gradient."""
    for name in CONSTANT_FIELDS:
        if np.any(case.base.fields[name] != 0):
            yield (
                f"A gradient flows into {name}: wrap it in jax.lax.stop_gradient, so that passing an array that "
                "depends on the parameters cannot cancel the gradient."
            )


def constant_count(case: Case) -> Iterator[str]:
    """The count of (sum, count) does not depend on the policy differentiably."""
    if np.any(case.base.count_gradient != 0):
        yield (
            "A gradient flows into the count: adding the counts of micro-batches and dividing once then gives another "
            "gradient than the batch; make it a constant."
        )


def logit_shift(case: Case) -> Iterator[str]:
    """A constant added to all logits of a context is the same policy."""
    batch = case.batch
    policies = (batch.logits, batch.logits_old, batch.logits_behaviour, batch.logits_ref)
    moved = case.run(with_policies(batch, *(z - 100 for z in policies)))
    if case.differ(moved.value, case.base.value, factor=10) or case.differ(
        moved.gradient, case.base.gradient, factor=30
    ):
        yield (
            f"The loss is {number(case.base.value)}, and {number(moved.value)} or with another gradient when 100 is "
            "subtracted from all logits, which is the same policy: logits are compared with an absolute number."
        )


def precision(case: Case) -> Iterator[str]:
    """float32 gives what float64 gives, and the loss follows small steps of the policy smoothly."""
    batch = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, case.batch)
    # Steps far above the spacing of float32 and below that of 16-bit types, whose rounding shows as jumps.
    narrow, (wide, losses) = case.run(batch), case.run.in_float64(batch, step=4e-4, steps=21)
    size = max(float(np.max(np.abs(wide.gradient))), 1e-30)
    error = float(np.max(np.abs(narrow.gradient - wide.gradient))) / size
    value_error = abs(float(narrow.value) - float(wide.value)) / max(size, abs(float(wide.value)))
    if not max(error, value_error) < 2e-4:
        yield (
            f"In float32 the gradient is off by {number(error)} and the loss by {number(value_error)} of their size "
            "against float64, a thousand times the rounding of float32: something inside has a narrower type."
        )
        return
    changes = np.diff(losses)
    roughness = float(np.median(np.abs(np.diff(changes))) / max(np.median(np.abs(changes)), 1e-30))
    if roughness > 0.03:
        yield (
            "Along equal steps of 0.0004 in the logits the change of the loss itself changes by "
            f"{number(100 * roughness)} % from step to step: it moves in jumps, something inside has a narrower type "
            "than float32."
        )
