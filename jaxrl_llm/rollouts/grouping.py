"""The one order of rows in a group-sampled batch: row = prompt * G + sample."""

import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int


def group_ids(prompts: int, group_size: int) -> Int[Array, " B"]:
    """The prompt of each row: 0 (G times), 1 (G times), .. N - 1."""
    return jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), group_size)


def repeat_prompts(
    prompt_tokens: Int[Array, "N P"], prompt_mask: Bool[Array, "N P"], group_size: int
) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """One copy of a prompt for each of its samples."""
    return jnp.repeat(prompt_tokens, group_size, axis=0), jnp.repeat(prompt_mask, group_size, axis=0)
