"""Checks of the arguments that all exploration agents share."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float


class PosteriorError(ValueError):
    """A posterior that is none any more: a covariance that is not positive definite, or data that no atom explains."""


def require_width(name: str, array: Float[Array, "*shape"], dimension: int) -> None:
    """The last axis of `array` must have `dimension` entries; known at trace time.

    Raises:
        ValueError: if it has not.
    """
    if array.shape[-1] != dimension:
        raise ValueError(f"{name} has width {array.shape[-1]}; the agent was made for dimension {dimension}.")


def require_input_shape(inputs: Float[Array, "*shape"], input_shape: tuple[int, ...]) -> None:
    """All axes of `inputs` but the first must be `input_shape`; known at trace time.

    Raises:
        ValueError: if they are not.
    """
    if inputs.shape[1:] != input_shape:
        raise ValueError(f"inputs have shape {inputs.shape[1:]} each; the features were made for {input_shape}.")


def require_positive_definite(covariance: Float[Array, "*batch D D"]) -> None:
    """Every covariance matrix must be finite and positive definite; for concrete arrays, after a run.

    Raises:
        TypeError: if it is a tracer.
        PosteriorError: naming the first one that is not, by its place and smallest eigenvalue.
    """
    if isinstance(covariance, Tracer):
        raise TypeError("covariance is a tracer; definiteness can only be checked outside jit, vmap and grad.")
    matrices = np.asarray(covariance, np.float64).reshape(-1, *jnp.shape(covariance)[-2:])
    for place, matrix in enumerate(matrices):
        smallest = np.linalg.eigvalsh(matrix)[0] if np.isfinite(matrix).all() else np.nan
        if not smallest > 0:
            raise PosteriorError(
                f"covariance {place} of {len(matrices)} has smallest eigenvalue {smallest:.3g}; a posterior must be "
                "positive definite (use float64, a larger noise_scale or a smaller prior_scale)."
            )
