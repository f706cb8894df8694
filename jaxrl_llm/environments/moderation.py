"""Content moderation as a bandit: publish or block each post, and learn only from what was published.

Setting of GPT-HyperAgent (arXiv 2407.13195 v1): publishing earns +1 where the post is harmless and -0.5 where it is
harmful, blocking always earns +0.5. A published post gets one human review, drawn from the crowd's opinion; a blocked
one tells nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.typing import PRNGKey

PUBLISH, BLOCK = 0, 1
"""The two actions; agents that break ties by number publish."""

HARMLESS_REWARD, HARMFUL_REWARD, BLOCK_REWARD = 1.0, -0.5, 0.5

THRESHOLD = (BLOCK_REWARD - HARMFUL_REWARD) / (HARMLESS_REWARD - HARMFUL_REWARD)
"""Publishing is best iff P(harmless) >= 2/3: p - 0.5 (1 - p) >= 0.5."""


def moderation_rewards(harmless: Float[Array, " N"]) -> Float[Array, "N 2"]:
    """Expected reward of publishing, p - 0.5 (1 - p), and of blocking, 0.5, at each P(harmless) = p."""
    publish = HARMLESS_REWARD * harmless + HARMFUL_REWARD * (1 - harmless)
    return jnp.stack([publish, jnp.full_like(publish, BLOCK_REWARD)], axis=-1)


def lock_in_probability(harmless: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Probability that a greedy agent comes to block for ever although all posts look alike: (sqrt(4/p - 3) - 1) / 2.

    The agent acts on the sum of its rewards so far, publishes when it is not negative, and starts at 0 (a posterior
    mean with prior mean 0 does the same up to ties). Each review moves the sum by +1 with probability p and by -1/2
    else; below 0 it blocks, blocking pays, and no review arrives any more. The chance x that the walk ever falls by 1/2
    solves x = 1 - p + p x^3, whose root in (0, 1) is the formula; for p <= 1/3 it is 1. Derived here.

    Args:
        harmless: p in (0, 1].

    Returns:
        x [prob]; 0.366 at the threshold p = 2/3, from which on publishing is best.
    """
    return jnp.minimum((jnp.sqrt(4 / harmless - 3) - 1) / 2, 1.0)


class Moderation(NamedTuple):
    """Posts that arrive one at a time.

    Attributes:
        inputs: what an agent sees of each post [N, ...]: features, tokens, or its number for agents that hold a table.
        harmless: share of the crowd that finds the post harmless, P(harmless) [N].
        later: posts that arrive in the second half of a run only, the others in the first only (a shift); None: no
            shift.
    """

    inputs: Array
    harmless: Float[Array, " N"]
    later: Bool[np.ndarray, " N"] | None = None

    @property
    def mean_rewards(self) -> Float[Array, "N 2"]:
        """Of each post and action."""
        return moderation_rewards(self.harmless)

    @property
    def best_actions(self) -> Int[Array, " N"]:
        """The oracle's: publish iff P(harmless) >= 2/3."""
        return jnp.where(self.harmless >= THRESHOLD, PUBLISH, BLOCK)

    def arrivals(self, key: PRNGKey, rounds: int) -> Int[Array, " T"]:
        """Which post arrives in each round: all once in random order, then all again in another order, and so on."""
        if self.later is None:
            return _passes(key, jnp.arange(self.harmless.shape[0]), rounds)
        later, half = np.asarray(self.later), rounds // 2
        first, second = jax.random.split(key)
        early = _passes(first, jnp.asarray(np.flatnonzero(~later)), half)
        return jnp.concatenate([early, _passes(second, jnp.asarray(np.flatnonzero(later)), rounds - half)])

    def reward(self, key: PRNGKey, context: Int[Array, ""], action: Int[Array, ""]) -> Float[Array, ""]:
        """What the round earns: 0.5 if blocked; if published 1 or -0.5, as one random person of the crowd judges."""
        harmless = jax.random.uniform(key) < self.harmless[context]
        published = jnp.where(harmless, HARMLESS_REWARD, HARMFUL_REWARD)
        return jnp.where(action == PUBLISH, published, BLOCK_REWARD)


def _passes(key: PRNGKey, numbers: Int[Array, " N"], rounds: int) -> Int[Array, " T"]:
    """The first `rounds` of endless passes over the numbers, each in an order of its own."""
    passes = -(-rounds // numbers.shape[0])
    orders = jax.vmap(lambda one: jax.random.permutation(one, numbers))(jax.random.split(key, passes))
    return orders.reshape(-1)[:rounds]


def moderation(
    inputs: Array, harmless: Float[Array, " N"], *, later: Bool[np.ndarray, " N"] | None = None
) -> Moderation:
    """The bandit of the given posts.

    Args:
        inputs: of each post.
        harmless: P(harmless) of each post.
        later: see `Moderation`.

    Returns:
        the bandit.

    Raises:
        ValueError: lengths that differ, a share outside [0, 1], no posts, or a half of a shift without posts.
    """
    shares = np.asarray(harmless)
    if shares.size == 0 or len(inputs) != len(shares):
        raise ValueError(f"inputs has {len(inputs)} posts and harmless {len(shares)}; they must be equal and not 0.")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"harmless runs from {shares.min():g} to {shares.max():g}; shares must lie in [0, 1].")
    if later is not None and (len(later) != len(shares) or np.all(later) or not np.any(later)):
        raise ValueError("later must mark some of the posts and not all, with one entry per post.")
    return Moderation(jnp.asarray(inputs), jnp.asarray(shares, jnp.result_type(float)), later)
