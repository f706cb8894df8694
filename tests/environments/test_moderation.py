"""Publish or block: rewards, the oracle's threshold, what arrives when."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments import lock_in_probability
from jaxrl_llm.environments import moderation
from jaxrl_llm.environments import moderation_rewards
from jaxrl_llm.environments.moderation import BLOCK
from jaxrl_llm.environments.moderation import PUBLISH
from jaxrl_llm.environments.moderation import THRESHOLD
from jaxrl_llm.exploration import independent_linear
from jaxrl_llm.exploration import play_contexts
from jaxrl_llm.exploration import rows_of


def test_publishing_is_best_from_two_thirds_on() -> None:
    assert Fraction(2, 3) == Fraction(1 + 1, 2 + 1) == pytest.approx(THRESHOLD)
    shares = jnp.linspace(0, 1, 31)
    rewards = moderation_rewards(shares)
    np.testing.assert_allclose(rewards[:, PUBLISH], shares - 0.5 * (1 - shares), rtol=1e-6)
    np.testing.assert_array_equal(rewards[:, BLOCK], 0.5)
    better = np.asarray(rewards[:, PUBLISH] > rewards[:, BLOCK] + 1e-6)
    np.testing.assert_array_equal(better, np.arange(31) > 20)
    best = moderation(jnp.arange(31), shares).best_actions
    chosen = jnp.take_along_axis(rewards, best[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, rewards.max(1), atol=1e-6)
    # The rule "more likely harmless than not" would lose at shares between 1/2 and 2/3.
    wrong = jnp.where(shares > 0.5, rewards[:, PUBLISH], rewards[:, BLOCK])
    assert (wrong < rewards.max(1) - 0.01).sum() == 4


def test_rewards_average_to_their_means(key: jax.Array) -> None:
    bandit = moderation(jnp.arange(3), jnp.array([0.0, 0.3, 1.0]))
    keys = jax.random.split(key, 20_000)
    for post in range(3):
        drawn = jax.vmap(lambda one, post=post: bandit.reward(one, jnp.asarray(post), jnp.asarray(PUBLISH)))(keys)
        assert set(np.unique(drawn)) <= {-0.5, 1.0}
        np.testing.assert_allclose(drawn.mean(), bandit.mean_rewards[post, PUBLISH], atol=0.02)
        assert bandit.reward(keys[0], jnp.asarray(post), jnp.asarray(BLOCK)) == 0.5


def test_every_post_arrives_once_in_a_pass(key: jax.Array) -> None:
    bandit = moderation(jnp.arange(7), jnp.full(7, 0.5))
    arrived = bandit.arrivals(key, 17)
    assert arrived.shape == (17,)
    for start in (0, 7):
        np.testing.assert_array_equal(np.sort(arrived[start : start + 7]), np.arange(7))
    assert list(arrived[:7]) != list(arrived[7:14])


def test_after_a_shift_other_posts_arrive(key: jax.Array) -> None:
    later = np.array([False, True, False, True, True])
    bandit = moderation(jnp.arange(5), jnp.full(5, 0.5), later=later)
    arrived = np.asarray(bandit.arrivals(key, 21))
    assert not later[arrived[:10]].any()
    assert later[arrived[10:]].all()


def test_posts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs has 3 posts and harmless 2"):
        moderation(jnp.arange(3), jnp.ones(2))
    with pytest.raises(ValueError, match="harmless runs from 0 to 2"):
        moderation(jnp.arange(2), jnp.array([0.0, 2.0]))
    with pytest.raises(ValueError, match="later must mark some of the posts"):
        moderation(jnp.arange(2), jnp.ones(2), later=np.array([True, True]))


@pytest.mark.parametrize("share", [0.4, 2 / 3, 0.9])
def test_lock_in_by_enumeration_of_the_walk(share: float) -> None:
    """Law of the sum in halves, reviews that went below 0 set aside; 4,000 reviews stand for all."""
    law, gone = np.zeros(9000), 0.0
    law[0] = 1.0
    for _ in range(4000):
        gone += (1 - share) * law[0]
        law = np.concatenate([(1 - share) * law[1:], [0.0]]) + share * np.concatenate([[0.0, 0.0], law[:-2]])
    exact = float(lock_in_probability(jnp.asarray(share)))
    assert exact == pytest.approx(gone, abs=1e-4)
    wrong = (np.sqrt(4 / share + 3) - 1) / 2
    assert abs(wrong - gone) > 0.1


def test_lock_in_is_sure_where_reviews_are_mostly_bad() -> None:
    np.testing.assert_allclose(lock_in_probability(jnp.array([0.2, 1 / 3, 1.0])), [1.0, 1.0, 0.0], atol=1e-6)


def test_the_agent_on_the_posterior_mean_locks_in_as_often(key: jax.Array) -> None:
    """Where the sum comes back to exactly 0, rounding decides; a tie that blocks gives 1 - p + p x^2 instead of x."""
    share, runs = 0.7, 2000
    agent = independent_linear(rows_of(jnp.ones((1, 1))), outputs=2, inflation=0.0)
    posts = moderation(jnp.zeros(1, int), jnp.array([share]))
    last = jax.jit(jax.vmap(lambda one: play_contexts(agent, posts, one, rounds=120).actions[-1]))(
        jax.random.split(key, runs)
    )
    found, error = float(np.mean(np.asarray(last) == BLOCK)), 3 * (0.35 * 0.65 / runs) ** 0.5
    low = float(lock_in_probability(jnp.asarray(share)))
    high = 1 - share + share * low**2
    assert low - error < found < high + error
