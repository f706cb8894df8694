"""Value models f(x, xi): what a random index turns into a random value function.

Each is a pair of pure functions over two pytrees: what is trained, and a prior that is drawn once and never changes.
Sources: HyperAgent (arXiv 2402.10228), Ensemble++ (arXiv 2407.13195) and their public code; randomised priors, Osband
et al. 2018 (arXiv 1806.03335); epinets, Osband et al. 2021 (arXiv 2107.08924).
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_choice
from jaxrl_llm.checks import require_positive
from jaxrl_llm.exploration.features import Features
from jaxrl_llm.exploration.features import mlp
from jaxrl_llm.exploration.features import xavier_normal
from jaxrl_llm.exploration.inputs import require_width
from jaxrl_llm.typing import PRNGKey

Parts = Callable[[Any, Any, Array], tuple[Float[Array, "B O"], Float[Array, "B O M"]]]
"""(trained, prior, inputs) -> mean and factor of values that are linear in the index: f = mean + factor xi."""


class ValueModel(NamedTuple):
    """A value for each output (action) of each input, as a function of an index.

    Attributes:
        init: key -> (trained, prior), two pytrees.
        values: (trained, prior, inputs [B, ...], indices [C, U, M]) -> f [B, U, O]; C is B (indices of each input's
            own) or 1 (the same for all).
        index_dimension: M; 0 where values do not depend on an index.
        outputs: O, how many values an input has.
        input_shape: shape of one input.
        input_dtype: of inputs; float where None.
        parts: mean and factor where f is linear in the index, else None.
        held_parts: the same with the features held constant in the factor, so that only the mean trains them.
    """

    init: Callable[[PRNGKey], tuple[Any, Any]]
    values: Callable[[Any, Any, Array, Float[Array, "C U M"]], Float[Array, "B U O"]]
    index_dimension: int
    outputs: int
    input_shape: tuple[int, ...]
    input_dtype: Any = None
    parts: Parts | None = None
    held_parts: Parts | None = None


class OutputLayer(NamedTuple):
    """The weights of a linear layer as a function of the index: W(xi) = A xi + b, one row per output.

    Attributes:
        factor: A [O, P, M].
        mean: b [O, P].
    """

    factor: Float[Array, "O P M"]
    mean: Float[Array, "O P"]


def _unit(array: Array, axis: int | None) -> Array:
    return array / jnp.linalg.norm(array, axis=axis, keepdims=axis is not None)


def _first_layer(key: PRNGKey, shape: tuple[int, int, int], first_mean: str) -> OutputLayer:
    """Xavier normal factor; the mean is a unit vector over all outputs, or 0."""
    outputs, width, size = shape
    factor_key, mean_key = jax.random.split(key)
    factor = xavier_normal(factor_key, outputs * width, size).reshape(shape)
    mean = jnp.zeros(shape[:2]) if first_mean == "zeros" else _unit(jax.random.normal(mean_key, shape[:2]), None)
    return OutputLayer(factor, mean)


def _prior_layer(key: PRNGKey, shape: tuple[int, int, int], first_mean: str) -> OutputLayer:
    """Rows of the factor uniform on the unit sphere; the mean as in the first layer."""
    layer = _first_layer(key, shape, first_mean)
    return layer._replace(factor=_unit(layer.factor, -1))


def hypermodel(
    features: Features,
    *,
    index_dimension: int,
    prior_features: Features | None = None,
    outputs: int = 1,
    posterior_scale: float = 1.0,
    prior_scale: float = 1.0,
    first_mean: Literal["sphere", "zeros"] = "sphere",
) -> ValueModel:
    """f_a(x, xi) = posterior_scale <A_a xi + b_a, phi(x)> + prior_scale <A0_a xi + b0_a, phi0(x)>.

    A starts Xavier normal and the rows of A0 uniform on the unit sphere; A0, b0 and phi0 are never trained.

    Args:
        features: phi, trained.
        index_dimension: M.
        prior_features: phi0, drawn once; where None, phi itself held constant, as for heads on language models.
        outputs: how many actions a have a value at each input.
        posterior_scale: factor of the trained part.
        prior_scale: factor of the prior.
        first_mean: b and b0 at first: a random unit vector over all outputs, or 0 as for heads on language models.

    Returns:
        the model; it is linear in the index, so it has `parts`.

    Raises:
        ValueError: if a scale is not positive, a size is below 1, or the two features take other inputs.
    """
    _require_sizes(index_dimension, outputs, prior_scale)
    require_positive("posterior_scale", posterior_scale)
    require_choice("first_mean", first_mean, ("sphere", "zeros"))
    if prior_features is not None:
        _require_same_inputs(features, prior_features)
    prior_width = features.width if prior_features is None else prior_features.width

    def init(key: PRNGKey) -> tuple[Any, Any]:
        keys = jax.random.split(key, 4)
        layer = _first_layer(keys[1], (outputs, features.width, index_dimension), first_mean)
        prior_layer = _prior_layer(keys[3], (outputs, prior_width, index_dimension), first_mean)
        prior_parameters = () if prior_features is None else prior_features.init(keys[2])
        return (features.init(keys[0]), layer), (prior_parameters, prior_layer)

    def compute_parts(trained: Any, prior: Any, inputs: Array, hold: Callable[[Array], Array]) -> tuple[Array, Array]:
        (parameters, layer), (prior_parameters, prior_layer) = trained, prior
        phi = features.apply(parameters, inputs)
        if prior_features is None:
            phi0 = jax.lax.stop_gradient(phi)
        else:
            phi0 = prior_features.apply(prior_parameters, inputs)
        mean = posterior_scale * phi @ layer.mean.T + prior_scale * phi0 @ prior_layer.mean.T
        factor = posterior_scale * jnp.einsum("bp,opm->bom", hold(phi), layer.factor)
        return mean, factor + prior_scale * jnp.einsum("bp,opm->bom", phi0, prior_layer.factor)

    def parts(trained: Any, prior: Any, inputs: Array) -> tuple[Array, Array]:
        return compute_parts(trained, prior, inputs, lambda phi: phi)

    def held_parts(trained: Any, prior: Any, inputs: Array) -> tuple[Array, Array]:
        return compute_parts(trained, prior, inputs, jax.lax.stop_gradient)

    def values(trained: Any, prior: Any, inputs: Array, chosen: Float[Array, "C U M"]) -> Float[Array, "B U O"]:
        require_width("indices", chosen, index_dimension)
        mean, factor = parts(trained, prior, inputs)
        spread = factor @ chosen.transpose(0, 2, 1)  # [B, O, U]
        return mean[:, None, :] + spread.transpose(0, 2, 1)

    shape, dtype = features.input_shape, features.input_dtype
    return ValueModel(init, values, index_dimension, outputs, shape, dtype, parts, held_parts)


def ensemble(
    features: Features, *, members: int, prior_features: Features, outputs: int = 1, prior_scale: float = 1.0
) -> ValueModel:
    """f_a(x, xi) = sum_m xi_m [ <w_ma, phi_m(x)> + prior_scale <w0_ma, phi0_m(x)> ]: networks with priors.

    Index e_m picks member m, which shares nothing with the others. Output weights are Xavier normal.

    Args:
        features: phi, one set of parameters per member.
        members: M.
        prior_features: phi0, drawn once per member.
        outputs: O.
        prior_scale: factor of the priors.

    Returns:
        the model.

    Raises:
        ValueError: if prior_scale is not positive, a size is below 1, or the two features take other inputs.
    """
    require_at_least("members", members, 1)
    _require_sizes(members, outputs, prior_scale)
    _require_same_inputs(features, prior_features)

    def network(one: Features) -> Callable[[PRNGKey], Any]:
        def init(key: PRNGKey) -> Any:
            features_key, layer_key = jax.random.split(key)
            return one.init(features_key), xavier_normal(layer_key, one.width, outputs)

        return init

    def init(key: PRNGKey) -> tuple[Any, Any]:
        keys = jax.random.split(key, (2, members))
        return jax.vmap(network(features))(keys[0]), jax.vmap(network(prior_features))(keys[1])

    def member(trained: Any, prior: Any, inputs: Array) -> Float[Array, "B O"]:
        (parameters, layer), (prior_parameters, prior_layer) = trained, prior
        fitted = features.apply(parameters, inputs) @ layer
        return fitted + prior_scale * prior_features.apply(prior_parameters, inputs) @ prior_layer

    def values(trained: Any, prior: Any, inputs: Array, chosen: Float[Array, "C U M"]) -> Float[Array, "B U O"]:
        require_width("indices", chosen, members)
        every = jax.vmap(member, in_axes=(0, 0, None), out_axes=1)(trained, prior, inputs)  # [B, M, O]
        return chosen @ every

    return ValueModel(init, values, members, outputs, features.input_shape, features.input_dtype)


def epinet(
    features: Features,
    *,
    index_dimension: int,
    outputs: int = 1,
    hidden: Sequence[int] = (15, 15),
    prior_hidden: Sequence[int] = (5, 5),
    prior_scale: float = 1.0,
) -> ValueModel:
    """f_a(x, xi) = <w_a, phi(x)> + < g_a(stop(phi), xi) + prior_scale g0_a(stop(phi), xi), xi >, g and g0 networks.

    The epinet g is an MLP of features and index with O x M outputs; g0 is a smaller one that is never trained. The
    features learn from the first term alone.

    Args:
        features: phi.
        index_dimension: M.
        outputs: O.
        hidden: units of the layers of g.
        prior_hidden: units of the layers of g0.
        prior_scale: factor of g0.

    Returns:
        the model; it is not linear in the index.

    Raises:
        ValueError: if prior_scale is not positive or a size is below 1.
    """
    _require_sizes(index_dimension, outputs, prior_scale)
    joined = features.width + index_dimension
    learnt, fixed = mlp(joined, hidden), mlp(joined, prior_hidden)

    def network(key: PRNGKey, one: Features) -> Any:
        first, last = jax.random.split(key)
        return one.init(first), xavier_normal(last, one.width, outputs * index_dimension)

    def init(key: PRNGKey) -> tuple[Any, Any]:
        keys = jax.random.split(key, 4)
        base = xavier_normal(keys[1], features.width, outputs)
        return (features.init(keys[0]), base, network(keys[2], learnt)), network(keys[3], fixed)

    def values(trained: Any, prior: Any, inputs: Array, chosen: Float[Array, "C U M"]) -> Float[Array, "B U O"]:
        require_width("indices", chosen, index_dimension)
        parameters, base, (hidden_layers, last) = trained
        prior_layers, prior_last = prior
        phi = features.apply(parameters, inputs)
        count, draws = phi.shape[0], chosen.shape[1]
        every = jnp.broadcast_to(chosen, (count, draws, index_dimension))
        held = jnp.broadcast_to(jax.lax.stop_gradient(phi)[:, None], (count, draws, features.width))
        rows = jnp.concatenate([held, every], axis=-1).reshape(count * draws, joined)
        made = learnt.apply(hidden_layers, rows) @ last + prior_scale * fixed.apply(prior_layers, rows) @ prior_last
        made = made.reshape(count, draws, outputs, index_dimension)
        return (phi @ base)[:, None] + jnp.sum(made * every[:, :, None], axis=-1)

    return ValueModel(init, values, index_dimension, outputs, features.input_shape, features.input_dtype)


def point(features: Features, *, outputs: int = 1) -> ValueModel:
    """f_a(x) = <w_a, phi(x)>: one value, without an index; for greedy, epsilon-greedy and Langevin agents.

    Raises:
        ValueError: if outputs is below 1.
    """
    require_at_least("outputs", outputs, 1)

    def init(key: PRNGKey) -> tuple[Any, Any]:
        features_key, layer_key = jax.random.split(key)
        return (features.init(features_key), xavier_normal(layer_key, features.width, outputs)), ()

    def values(trained: Any, prior: Any, inputs: Array, chosen: Float[Array, "C U 0"]) -> Float[Array, "B U O"]:
        parameters, layer = trained
        fitted = features.apply(parameters, inputs) @ layer
        return jnp.broadcast_to(fitted[:, None], (fitted.shape[0], chosen.shape[1], outputs))

    return ValueModel(init, values, 0, outputs, features.input_shape, features.input_dtype)


def _require_sizes(index_dimension: int, outputs: int, prior_scale: float) -> None:
    require_at_least("index_dimension", index_dimension, 1)
    require_at_least("outputs", outputs, 1)
    require_positive("prior_scale", prior_scale)


def _require_same_inputs(features: Features, prior_features: Features) -> None:
    if prior_features.input_shape != features.input_shape:
        raise ValueError(
            f"prior_features take inputs of shape {prior_features.input_shape}, features of {features.input_shape}; "
            "they must be the same."
        )


def count_parameters(model: ValueModel) -> int:
    """How many numbers of a model are trained."""
    trained, _ = jax.eval_shape(model.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(trained))
