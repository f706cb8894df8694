"""Per-token statistics of large vocabularies, and products of grouped rows: one pass, closed-form gradients."""

from jaxrl_kernels._dense_gradient import DenseGradient
from jaxrl_kernels._dense_gradient import dense_gradient
from jaxrl_kernels._dense_gradient import dense_kl
from jaxrl_kernels._grouped_matmul import RowGroups
from jaxrl_kernels._grouped_matmul import combine_rows
from jaxrl_kernels._grouped_matmul import gather_rows
from jaxrl_kernels._grouped_matmul import group_rows
from jaxrl_kernels._grouped_matmul import grouped_matmul
from jaxrl_kernels._token_statistics import Reference
from jaxrl_kernels._token_statistics import ReferenceLogits
from jaxrl_kernels._token_statistics import TokenStatistics
from jaxrl_kernels._token_statistics import token_loss
from jaxrl_kernels._token_statistics import token_statistics

__all__ = [
    "DenseGradient",
    "Reference",
    "ReferenceLogits",
    "RowGroups",
    "TokenStatistics",
    "combine_rows",
    "dense_gradient",
    "dense_kl",
    "gather_rows",
    "group_rows",
    "grouped_matmul",
    "token_loss",
    "token_statistics",
]
