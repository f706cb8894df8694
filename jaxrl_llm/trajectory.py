"""The one batch of sequences that every floor agrees on."""

import dataclasses

import jax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Sequences sampled by a policy, with what was recorded about them.

    A row is a left-padded prompt followed by a response, right-padded after its end. Every `[B, T]` array is aligned to the token itself:
    `log_prob_x[b, t]` is log pi_x(tokens[b, t] | tokens[b, :t]) in nats.

    Attributes:
        tokens: token ids.
        token_mask: true at real tokens (prompt and response), false at padding.
        response_mask: true where the policy sampled the token, the end token included.
        group_ids: sequences with the same id answer the same prompt.
        rewards: one reward per sequence.
        log_prob_behaviour: under the policy that sampled (with its own temperature, truncation and precision).
        log_prob_old: under the policy at the start of the update, as the trainer computes it.
        log_prob_ref: under the regulariser's policy.
        step_ids: index of the environment step a token belongs to, -1 outside any step.
    """

    tokens: Int[Array, "B T"]
    token_mask: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    group_ids: Int[Array, " B"]
    rewards: Float[Array, " B"]
    log_prob_behaviour: Float[Array, "B T"]
    log_prob_old: Float[Array, "B T"] | None = None
    log_prob_ref: Float[Array, "B T"] | None = None
    step_ids: Int[Array, "B T"] | None = None
