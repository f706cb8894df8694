"""Per-token statistics of large vocabularies: one pass, closed-form gradients."""

from jaxrl_kernels._dense_gradient import DenseGradient
from jaxrl_kernels._dense_gradient import dense_gradient
from jaxrl_kernels._dense_gradient import dense_kl
from jaxrl_kernels._token_statistics import Reference
from jaxrl_kernels._token_statistics import ReferenceLogits
from jaxrl_kernels._token_statistics import TokenStatistics
from jaxrl_kernels._token_statistics import token_loss
from jaxrl_kernels._token_statistics import token_statistics

__all__ = [
    "DenseGradient",
    "Reference",
    "ReferenceLogits",
    "TokenStatistics",
    "dense_gradient",
    "dense_kl",
    "token_loss",
    "token_statistics",
]
