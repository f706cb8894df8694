"""Rows sorted by group times the weights of their group, and the way of rows into groups and back."""

from jaxrl_kernels._grouped_matmul.api import grouped_matmul
from jaxrl_kernels._grouped_matmul.dispatch import RowGroups
from jaxrl_kernels._grouped_matmul.dispatch import combine_rows
from jaxrl_kernels._grouped_matmul.dispatch import gather_rows
from jaxrl_kernels._grouped_matmul.dispatch import group_rows

__all__ = ["RowGroups", "combine_rows", "gather_rows", "group_rows", "grouped_matmul"]
