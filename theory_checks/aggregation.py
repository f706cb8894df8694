"""From per-token losses to one number: what sums and counts of micro-batches combine to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import aggregation
from theory_checks.check import Check
from theory_checks.check import Measured
from theory_checks.check import Sides
from theory_checks.check import World
from theory_checks.check import compare

DERIVED = "derived (docs/theory.md)"
BATCH, LENGTH, SPLIT, LONGEST = 6, 5, 2, 8.0
SOURCES = {
    "token-mean": "arXiv 2503.14476",
    "token-sum": DERIVED,
    "seq-mean-token-sum": "arXiv 2402.14740",
    "seq-mean-token-sum-norm": "arXiv 2503.20783",
    "seq-mean-token-mean": "arXiv 2402.03300",
}


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Ragged batches, some rows empty, and which sequences a mask accepts."""
    lengths = generator.integers(0, LENGTH + 1, size=(count, BATCH))
    lengths[:, 0] = LENGTH
    mask = np.arange(LENGTH)[None, None, :] < lengths[:, :, None]
    accepted = generator.random((count, BATCH)) < 0.6
    accepted[:, 0] = True
    return [tuple(jnp.asarray(x) for x in (generator.normal(size=mask.shape), mask, accepted))]


def _measure(losses: jax.Array, mask: jax.Array, accepted: jax.Array) -> dict[str, jax.Array]:
    measured = {}
    for mode in aggregation.AGGREGATIONS:
        rule = {"mode": mode, "length_normaliser": LONGEST}
        whole = aggregation.aggregate(losses, mask, **rule)
        parts = []
        for rows in (slice(0, SPLIT), slice(SPLIT, BATCH)):
            share = (rows.stop - rows.start) / BATCH
            parts.append(aggregation.aggregate(losses[rows], mask[rows], **rule, batch_fraction=share))
        total, count = (jnp.asarray(x) + y for x, y in zip(*parts, strict=True))
        means = [x / jnp.maximum(y, 1.0 if mode != "token-sum" else y) for x, y in parts]
        weights, weight_count = aggregation.token_weights(mask, **rule)
        kept = aggregation.aggregate_accepted(losses, mask, accepted, **rule)
        alone = aggregation.aggregate(losses, mask & accepted[:, None], **rule)
        zeroed = aggregation.aggregate(jnp.where(accepted[:, None], losses, 0.0), mask, **rule)
        measured |= {
            f"whole {mode}": whole[0] / whole[1],
            f"parts {mode}": total / count,
            f"means {mode}": (means[0] + means[1]) / 2,
            f"weighted {mode}": jnp.sum(weights * losses) / weight_count,
            f"accepted {mode}": kept[0] / kept[1],
            f"alone {mode}": alone[0] / alone[1],
            f"zeroed {mode}": zeroed[0] / zeroed[1],
        }
    every = jnp.ones_like(mask)
    token, sequence = (aggregation.aggregate(losses, every, mode=m) for m in ("token-mean", "seq-mean-token-mean"))
    norm = aggregation.aggregate(losses, mask, mode="seq-mean-token-sum-norm", length_normaliser=LONGEST)
    return {
        **measured,
        "equal_lengths_token": token[0] / token[1],
        "equal_lengths_sequence": sequence[0] / sequence[1],
        "norm": norm[0] / norm[1] * LONGEST,
    }


WORLD = World(name="aggregation", draw=_draw, measure=_measure)


def _pair(m: Measured, *, left: str, right: str) -> Sides:
    return Sides(m[left], m[right])


def _of_mode(mode: str) -> Check:
    name = mode.replace("-", "_")
    # A sum is the same however it is cut; what it must not be is a mean.
    wrong = ("means", "whole") if mode != "token-sum" else ("parts", "means")
    return Check(
        name=f"aggregation.{name}",
        paper=SOURCES[mode],
        statement=f"{mode}: sums and counts of two micro-batches add to those of the batch; means of means do not",
        functions=(f"objectives.aggregation.{name}", "objectives.aggregation.aggregate"),
        world=WORLD,
        sides=functools.partial(_pair, left=f"parts {mode}", right=f"whole {mode}"),
        wrong=functools.partial(_pair, left=f"{wrong[0]} {mode}", right=f"{wrong[1]} {mode}"),
        equality=True,
    )


def _all_modes(m: Measured, what: str) -> np.ndarray:
    return np.stack([m[f"{what} {mode}"] for mode in aggregation.AGGREGATIONS], 1)


def _check(name, statement, functions, left, right, **options):
    names = " ".join(f"objectives.aggregation.{function}" for function in functions.split())
    options = {"world": WORLD, "paper": DERIVED, "equality": True, **options}
    return compare(f"aggregation.{name}", statement, names, left, right, **options)


CHECKS = [
    *(_of_mode(mode) for mode in aggregation.AGGREGATIONS),
    _check(
        "token_weights",
        "every rule is sum_t w_t loss_t / n with the weights of token_weights; those of another rule differ",
        "token_weights",
        lambda m: _all_modes(m, "weighted"),
        lambda m: _all_modes(m, "whole"),
        wrong_left=lambda m: np.roll(_all_modes(m, "weighted"), 1, axis=1),
    ),
    _check(
        "accepted",
        "erratum F2.13: dividing by the accepted is the rule on the accepted alone, not with rejected losses 0",
        "aggregate_accepted",
        lambda m: _all_modes(m, "accepted"),
        lambda m: _all_modes(m, "alone"),
        wrong=lambda m: _all_modes(m, "zeroed"),
    ),
    _check(
        "equal_lengths",
        "token-mean and seq-mean-token-mean agree on responses of one length, and only there",
        "token_mean seq_mean_token_mean",
        lambda m: m["equal_lengths_token"],
        lambda m: m["equal_lengths_sequence"],
        wrong_left=lambda m: m["whole token-mean"],
        wrong=lambda m: m["whole seq-mean-token-mean"],
    ),
    _check(
        "constant_length",
        "seq-mean-token-sum-norm is seq-mean-token-sum over a constant",
        "seq_mean_token_sum_norm seq_mean_token_sum",
        lambda m: m["norm"],
        lambda m: m["whole seq-mean-token-sum"],
        wrong=lambda m: m["whole seq-mean-token-mean"],
    ),
]
