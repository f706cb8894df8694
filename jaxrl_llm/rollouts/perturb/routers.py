"""Routers whose product is rounded, and how many choices of experts flip for it or for anything else.

A trainer's routers are float32. An engine that multiplies in fewer bits ranks near ties in another order and sends
tokens to other experts; so does any other difference before the router.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.models.experts import Router
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.perturb.rounding import Rounding
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import SumCount


def with_router_rounding(model: Transformer, rounding: Rounding) -> Transformer:
    """The same model with every router's input, kernel and logits rounded; arrays are shared.

    Raises:
        ValueError: the model has no routers.
    """
    model = nnx.merge(*nnx.split(model))
    routers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Router)]
    if not routers:
        raise ValueError("the perturbation rounds routers, and the model has none; it must be a mixture of experts.")
    for router in routers:
        router.rounding = rounding
    return model


class RouteFlips(NamedTuple):
    """Choices of experts that two engines made differently, as (sum, count).

    Attributes:
        choices: experts of a token in a layer that the other has not chosen, of k for each token and layer.
        routers: tokens whose layer chose any other expert, of one for each token and layer.
        tokens: tokens with another expert in any layer.
    """

    choices: SumCount
    routers: SumCount
    tokens: SumCount


def route_flips(
    selections: Int[Array, "B T L k"], selections_other: Int[Array, "B T L k"], token_mask: Bool[Array, "B T"]
) -> RouteFlips:
    """How many choices of experts differ: |S without S'| of k, where S, S' are the sets that two routers chose.

    Args:
        selections: the k experts to which each of L layers sent each token, in any order, none twice.
        selections_other: those of the other engine.
        token_mask: which tokens are real.

    Returns:
        sums and counts over real tokens.

    Raises:
        ValueError: for shapes that differ.
    """
    if selections.shape != selections_other.shape:
        raise ValueError(
            f"selections_other must have the shape {selections.shape} of selections, got {selections_other.shape}"
        )
    found = jnp.any(selections[..., :, None] == selections_other[..., None, :], axis=-1)
    flipped = (~found).astype(jnp.float32)
    a_router, a_token = jnp.max(flipped, axis=-1), jnp.max(flipped, axis=(-1, -2))
    return RouteFlips(
        choices=masked_sum_count(flipped, token_mask[..., None, None]),
        routers=masked_sum_count(a_router, token_mask[..., None]),
        tokens=masked_sum_count(a_token, token_mask),
    )
