"""Feature functions of neural agents: pure (init, apply) pairs. Any model can be one; nothing here knows of models."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.exploration.inputs import require_input_shape
from jaxrl_llm.typing import PRNGKey


class Features(NamedTuple):
    """A function from inputs to features, with parameters.

    To hold a model frozen, close `apply` over it and let `init` return an empty pytree; to tune a pretrained one, let
    `init` return its parameters.

    Attributes:
        init: key -> parameters, any pytree of arrays.
        apply: (parameters, inputs [B, *input_shape]) -> features [B, P].
        width: P.
        input_shape: shape of one input.
        input_dtype: of inputs, for the replay buffer; float where None.
    """

    init: Callable[[PRNGKey], Any]
    apply: Callable[[Any, Array], Float[Array, "B P"]]
    width: int
    input_shape: tuple[int, ...]
    input_dtype: Any = None


def xavier_normal(key: PRNGKey, fan_in: int, fan_out: int) -> Float[Array, "fan_in fan_out"]:
    """Independent N(0, 2 / (fan_in + fan_out)) entries (Glorot and Bengio 2010)."""
    return (2 / (fan_in + fan_out)) ** 0.5 * jax.random.normal(key, (fan_in, fan_out))


def mlp(input_width: int, hidden: Sequence[int] = (64, 64)) -> Features:
    """Hidden layers of ReLU units, Xavier normal weights, biases 0 at first; the features are the last layer's units.

    Args:
        input_width: of one input.
        hidden: units of each layer.

    Returns:
        the features; their parameters are a tuple of (weights, biases), one pair per layer.

    Raises:
        ValueError: if a width is below 1 or there is no layer; on use, if inputs have another width.
    """
    require_at_least("input_width", input_width, 1)
    require_at_least("len(hidden)", len(hidden), 1)
    for size in hidden:
        require_at_least("hidden", size, 1)
    widths = (input_width, *hidden)

    def init(key: PRNGKey) -> Any:
        keys = jax.random.split(key, len(hidden))
        return tuple(
            (xavier_normal(one, before, after), jnp.zeros(after))
            for one, before, after in zip(keys, widths[:-1], widths[1:], strict=True)
        )

    def apply(parameters: Any, inputs: Float[Array, "B I"]) -> Float[Array, "B P"]:
        require_input_shape(inputs, (input_width,))
        for weights, biases in parameters:
            inputs = jax.nn.relu(inputs @ weights + biases[None])
        return inputs

    return Features(init, apply, widths[-1], (input_width,))


def given_features(width: int) -> Features:
    """Inputs that are features already: no parameters.

    Raises:
        ValueError: if width is below 1; on use, if inputs have another width.
    """
    require_at_least("width", width, 1)

    def apply(parameters: Any, inputs: Float[Array, "B P"]) -> Float[Array, "B P"]:
        require_input_shape(inputs, (width,))
        return inputs

    return Features(lambda key: (), apply, width, (width,))
