"""What an agent for episodes is, and how one plays a finite MDP: pure functions, scanned over episodes.

The MDP is a `TabularMdp`, so that the regret of every episode is computed by dynamic programming, without roll-out
noise. Seeds are an axis: `jax.vmap(lambda key: play_episodes(agent, mdp(key), key, episodes=K))`.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm import tabular
from jaxrl_llm.checks import require_at_least
from jaxrl_llm.tabular import Plan
from jaxrl_llm.tabular import TabularMdp
from jaxrl_llm.typing import PRNGKey


class Episode(NamedTuple):
    """What was met in one episode.

    Attributes:
        states: s_1..s_{H+1}.
        actions: a_1..a_H.
        rewards: r_1..r_H.
    """

    states: Int[Array, " _"]
    actions: Int[Array, " H"]
    rewards: Float[Array, " H"]


class EpisodicAgent(NamedTuple):
    """An agent that settles on a policy before each episode, as pure functions of its state, which is any pytree.

    Attributes:
        init: key -> state before the first episode.
        act: (state, key) -> the plan of the next episode; its policy is followed.
        update: (state, key, that plan, what was met) -> next state.
    """

    init: Callable[[PRNGKey], Any]
    act: Callable[[Any, PRNGKey], Plan]
    update: Callable[[Any, PRNGKey, Plan, Episode], Any]


class EpisodicPlay(NamedTuple):
    """What a run of `play_episodes` leaves.

    Attributes:
        regrets: V*_1 - V_1 of the followed policy, the mean over first states, per episode [K]; exact, no noise.
        measured: what `measure` gave, with a leading axis of episodes.
        state: the agent's state after the last episode.
    """

    regrets: Float[Array, " K"]
    measured: Any
    state: Any


Measure = Callable[[Any, Plan, Episode], Any]
"""(state before the episode, plan, episode) -> any pytree of arrays."""


def _next_state(probabilities: Float[Array, " S"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """The state whose part of the cumulated probabilities holds `uniform`, in [0, 1)."""
    cumulated = jnp.cumsum(probabilities)
    # Times the last entry: rounding must not leave a gap above it.
    return jnp.sum(cumulated <= uniform * cumulated[-1])


def run_episode(mdp: TabularMdp, policy: Int[Array, "H S"], key: PRNGKey) -> Episode:
    """One episode under a deterministic policy.

    Args:
        mdp: the true MDP.
        policy: action of each step and state.
        key: random key.

    Returns:
        what was met.
    """
    horizon = policy.shape[0]
    uniform = jax.random.uniform(key, (horizon + 1,), mdp.rewards.dtype)

    def step(state: Array, known: tuple[Array, Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        moves, rewards, policy_row, chance = known
        action = policy_row[state]
        following = _next_state(moves[state, action], chance)
        return following, (following, action, rewards[state, action])

    first = _next_state(mdp.initial, uniform[0])
    known = (mdp.transitions, mdp.rewards, policy, uniform[1:])
    _, (following, actions, rewards) = jax.lax.scan(step, first, known)
    return Episode(jnp.concatenate([first[None], following]), actions, rewards)


def play_episodes(
    agent: EpisodicAgent, mdp: TabularMdp, key: PRNGKey, *, episodes: int, measure: Measure | None = None
) -> EpisodicPlay:
    """One run of an agent on an MDP: plan, follow the policy for an episode, update, `episodes` times, as one scan.

    Args:
        agent: the agent.
        mdp: the true MDP.
        key: random key of the run.
        episodes: K.
        measure: what else to keep of each episode, if anything.

    Returns:
        exact regrets in units of reward, what was measured, and the last state.

    Raises:
        ValueError: if episodes is below 1, the arrays of the MDP do not fit each other, the agent was made for another
            shape, or (where values are known) probabilities do not sum to 1 or a reward is not finite.
    """
    require_at_least("episodes", episodes, 1)
    tabular.require_mdp(mdp)
    best = tabular.start_value(mdp, tabular.plan(mdp.transitions, mdp.rewards).values)
    init_key, episodes_key = jax.random.split(key)

    def step(state: Any, episode_key: PRNGKey) -> tuple[Any, tuple[Array, Any]]:
        act_key, run_key, update_key = jax.random.split(episode_key, 3)
        plan = agent.act(state, act_key)
        if plan.action_values.shape != mdp.rewards.shape:
            made = plan.action_values.shape
            raise ValueError(f"agent plans for {made} steps, states and actions; the MDP has {mdp.rewards.shape}.")
        episode = run_episode(mdp, plan.policy, run_key)
        regret = best - tabular.start_value(mdp, tabular.evaluate(mdp, plan.policy))
        measured = None if measure is None else measure(state, plan, episode)
        return agent.update(state, update_key, plan, episode), (regret, measured)

    state, (regrets, measured) = jax.lax.scan(step, agent.init(init_key), jax.random.split(episodes_key, episodes))
    return EpisodicPlay(regrets, measured, state)
