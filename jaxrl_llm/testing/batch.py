"""The small batch on which a loss is examined: four policies given by their logits, and everything a loss may read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm import categorical
from jaxrl_llm.checks import require_choice

ADVANTAGES = ("sequence", "token", "group", "batch")


class Batch(NamedTuple):
    """What a loss under test is given. It reads the fields it needs; every `[B, T]` array is aligned to its token.

    Attributes:
        tokens: the sampled tokens.
        response_mask: true at the tokens that the policy sampled; may start late, have gaps, and leave columns empty.
        group_ids: equal for sequences that answer the same prompt, in no order.
        rewards: one per sequence.
        advantages: one per sequence, or `[B, T]` where the loss promises advantages="token".
        logits: of the trained policy pi, through which gradients are taken.
        logits_old: at the start of the update.
        logits_behaviour: of the policy mu that sampled.
        logits_ref: of the reference policy.
        log_prob: log pi of the tokens [nats].
        log_prob_old: the same at the start of the update.
        log_prob_behaviour: the same under mu.
        log_prob_ref: the same under the reference policy.
        entropy: of pi in each context [nats].
        kl_t: KL(mu || pi) of each context [nats].
        kl_ref_t: KL(pi || ref) of each context [nats].
        kl_from_ref_t: KL(ref || pi) of each context [nats].
        step_ids: which step of its row each response token belongs to, 0, 1, ..; -1 outside the mask.
    """

    tokens: Int[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    group_ids: Int[Array, " B"]
    rewards: Float[Array, " B"]
    advantages: Float[Array, " B"] | Float[Array, "B T"]
    logits: Float[Array, "B T V"]
    logits_old: Float[Array, "B T V"]
    logits_behaviour: Float[Array, "B T V"]
    logits_ref: Float[Array, "B T V"]
    log_prob: Float[Array, "B T"]
    log_prob_old: Float[Array, "B T"]
    log_prob_behaviour: Float[Array, "B T"]
    log_prob_ref: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    kl_t: Float[Array, "B T"]
    kl_ref_t: Float[Array, "B T"]
    kl_from_ref_t: Float[Array, "B T"]
    step_ids: Int[Array, "B T"]


POLICY_FIELDS = ("log_prob", "entropy", "kl_t", "kl_ref_t", "kl_from_ref_t")
"""Fields that are functions of `logits`."""

CONSTANT_FIELDS = (
    "rewards",
    "advantages",
    "logits_old",
    "logits_behaviour",
    "logits_ref",
    "log_prob_old",
    "log_prob_behaviour",
    "log_prob_ref",
)
"""Fields that are constants to the gradient."""


def policy_statistics(logits: Float[Array, "B T V"], batch: Batch) -> dict[str, Float[Array, "B T"]]:
    """The `POLICY_FIELDS` as functions of the logits, the rest of the batch as it is."""
    return {
        "log_prob": categorical.log_prob(logits, batch.tokens),
        "entropy": categorical.entropy(logits),
        "kl_t": categorical.kl(batch.logits_behaviour, logits),
        "kl_ref_t": categorical.kl(logits, batch.logits_ref),
        "kl_from_ref_t": categorical.kl(batch.logits_ref, logits),
    }


@jax.jit
def with_policies(
    batch: Batch,
    logits: Float[Array, "B T V"],
    logits_old: Float[Array, "B T V"],
    logits_behaviour: Float[Array, "B T V"],
    logits_ref: Float[Array, "B T V"],
) -> Batch:
    """The batch under other policies, with all that follows from them."""
    batch = batch._replace(
        logits=logits, logits_old=logits_old, logits_behaviour=logits_behaviour, logits_ref=logits_ref
    )
    return batch._replace(
        log_prob_old=categorical.log_prob(logits_old, batch.tokens),
        log_prob_behaviour=categorical.log_prob(logits_behaviour, batch.tokens),
        log_prob_ref=categorical.log_prob(logits_ref, batch.tokens),
        **policy_statistics(logits, batch),
    )


def on_policy(batch: Batch) -> Batch:
    """The batch with old = behaviour = ref = pi."""
    return with_policies(batch, *[batch.logits] * 4)


def make_batch(
    tokens: np.ndarray,
    response_mask: np.ndarray,
    policies: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    *,
    group_ids: np.ndarray,
    rewards: np.ndarray,
    advantages: np.ndarray,
    step_ids: np.ndarray | None = None,
) -> Batch:
    """A batch from NumPy arrays, in jax's default floating dtype.

    Args:
        tokens: `[B, T]`.
        response_mask: `[B, T]`.
        policies: logits `[B, T, V]` of pi, old, behaviour and ref.
        group_ids: `[B]`.
        rewards: `[B]`.
        advantages: `[B]` or `[B, T]`.
        step_ids: `[B, T]`, read at response tokens; None where every row is one step.
    """
    steps = np.zeros(tokens.shape, int) if step_ids is None else step_ids
    dtype = jnp.result_type(float)
    logits = [jnp.asarray(z, dtype) for z in policies]
    empty = jnp.zeros(tokens.shape, dtype)
    batch = Batch(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(response_mask),
        jnp.asarray(group_ids, jnp.int32),
        jnp.asarray(rewards, dtype),
        jnp.asarray(advantages, dtype),
        *logits,
        *[empty] * 8,
        step_ids=jnp.asarray(np.where(response_mask, steps, -1), jnp.int32),
    )
    return with_policies(batch, *logits)


_SPANS = ((1, 2), (0, 5), (2, 1), (1, 4), (0, 3), (0, 6), (2, 2), (1, 3), (0, 1), (2, 4), (1, 2), (0, 6))
"""First column and length of each response: even rows, which are one group, are short; the other group is long."""


def example_batch(seed: int = 0, *, advantages: str = "sequence") -> Batch:
    """A batch of 12 responses in 8 columns over 6 tokens, a little off-policy; the last two columns are all padding.

    Some sequences have moved by 1e-5 nats per token and some by 0.1, so that tests of trust regions accept a part. One
    token of every context has probability 1e-9 and is never sampled. A step is two tokens.

    Args:
        seed: of the random numbers.
        advantages: "token" for `[B, T]` advantages, else one per sequence.
    """
    require_choice("advantages", advantages, ADVANTAGES)
    rng = np.random.default_rng(seed)
    rows, columns, vocabulary = len(_SPANS), 8, 6
    mask = np.array([[start <= t < start + length for t in range(columns)] for start, length in _SPANS])
    mask[1, 2] = mask[11, 3] = False  # gaps, as tool output leaves them
    base = rng.normal(size=(rows, columns, vocabulary))
    base[..., -1] = -20.0
    size = np.where(np.arange(rows) % 3 == 0, 0.3, 0.02)[:, None, None]
    pi, old, behaviour = (base + size * rng.normal(size=base.shape) for _ in range(3))
    ref = base + 0.3 * rng.normal(size=base.shape)
    shape = (rows, columns) if advantages == "token" else (rows,)
    return make_batch(
        rng.integers(0, vocabulary - 1, size=(rows, columns)),
        mask,
        (pi, old, behaviour, ref),
        group_ids=np.where(np.arange(rows) % 2 == 0, 7, 3),
        rewards=np.round(rng.permutation(rows) / 8.0 + 0.05 * np.arange(rows), 2),
        advantages=rng.choice([-1.0, 1.0], size=shape) * rng.uniform(0.3, 1.5, size=shape),
        step_ids=(np.cumsum(mask, axis=1) - 1) // 2,
    )
