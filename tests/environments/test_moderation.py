"""Publish or block: rewards, the oracle's threshold, what arrives when."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments import moderation
from jaxrl_llm.environments import moderation_rewards
from jaxrl_llm.environments.moderation import BLOCK
from jaxrl_llm.environments.moderation import PUBLISH
from jaxrl_llm.environments.moderation import THRESHOLD


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
