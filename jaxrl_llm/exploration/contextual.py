"""Agents that meet one context a round and choose among its actions: how they play, and exact linear ones.

A context is any input that the agent's features take; in content moderation it is a post.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_not_negative
from jaxrl_llm.checks import require_positive
from jaxrl_llm.checks import require_rank
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration.features import Features
from jaxrl_llm.exploration.gaussian import Gaussian
from jaxrl_llm.exploration.gaussian import Hypermodel
from jaxrl_llm.exploration.gaussian import isotropic_prior
from jaxrl_llm.exploration.gaussian import posterior_update
from jaxrl_llm.exploration.indices import IndexLaw
from jaxrl_llm.exploration.linear import hyperagent
from jaxrl_llm.exploration.neural import NeuralAgent
from jaxrl_llm.tabular import first_maxima
from jaxrl_llm.typing import PRNGKey


@runtime_checkable
class ContextualBandit(Protocol):
    """What `play_contexts` needs of a bandit with N contexts and the same A actions at each.

    Attributes:
        inputs: what an agent sees of each context [N, ...].
        mean_rewards: of each context and action [N, A].
    """

    @property
    def inputs(self) -> Array:  # noqa: D102, said above
        ...

    @property
    def mean_rewards(self) -> Float[Array, "N A"]:  # noqa: D102
        ...

    def arrivals(self, key: PRNGKey, rounds: int) -> Int[Array, " T"]:
        """Which context arrives in each round."""
        ...

    def reward(self, key: PRNGKey, context: Int[Array, ""], action: Int[Array, ""]) -> Float[Array, ""]:
        """A random reward of an action at a context."""
        ...


class ContextualPlay(NamedTuple):
    """What a run of `play_contexts` leaves.

    Attributes:
        regrets: best mean reward at the context minus that of the choice, per round [T]; exact, no noise.
        actions: the choices [T].
        contexts: which contexts arrived [T].
        state: the agent's state after the last round.
    """

    regrets: Float[Array, " T"]
    actions: Int[Array, " T"]
    contexts: Int[Array, " T"]
    state: Any


def play_contexts(agent: NeuralAgent, bandit: ContextualBandit, key: PRNGKey, *, rounds: int) -> ContextualPlay:
    """One run of an agent: see a context, act, observe, update, `rounds` times, as one scan.

    Args:
        agent: with as many outputs as the bandit has actions.
        bandit: the bandit.
        key: random key of the run.
        rounds: T.

    Returns:
        exact regrets in units of reward, actions, contexts and the last state.

    Raises:
        ValueError: if rounds is below 1, or the agent has another number of outputs.
    """
    require_at_least("rounds", rounds, 1)
    means = bandit.mean_rewards
    if agent.outputs != means.shape[1]:
        raise ValueError(f"agent has {agent.outputs} outputs; the bandit has {means.shape[1]} actions.")
    init_key, arrivals_key, rounds_key = jax.random.split(key, 3)
    contexts = bandit.arrivals(arrivals_key, rounds)

    def step(state: Any, drawn: tuple[Array, PRNGKey]) -> tuple[Any, tuple[Array, Array]]:
        context, round_key = drawn
        act_key, reward_key, update_key = jax.random.split(round_key, 3)
        seen = bandit.inputs[context]
        action = agent.act(state, act_key, seen[None])
        reward = bandit.reward(reward_key, context, action)
        regret = jnp.max(means[context]) - means[context, action]
        return agent.update(state, update_key, seen, action, reward), (regret, action)

    keys = jax.random.split(rounds_key, rounds)
    state, (regrets, actions) = jax.lax.scan(step, agent.init(init_key), (contexts, keys))
    return ContextualPlay(regrets, actions, contexts, state)


def independent_linear(
    features: Features,
    *,
    outputs: int,
    prior_scale: float = 1.0,
    noise_scale: float = 1.0,
    inflation: float = 1.0,
) -> NeuralAgent:
    """Exact Bayesian linear regression per action; acts on one draw of each action's value at the context.

    theta_a ~ N(0, s^2 I) independent, r = <theta_a, phi(x)> + N(0, sigma^2). The value of action a at x is
    N(<mu_a, phi>, phi^T Sigma_a phi), independent over actions: drawing these is Thompson sampling for one context a
    round, without a factor of Sigma_a. With inflation 0 it is the greedy agent on the posterior mean.

    Args:
        features: phi, without parameters.
        outputs: how many actions.
        prior_scale: s.
        noise_scale: sigma.
        inflation: factor of the draw's standard deviation; 1 is Bayes' rule, 0 greedy.

    Returns:
        the agent; its state is a `Gaussian` with a leading axis of actions.

    Raises:
        ValueError: if a scale is not positive, inflation is negative, outputs is below 1, or features have parameters.
    """
    require_at_least("outputs", outputs, 1)
    _require_given(features)
    require_positive("prior_scale", prior_scale)
    require_positive("noise_scale", noise_scale)
    require_not_negative("inflation", inflation)

    def init(key: PRNGKey) -> Gaussian:
        one = isotropic_prior(features.width, prior_scale)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (outputs, *leaf.shape)), one)

    def act(state: Gaussian, key: PRNGKey, inputs: Array) -> Int[Array, ""]:
        phi = features.apply((), inputs)
        means = jnp.einsum("bp,op->bo", phi, state.mean)
        variances = jnp.einsum("bp,opq,bq->bo", phi, state.covariance, phi)
        draws = jax.random.normal(key, means.shape, means.dtype)
        # Rounding can leave a variance of -1e-9 where the posterior is sure.
        return first_maxima((means + inflation * jnp.sqrt(jnp.maximum(variances, 0.0)) * draws).reshape(-1))

    def update(state: Gaussian, key: PRNGKey, chosen: Array, output: Any, reward: Any) -> Gaussian:
        one = jax.tree.map(lambda leaf: leaf[output], state)
        after = posterior_update(one, features.apply((), chosen[None])[0], reward, noise_scale=noise_scale)
        return jax.tree.map(lambda all_actions, leaf: all_actions.at[output].set(leaf), state, after)

    return NeuralAgent(init, act, update, outputs)


def independent_hyperagent(
    features: Features,
    *,
    outputs: int,
    index_dimension: int,
    law: IndexLaw = indices.SPHERE,
    prior_scale: float = 1.0,
    noise_scale: float = 1.0,
) -> NeuralAgent:
    """HyperAgent with the incremental update, one hypermodel per action: acts on <mu_a + A_a xi, phi>, xi fresh.

    As `hyperagent`, whose state it keeps per action; one index a round serves all actions.

    Args:
        features: phi, without parameters.
        outputs: how many actions.
        index_dimension: M.
        law: of the index, of what is stored with a datum, and of the rows of the prior factor.
        prior_scale: s.
        noise_scale: sigma.

    Returns:
        the agent; its state is a `Hypermodel` with a leading axis of actions.

    Raises:
        ValueError: if a scale is not positive, outputs or index_dimension is below 1, or features have parameters.
    """
    require_at_least("outputs", outputs, 1)
    _require_given(features)
    one = hyperagent(
        features.width,
        index_dimension=index_dimension,
        reference=law,
        perturbation=law,
        prior_factor=law,
        prior_scale=prior_scale,
        noise_scale=noise_scale,
    )

    def init(key: PRNGKey) -> Hypermodel:
        return jax.vmap(one.init)(jax.random.split(key, outputs))

    def act(state: Hypermodel, key: PRNGKey, inputs: Array) -> Int[Array, ""]:
        index = law.reference(key, (index_dimension,))
        return first_maxima((features.apply((), inputs) @ (state.posterior.mean + state.factor @ index).T).reshape(-1))

    def update(state: Hypermodel, key: PRNGKey, chosen: Array, output: Any, reward: Any) -> Hypermodel:
        stored = law.perturbation(key, (index_dimension,))
        before = jax.tree.map(lambda leaf: leaf[output], state)
        after = one.update(before, stored, features.apply((), chosen[None])[0], reward)
        return jax.tree.map(lambda all_actions, leaf: all_actions.at[output].set(leaf), state, after)

    return NeuralAgent(init, act, update, outputs)


def _require_given(features: Features) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(features.init, jax.random.key(0))))
    if count:
        raise ValueError(
            f"features have {count} parameters; an exact linear agent needs features without any (given_features, "
            "rows_of)."
        )


def rows_of(table: Float[Array, "*shape"]) -> Features:
    """Features of numbered inputs: row i of a table that was computed once.

    Replay buffers then hold numbers instead of features.

    Args:
        table: features of all inputs; closed over, never trained.

    Returns:
        features without parameters; inputs are integers.

    Raises:
        ValueError: if the table has not two axes.
    """
    require_rank(2, "N P", table=table)

    def apply(parameters: Any, inputs: Int[Array, " B"]) -> Float[Array, "B P"]:
        return table[inputs]

    first: Callable[[PRNGKey], Any] = lambda key: ()  # noqa: E731
    return Features(first, apply, table.shape[1], (), jnp.int32)
