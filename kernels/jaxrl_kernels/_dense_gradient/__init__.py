"""KL between two arrays of logits, and its gradient."""

from jaxrl_kernels._dense_gradient.api import dense_gradient
from jaxrl_kernels._dense_gradient.api import dense_kl
from jaxrl_kernels._dense_gradient.types import DenseGradient

__all__ = ["DenseGradient", "dense_gradient", "dense_kl"]
