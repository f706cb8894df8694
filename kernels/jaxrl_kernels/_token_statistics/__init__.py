"""Per-token statistics from hidden states and a head."""

from jaxrl_kernels._token_statistics.api import token_loss
from jaxrl_kernels._token_statistics.api import token_statistics
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.types import TokenStatistics

__all__ = ["Reference", "ReferenceLogits", "TokenStatistics", "token_loss", "token_statistics"]
