"""Playing a bandit that shows a few of its actions each round."""

from typing import Any
from typing import Protocol
from typing import runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.exploration.agent import Agent
from jaxrl_llm.exploration.agent import Play
from jaxrl_llm.exploration.agent import scan_blocks
from jaxrl_llm.typing import PRNGKey


@runtime_checkable
class NoisyBandit(Protocol):
    """What `play_shown` needs of a bandit: features and means of its actions, and how a reward is observed."""

    @property
    def features(self) -> Float[Array, "X D"]:
        """Of each action."""
        ...

    @property
    def mean_rewards(self) -> Float[Array, " X"]:
        """Of each action."""
        ...

    def draw_noise(self, key: PRNGKey, rounds: int) -> Float[Array, " T"]:
        """The noise of that many rounds."""
        ...

    def observe(self, mean: Float[Array, ""], noise: Float[Array, ""]) -> Float[Array, ""]:
        """The reward of an action with that mean."""
        ...


def play_shown(agent: Agent, bandit: NoisyBandit, key: PRNGKey, *, rounds: int, shown: int) -> Play:
    """As `play`, but each round shows a uniformly random subset of the actions; regret is against the best of those.

    Args:
        agent: the agent.
        bandit: the bandit.
        key: random key of the run; what is shown and the noise do not depend on the agent.
        rounds: T.
        shown: actions per round.

    Returns:
        exact regrets in units of reward, actions numbered in the whole set, and the last state.

    Raises:
        ValueError: if rounds is below 1 or shown is not between 1 and the number of actions.
    """
    features, means = bandit.features, bandit.mean_rewards
    require_at_least("rounds", rounds, 1)
    if not 1 <= shown <= means.shape[0]:
        raise ValueError(f"shown is {shown}; it must be between 1 and the {means.shape[0]} actions.")
    init_key, noise_key, rounds_key = jax.random.split(key, 3)

    def order(shuffle_key: PRNGKey) -> Array:
        return jax.random.permutation(shuffle_key, means.shape[0])[:shown]

    def draw(block_key: PRNGKey, length: int) -> tuple[Any, Array]:
        agent_key, shown_key = jax.random.split(block_key)
        return agent.draw(agent_key, length), jax.vmap(order)(jax.random.split(shown_key, length))

    def step(state: Any, drawn: tuple[tuple[tuple[Any, Any], Array], Array]) -> tuple[Any, tuple[Array, Array]]:
        ((to_act, to_update), places), round_noise = drawn
        candidates = features[places]
        chosen = agent.act(state, to_act, candidates)
        means_shown = means[places]
        mean = means_shown[chosen]
        state = agent.update(state, to_update, candidates[chosen], bandit.observe(mean, round_noise))
        return state, (jnp.max(means_shown) - mean, places[chosen])

    noise = bandit.draw_noise(noise_key, rounds)
    state, (regrets, actions) = scan_blocks(step, agent.init(init_key), draw, rounds_key, noise)
    return Play(regrets, actions, state)
