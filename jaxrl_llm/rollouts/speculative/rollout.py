"""Responses sampled with a draft, and what became of the drafts."""

from dataclasses import dataclass
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.masked import safe_divide
from jaxrl_llm.rollouts.generate import Generate
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.speculative.acceptance import tokens_per_step
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SpeculativeRollout(Rollout):
    """A `Rollout`, and what became of the drafts. Drafts behind the end of a response are not counted.

    Attributes:
        steps: rounds of each row, in each of which the model was asked once.
        reached: drafts of each row at each position of a round that were judged: all before them were kept.
        kept: how many of these were kept.
        overlaps: sum over those judged of 1 - TV(p, q), what `kept` is in expectation given all tokens before.
    """

    steps: Int[Array, " B"]
    reached: Int[Array, "B k"]
    kept: Int[Array, "B k"]
    overlaps: Float[Array, "B k"]


class SpeculativeGenerate(Generate, Protocol):
    """What `make_speculative_generate` returns: a `Generate`."""

    def __call__(
        self,
        state: nnx.State,
        prompt_tokens: Int[Array, "N P"],
        prompt_mask: Bool[Array, "N P"],
        key: PRNGKey,
        step: Int[Array, ""] | int,
        prompt_index: Int[Array, " N"],
        sample_index: Int[Array, " G"] | None = None,
        noise_key: PRNGKey | None = None,
    ) -> SpeculativeRollout:
        """See `Generate`; there is no noise, so `noise_key` is not looked at."""
        ...


class Acceptance(NamedTuple):
    """What drafts were worth; 0 where nothing was judged.

    Attributes:
        kept: of the drafts that were judged at each position of a round, the part that was kept [prob].
        expected: what that part is in expectation, the mean of 1 - TV(p, q) over the same places [prob].
        tokens_per_step: tokens of a row that a round made; the first of a response, which no round makes, left out. A
            round that a response ends in makes fewer.
        independent: what it would be, were all drafts kept independently at their common rate and no response to end.
    """

    kept: Float[Array, " k"]
    expected: Float[Array, " k"]
    tokens_per_step: Float[Array, ""]
    independent: Float[Array, ""]


def measured_acceptance(rollout: SpeculativeRollout) -> Acceptance:
    """Rates over all rows; the rollout holds the sums and counts, which those of shards and batches are added to.

    Args:
        rollout: of `make_speculative_generate`.

    Returns:
        the rates.
    """
    dtype = rollout.overlaps.dtype
    kept, reached, overlaps = (
        jnp.sum(x, axis=0).astype(dtype) for x in (rollout.kept, rollout.reached, rollout.overlaps)
    )
    made = jnp.sum(rollout.response_mask, dtype=dtype) - rollout.steps.shape[0]
    rate = safe_divide(jnp.sum(kept), jnp.sum(reached))
    return Acceptance(
        kept=safe_divide(kept, reached),
        expected=safe_divide(overlaps, reached),
        tokens_per_step=safe_divide(made, jnp.sum(rollout.steps).astype(dtype)),
        independent=tokens_per_step(rate, rollout.kept.shape[1]),
    )
