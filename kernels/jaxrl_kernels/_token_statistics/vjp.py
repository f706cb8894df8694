"""The custom VJP that all streaming implementations share: each brings a forward and a backward pass."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool

from jaxrl_kernels._token_statistics import across_devices
from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import conclude
from jaxrl_kernels._token_statistics.closed_form import finite_rows
from jaxrl_kernels._token_statistics.closed_form import usable
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.types import WITH_REFERENCE
from jaxrl_kernels._token_statistics.types import TokenStatistics


class Plan(NamedTuple):
    """Static choices of one call; hashable."""

    layout: Layout
    wanted: tuple[str, ...]
    soft_cap: float | None = None
    top_k: int | None = None
    mesh_axis: str | None = None  # of a surrounding shard_map, over which the vocabulary is split


class Engine(NamedTuple):
    """How one implementation sweeps the vocabulary.

    columns: (op, block argument or None, rows, width, vocabulary, dtypes) -> Layout.size; raises on what it cannot do.
    summary: (plan, logits, targets, wanted, floor or None) -> Summary.
    total_variation: (plan, logits, constants) -> Variation.
    backward: (plan, logits, targets, constants, cotangent by name, head_gradient=) -> cotangents of hidden and head;
        None for the head where head_gradient is False.
    """

    columns: Callable[..., int]
    summary: Callable[..., Summary]
    total_variation: Callable[..., Variation]
    backward: Callable[..., tuple[Array, Array | None]]


def live_rows(constants: Constants, cotangent: dict[str, Array]) -> Bool[Array, " N"]:
    """Finite rows with a cotangent that is not zero. The others are out of the gradient, whatever they hold."""
    return finite_rows(constants) & jnp.any(jnp.stack([value != 0 for value in cotangent.values()]), axis=0)


def without_idle_reference(logits: Logits, cotangent: dict[str, Array]) -> Logits:
    """The logits without a reference that no cotangent needs."""
    alone = logits._replace(reference=None)
    return alone if not set(cotangent) & set(WITH_REFERENCE) and alone.dtype == logits.dtype else logits


def forward(
    engine: Engine, plan: Plan, logits: Logits, targets: Array, log_min_p: Array | None
) -> tuple[TokenStatistics, Constants]:
    """Statistics and the constants that the backward pass needs."""
    axis, floor, whole = plan.mesh_axis, None, None
    vocabulary = across_devices.whole_vocabulary(plan.layout.vocabulary, axis)
    local = across_devices.local_targets(targets, plan.layout.vocabulary, axis)
    if log_min_p is not None:
        # Pruning needs the largest logit and the whole mass first: a sweep over the policy alone.
        policy = across_devices.join(
            engine.summary(plan, logits._replace(reference=None), local, (), None), axis
        ).policy
        floor, whole = policy.maximum + log_min_p.astype(policy.maximum.dtype), policy.total
    summary = across_devices.join(engine.summary(plan, logits, local, plan.wanted, floor), axis)
    values, constants = conclude(summary, plan.wanted, targets, vocabulary, floor, whole)
    if "total_variation" in plan.wanted:
        sums = across_devices.add(engine.total_variation(plan, logits, constants), axis)
        values = values._replace(total_variation=sums.distance)
        constants = constants._replace(sign=sums.sign)
    return values, constants


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def statistics(
    engine: Engine, plan: Plan, hidden, head, targets, reference, inverse_temperature, log_min_p
) -> TokenStatistics:
    """Statistics of every row; see `jaxrl_kernels.token_statistics`."""
    logits = Logits(hidden, head, reference, inverse_temperature, plan.soft_cap)
    return forward(engine, plan, logits, targets, log_min_p)[0]


def _forward_rule(engine: Engine, plan: Plan, *arguments):
    perturbed = {name: argument.perturbed for name, argument in zip(("hidden", "head"), arguments, strict=False)}
    hidden, head, targets, reference, inverse_temperature, log_min_p = (
        jax.custom_derivatives.custom_vjp_primal_tree_values(arguments)
    )
    logits = Logits(hidden, head, reference, inverse_temperature, plan.soft_cap)
    values, constants = forward(engine, plan, logits, targets, log_min_p)
    # Whether the head was perturbed is a residual entry of its own, so that the backward rule knows it as structure.
    marker = () if perturbed["head"] else None
    local = across_devices.local_targets(targets, plan.layout.vocabulary, plan.mesh_axis)
    return values, (logits._replace(soft_cap=None), local, values, constants, marker)


def _backward_rule(engine: Engine, plan: Plan, residuals, cotangents: TokenStatistics):
    logits, targets, values, constants, marker = residuals
    cotangent = usable(values, cotangents)
    if not cotangent:
        return (None,) * 6
    logits = logits._replace(soft_cap=plan.soft_cap)
    d_hidden, d_head = engine.backward(plan, logits, targets, constants, cotangent, head_gradient=marker is not None)
    return d_hidden, d_head, None, None, None, None


statistics.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
