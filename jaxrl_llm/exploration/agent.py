"""What an agent is, and how one plays a bandit: pure functions, scanned over rounds.

The environment is any object with `features`, `mean_rewards` and `noise_scale`, so that nothing here depends on where
it comes from. Seeds are an axis: `jax.vmap(lambda key: play(agent, bandit(key), key, rounds=T))`.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.exploration.posteriors import require_sound
from jaxrl_llm.typing import PRNGKey

LONGEST_BLOCK = 128
"""Random numbers are made for this many rounds at a time: much faster than round by round, and little memory."""


class Agent(NamedTuple):
    """A bandit agent as pure functions of its state, which is any pytree. Only `init` and `draw` are random.

    Attributes:
        init: key -> state before the first round.
        draw: (key, rounds) -> (for act, for update): the randomness of that many rounds, any two pytrees whose arrays
            have a leading axis of rounds.
        act: (state, what was drawn for this round, features [X, D]) -> index of the chosen action.
        update: (state, what was drawn for this round, features of the chosen action [D], its reward) -> next state.
    """

    init: Callable[[PRNGKey], Any]
    draw: Callable[[PRNGKey, int], tuple[Any, Any]]
    act: Callable[[Any, Any, Float[Array, "X D"]], Int[Array, ""]]
    update: Callable[[Any, Any, Float[Array, " D"], Float[Array, ""]], Any]


@runtime_checkable
class Bandit(Protocol):
    """What `play` needs of a bandit with a fixed finite set of actions and Gaussian noise.

    Attributes:
        features: of each action, [X, D].
        mean_rewards: of each action, [X].
        noise_scale: standard deviation of a reward given its action.
    """

    @property
    def features(self) -> Float[Array, "X D"]:  # noqa: D102, said above
        ...

    @property
    def mean_rewards(self) -> Float[Array, " X"]:  # noqa: D102
        ...

    @property
    def noise_scale(self) -> Float[Array, ""] | float:  # noqa: D102
        ...


def scan_blocks(
    step: Callable[[Any, tuple[Any, Array]], tuple[Any, Any]],
    state: Any,
    draw: Callable[[PRNGKey, int], Any],
    key: PRNGKey,
    noise: Float[Array, " T"],
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step` over T rounds, whose random numbers are drawn a block of rounds at a time.

    Args:
        step: (state, (what was drawn for the round, its noise)) -> (state, outputs).
        state: before the first round.
        draw: (key, rounds) -> random numbers of that many rounds, along the first axis of every leaf.
        key: random key.
        noise: one number per round.

    Returns:
        the last state, and the outputs of all rounds.
    """
    rounds = noise.shape[0]
    length = max(size for size in range(1, min(rounds, LONGEST_BLOCK) + 1) if rounds % size == 0)

    def block(carry: Any, drawn: tuple[PRNGKey, Array]) -> tuple[Any, Any]:
        block_key, block_noise = drawn
        return jax.lax.scan(step, carry, (draw(block_key, length), block_noise))

    keys = jax.random.split(key, rounds // length)
    state, outputs = jax.lax.scan(block, state, (keys, noise.reshape(-1, length)))
    return state, jax.tree.map(lambda leaf: leaf.reshape(rounds, *leaf.shape[2:]), outputs)


class Play(NamedTuple):
    """What a run of `play` leaves.

    Attributes:
        regrets: max over actions of the mean reward, minus that of the chosen one, per round [T]; exact, no noise.
        actions: the chosen actions [T].
        state: the agent's state after the last round.
    """

    regrets: Float[Array, " T"]
    actions: Int[Array, " T"]
    state: Any


def play(agent: Agent, bandit: Bandit, key: PRNGKey, *, rounds: int) -> Play:
    """One run of an agent on a bandit: act, observe mean + noise, update, `rounds` times, as one scan.

    Args:
        agent: the agent.
        bandit: the bandit.
        key: random key of the run.
        rounds: T.

    Returns:
        exact regrets in units of reward, actions, and the last state.

    Raises:
        ValueError: if rounds is below 1, or the agent was made for another dimension.
        PosteriorError: if the agent's posterior is none any more; known outside jit, vmap and grad only, so that what
            comes out of these should be given to `require_sound`.
    """
    require_at_least("rounds", rounds, 1)
    features, means = bandit.features, bandit.mean_rewards
    best = jnp.max(means)
    init_key, noise_key, rounds_key = jax.random.split(key, 3)
    noise = bandit.noise_scale * jax.random.normal(noise_key, (rounds,), means.dtype)
    # One column per action: the products of each round then read memory in order.
    columns = jax.lax.optimization_barrier(features.T)

    def step(state: Any, drawn: tuple[tuple[Any, Any], Array]) -> tuple[Any, tuple[Array, Array]]:
        (to_act, to_update), round_noise = drawn
        action = agent.act(state, to_act, columns.T)
        mean = means[action]
        return agent.update(state, to_update, features[action], mean + round_noise), (best - mean, action)

    state, (regrets, actions) = scan_blocks(step, agent.init(init_key), agent.draw, rounds_key, noise)
    if not isinstance(regrets, Tracer):
        require_sound(state)
    return Play(regrets, actions, state)
