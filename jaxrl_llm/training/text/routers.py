"""Routers in training: even loads by a rule or by a loss, and what is measured of them.

The rule moves a correction bias by the loads of a whole minibatch, which are known when its micro-batches and shards
have been added up. They are added up with the gradients: in the place of a bias's gradient, which is 0, stand its
expert's loads, which no count divides. `with_router_bias` reads them there.
"""

from collections.abc import Sequence
from typing import Any
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.masked import safe_divide
from jaxrl_llm.models.block import Block
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.experts import Experts
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.experts import choose_experts
from jaxrl_llm.objectives import balance
from jaxrl_llm.training.run.parameters import is_variable
from jaxrl_llm.training.run.state import named_leaves
from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount


def router_biases(tree: PyTree) -> list[Float[Array, " E"]]:
    """What stands in the place of each router's correction bias in a tree of parameters or gradients."""
    leaves = jax.tree.leaves(tree, is_leaf=is_variable)
    return [leaf.get_value() for leaf in leaves if isinstance(leaf, RouterBias)]


def router_kernels(params: PyTree) -> list[str]:
    """Paths of the matrices of routers in a tree of parameters."""
    return [name for name in named_leaves(params) if ".router.kernel" in name]


def gradient_norm(gradients: PyTree) -> Float[Array, ""]:
    """Global norm of the gradients, without the loads that stand among them."""
    leaves = jax.tree.leaves(gradients, is_leaf=is_variable)
    return optax.tree.norm([leaf for leaf in leaves if not isinstance(leaf, RouterBias)])


def with_router_bias(inner: optax.GradientTransformation, *, rate: float) -> optax.GradientTransformation:
    """The optimiser, and the rule of `objectives.balance.updated_router_bias` for the correction biases of routers."""

    def move(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        def change(loads: Array, bias: Array) -> Array:
            return balance.updated_router_bias(bias, loads, rate=rate) - bias

        return jax.tree.map(change, updates, params), state

    def label(leaf: Any) -> str:
        return "rule" if isinstance(leaf, RouterBias) else "gradient"

    rule = optax.GradientTransformation(lambda params: optax.EmptyState(), move)
    return optax.partition(
        {"gradient": inner, "rule": rule}, lambda tree: jax.tree.map(label, tree, is_leaf=is_variable)
    )


def require_routers(settings: UpdateSettings, params: PyTree) -> None:
    """Loads can be evened out where there are routers that learn.

    Raises:
        ValueError: a number above 0 for what the model has not.
    """
    there = {
        "router_bias_rate": (router_biases(params), "correction biases"),
        "router_balance": (router_kernels(params), "routers"),
    }
    for name, (found, what) in there.items():
        if getattr(settings, name) and not found:
            raise ValueError(
                f"update.{name} is {getattr(settings, name)}, and no layer that learns has {what}; it must be 0."
            )


def router_terms(
    sent: Sequence[tuple[Block, Routes | None, Bool[Array, "n W"]]],
) -> tuple[Float[Array, ""], SumCount | None]:
    """What routers add to the loss of a micro-batch.

    Args:
        sent: of each layer that learns: the layer, where its router sent the tokens, and which of them are real.

    Returns:
        a term of value 0 whose gradient with respect to each correction bias is the loads of its experts; and the
        losses `objectives.balance.sequence_balance_loss` of all rows and layers, as (sum, count). None without routers.
    """
    named, total, rows = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    for block, routes, token_mask in sent:
        if routes is None:
            continue
        bias, experts = cast(Experts, block.mlp).router.bias, routes.scores.shape[-1]
        if bias is not None:
            loads = balance.expert_loads(routes.selection, token_mask, num_experts=experts)
            named += jnp.sum(bias[...] * jax.lax.stop_gradient(loads))
        some = balance.sequence_balance_loss(routes.scores, routes.selection, token_mask)
        total, rows = total + some[0], rows + some[1]
    if all(routes is None for _, routes, _ in sent):
        return named, None
    return named - jax.lax.stop_gradient(named), (total, rows)


def own_choices(blocks: Sequence[Block], routes: Sequence[Routes | None]) -> Int[Array, "n W K k"] | None:
    """The experts that the routers of these layers prefer, also where others were given; None without routers."""
    chosen = []
    for block, sent in zip(blocks, routes, strict=True):
        if sent is not None:
            router = cast(Experts, block.mlp).router
            bias = None if router.bias is None else router.bias[...]
            chosen.append(choose_experts(sent.scores, bias, router.settings))
    return jnp.stack(chosen, axis=2) if chosen else None


def flip_metrics(
    recorded: Int[np.ndarray, "n W L k"], own: Int[np.ndarray, "n W K k"], read: Bool[np.ndarray, "n W"]
) -> dict[str, float]:
    """How often the trainer's routers choose other experts than the sampler's did, whatever their order.

    Args:
        recorded: the sampler's.
        own: the trainer's, of the last K layers.
        read: tokens that both have read.
    """
    pair = np.sort(recorded[:, :, -own.shape[2] :].astype(np.int32)), np.sort(own)
    flips = (pair[0] != pair[1]).any(axis=-1)[read]
    return {
        "rollout_corr/router_flips": float(flips.mean()),
        "rollout_corr/router_flipped_tokens": float(flips.any(1).mean()),
    }


def require_replay(settings: UpdateSettings, config: TransformerConfig) -> None:
    """Selections are replayed where there are routers.

    Raises:
        ValueError: asked of a model without experts.
    """
    if settings.router_replay != "off" and config.experts is None:
        raise ValueError(
            f'update.router_replay is "{settings.router_replay}", and the model has no experts; use "off".'
        )


def divided(gradients: PyTree, count: Float[Array, ""]) -> PyTree:
    """Gradients over a count; loads as they are."""

    def divide(leaf: Any) -> Any:
        if isinstance(leaf, RouterBias):
            return leaf
        return jax.tree.map(lambda array: safe_divide(array, count.astype(array.dtype)), leaf)

    return jax.tree.map(divide, gradients, is_leaf=is_variable)


def load_metrics(gradients: PyTree) -> dict[str, SumCount]:
    """Largest violation, entropy and dead experts of a minibatch, by the loads that stand among its gradients; means
    over layers.
    """
    found = [balance.balance_metrics(loads) for loads in router_biases(gradients)]
    if not found:
        return {}
    count = jnp.asarray(float(len(found)))
    totals = jax.tree.map(lambda *column: jnp.sum(jnp.stack(column)), *found)
    return {f"router_{name}": (value, count) for name, value in totals._asdict().items()}
