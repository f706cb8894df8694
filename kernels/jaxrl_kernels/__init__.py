"""Per-token statistics of large vocabularies: one pass, closed-form gradients."""

from jaxrl_kernels._token_statistics import Reference
from jaxrl_kernels._token_statistics import TokenStatistics
from jaxrl_kernels._token_statistics import token_loss
from jaxrl_kernels._token_statistics import token_statistics

__all__ = ["Reference", "TokenStatistics", "token_loss", "token_statistics"]
