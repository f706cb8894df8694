"""A perturbed engine as data: what it does to weights, cache, logits and routers; by name, combined, and asked."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from jaxrl_llm.checks import require_choice
from jaxrl_llm.models.experts import stacked_selections
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.perturb import logits as on_logits
from jaxrl_llm.rollouts.perturb.logits import LogitPerturbation
from jaxrl_llm.rollouts.perturb.logits import chain_logits
from jaxrl_llm.rollouts.perturb.logits import context_keys
from jaxrl_llm.rollouts.perturb.rounding import Rounding
from jaxrl_llm.rollouts.perturb.rounding import quantise_fp8
from jaxrl_llm.rollouts.perturb.rounding import quantise_int8
from jaxrl_llm.rollouts.perturb.rounding import round_to_bf16
from jaxrl_llm.rollouts.perturb.routers import with_router_rounding
from jaxrl_llm.rollouts.perturb.weights import WeightPerturbation
from jaxrl_llm.rollouts.perturb.weights import bf16_weights
from jaxrl_llm.rollouts.perturb.weights import chain_weights
from jaxrl_llm.rollouts.perturb.weights import fp8_weights
from jaxrl_llm.rollouts.perturb.weights import int8_weights
from jaxrl_llm.rollouts.scoring import predicting
from jaxrl_llm.rollouts.scoring import response_columns
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Perturbation(NamedTuple):
    """How an engine differs from the trainer's model; None where it does not.

    Attributes:
        weights: parameters -> parameters.
        cache: rounding of every key and value before it is attended to, along the head's width.
        logits: (logits, keys of the contexts) -> logits.
        router: rounding of what goes into a router's product and of what comes out, so that it chooses other experts.
    """

    weights: WeightPerturbation | None = None
    cache: Rounding | None = None
    logits: LogitPerturbation | None = None
    router: Rounding | None = None


def _whole_head(rounding: Callable[..., Array]) -> Rounding:
    """One scale per token and head."""

    def act(x: Array) -> Array:
        return rounding(x, block=x.shape[-1])

    return act


def _noise(name: str) -> Callable[[float], Perturbation]:
    return lambda scale: Perturbation(logits=functools.partial(getattr(on_logits, name), scale=scale))


def _slip(name: str) -> Callable[[float], Perturbation]:
    act = getattr(on_logits, f"{name}_slip")
    number = int if name == "top_k" else float
    return lambda strength: Perturbation(logits=functools.partial(act, **{name: number(strength)}))


WITHOUT_STRENGTH: dict[str, Perturbation] = {
    "none": Perturbation(),
    "bf16_weights": Perturbation(weights=bf16_weights),
    "int8_weights": Perturbation(weights=int8_weights),
    "fp8_weights": Perturbation(weights=fp8_weights),
    "bf16_cache": Perturbation(cache=round_to_bf16),
    "int8_cache": Perturbation(cache=_whole_head(quantise_int8)),
    "fp8_cache": Perturbation(cache=_whole_head(quantise_fp8)),
    "bf16_logits": Perturbation(logits=on_logits.bf16_logits),
    "bf16_router": Perturbation(router=round_to_bf16),
}
"""Perturbations that are what they are."""

WITH_STRENGTH: dict[str, tuple[float, Callable[[float], Perturbation]]] = {
    "gaussian_noise": (0.1, _noise("gaussian_noise")),
    "bounded_noise": (0.1, _noise("bounded_noise")),
    "relative_noise": (on_logits.BF16_ROUNDOFF, _noise("relative_noise")),
    "temperature": (1.1, _slip("temperature")),
    "top_p": (0.95, _slip("top_p")),
    "top_k": (20, _slip("top_k")),
}
"""Perturbations with one number: its usual value, and the perturbation that it makes."""

PERTURBATIONS = (*WITHOUT_STRENGTH, *WITH_STRENGTH)
"""Every name that `perturbation` knows. Staleness is not among them: it needs a history (`weights.History`)."""


def perturbation(name: str, strength: float | None = None) -> Perturbation:
    """The perturbation of that name.

    Args:
        name: one of `PERTURBATIONS`.
        strength: the number of noises and slips: scale, temperature, top_p or top_k; None for the usual one.

    Returns:
        the perturbation.

    Raises:
        ValueError: for an unknown name, or a strength where there is nothing to be stronger.
    """
    require_choice("name", name, PERTURBATIONS)
    if name in WITHOUT_STRENGTH:
        if strength is not None:
            raise ValueError(f"strength is {strength}; perturbation {name!r} has none, so it must be None.")
        return WITHOUT_STRENGTH[name]
    usual, make = WITH_STRENGTH[name]
    return make(usual if strength is None else strength)


def combine(*perturbations: Perturbation) -> Perturbation:
    """All of them at once; those that act on the same thing act in the order given."""

    def present(name: str) -> list[Callable[..., Array]]:
        return [act for act in (getattr(one, name) for one in perturbations) if act is not None]

    weights, cache, logits, router = (present(name) for name in Perturbation._fields)
    return Perturbation(
        weights=chain_weights(*weights) if weights else None,
        cache=chain_weights(*cache) if cache else None,
        logits=chain_logits(*logits) if logits else None,
        router=chain_weights(*router) if router else None,
    )


def perturbed_model(model: Transformer, perturbation: Perturbation) -> Transformer:
    """The engine's model: weights and routers are perturbed; cache and logits are not part of a model.

    Args:
        model: the unperturbed one, adapters merged.
        perturbation: of the engine.

    Raises:
        ValueError: a router is to be perturbed, and the model has none.
    """
    if perturbation.router is not None:
        model = with_router_rounding(model, perturbation.router)
    if perturbation.weights is not None:
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, perturbation.weights(state))
    return model


def perturbed_selections(
    model: Transformer, tokens: Int[Array, "B T"], token_mask: Bool[Array, "B T"], perturbation: Perturbation
) -> Int[Array, "B T L k"]:
    """The k experts to which the perturbed engine sends each token in each of its L layers that have some.

    Args:
        model: the unperturbed one, adapters merged; with experts.
        tokens: left-padded texts.
        token_mask: which tokens are real.
        perturbation: of the engine; that of its logits changes no choice of a token that is given.

    Raises:
        ValueError: the model has no experts.
    """
    if model.config.experts is None:
        raise ValueError("the model has no experts, so no router chooses any; it must be a mixture of experts.")
    engine = perturbed_model(model, perturbation)
    _, _, routes = engine.prefill_routed(tokens, token_mask, cache_rounding=perturbation.cache)
    return stacked_selections(routes)


def perturbed_logits(
    model: Transformer,
    tokens: Int[Array, "B T"],
    token_mask: Bool[Array, "B T"],
    perturbation: Perturbation,
    *,
    response_width: int,
    key: PRNGKey | None = None,
) -> Float[Array, "B R V"]:
    """Logits of the perturbed engine at every response token: what its sampler drew from, before temperature.

    Args:
        model: the unperturbed one, adapters merged.
        tokens: left-padded prompts followed by responses.
        token_mask: which tokens are real.
        perturbation: of the engine.
        response_width: R, the last columns, which hold the responses.
        key: of the engine's noise, as given to the sampler; None for its default.

    Returns:
        logits of the contexts of the response tokens; they mean nothing at padding. [B, R, V] exists.
    """
    model = perturbed_model(model, perturbation)
    if perturbation.cache is None:
        hidden = model(tokens, token_mask)
    else:
        hidden, _ = model.prefill(tokens, token_mask, cache_rounding=perturbation.cache)
    logits = model.logits(predicting(hidden, response_width))
    if perturbation.logits is None:
        return logits
    keys = context_keys(jax.random.key(0) if key is None else key, tokens, token_mask)
    return perturbation.logits(logits, response_columns(keys, response_width))
