"""Attention of training rows: who attends to whom, and how it is computed without its scores."""

from jaxrl_llm.models.attention.choice import IMPLEMENTATIONS
from jaxrl_llm.models.attention.choice import attend
from jaxrl_llm.models.attention.choice import choose
from jaxrl_llm.models.attention.dense import MASKED_SCORE
from jaxrl_llm.models.attention.dense import grouped_query_attention
from jaxrl_llm.models.attention.visibility import Visibility

__all__ = ["IMPLEMENTATIONS", "MASKED_SCORE", "Visibility", "attend", "choose", "grouped_query_attention"]
