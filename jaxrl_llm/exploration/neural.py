"""Neural agents: a value model, a replay buffer and an optimizer, as pure functions (init, act, update).

They act greedily on f(x, xi) for one fresh index per round and fit f to rewards that the index perturbs. Sources:
GPT-HyperAgent and Ensemble++ (arXiv 2407.13195), HyperAgent (arXiv 2402.10228); ensembles with priors, Osband et al.
2018; epinets, Osband et al. 2021; Langevin Thompson sampling, Xu et al. 2022 (arXiv 2206.11254).
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_not_negative
from jaxrl_llm.checks import require_positive
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration.agent import Agent
from jaxrl_llm.exploration.heads import ValueModel
from jaxrl_llm.exploration.index_losses import index_loss
from jaxrl_llm.exploration.index_losses import separated_loss
from jaxrl_llm.exploration.index_losses import squared_norm
from jaxrl_llm.exploration.indices import IndexLaw
from jaxrl_llm.exploration.indices import update_indices
from jaxrl_llm.exploration.langevin import langevin_noise
from jaxrl_llm.exploration.replay import Data
from jaxrl_llm.exploration.replay import Replay
from jaxrl_llm.exploration.replay import add
from jaxrl_llm.exploration.replay import empty_replay
from jaxrl_llm.exploration.replay import sample
from jaxrl_llm.tabular import first_maxima
from jaxrl_llm.typing import PRNGKey

Loss = Callable[[Any, Any, Data, PRNGKey], Float[Array, " B"]]
"""(trained, prior, data, key) -> one loss per datum."""


class Learning(NamedTuple):
    """How a value model is fitted.

    The objective is mean_B loss + weight_decay / |D| |theta|^2, B a minibatch of the |D| data in the buffer.

    Attributes:
        optimizer: an optax transformation.
        noise_scale: sigma, standard deviation of the perturbation of a reward.
        weight_decay: beta; the prior precision of the weights, in units of the loss of one datum.
        batch: data per gradient step.
        capacity: of the replay buffer; older data are forgotten.
        start: rounds before the first step.
        every: rounds between two times of learning.
        steps: gradient steps each time.
    """

    optimizer: optax.GradientTransformation
    noise_scale: float = 0.01
    weight_decay: float = 0.01
    batch: int = 128
    capacity: int = 10_000
    start: int = 128
    every: int = 1
    steps: int = 1


class NeuralState(NamedTuple):
    """State of a neural agent.

    Attributes:
        trained: parameters that learn.
        prior: parameters that do not.
        optimizer: state of the optimizer.
        replay: the data.
    """

    trained: Any
    prior: Any
    optimizer: Any
    replay: Replay


class NeuralAgent(NamedTuple):
    """A neural agent as pure functions; a choice is a pair of an input and one of its outputs.

    Attributes:
        init: key -> state before the first round: any pytree, a `NeuralState` for the agents below.
        act: (state, key, inputs [X, *input_shape]) -> the choice, numbered row * O + output. With X = 1 it is the
            action at one context, with O = 1 the row of one action.
        update: (state, key, input [*input_shape], output, reward) -> next state: stores the datum, learns when due.
        outputs: O.
    """

    init: Callable[[PRNGKey], Any]
    act: Callable[[Any, PRNGKey, Array], Int[Array, ""]]
    update: Callable[[Any, PRNGKey, Array, Int[Array, ""] | int, Float[Array, ""] | float], Any]
    outputs: int


def _require_learning(learning: Learning) -> None:
    require_positive("noise_scale", learning.noise_scale)
    require_not_negative("weight_decay", learning.weight_decay)
    for name in ("batch", "capacity", "every", "steps"):
        require_at_least(name, getattr(learning, name), 1)
    require_at_least("start", learning.start, 0)


def learn(state: NeuralState, key: PRNGKey, loss: Loss, learning: Learning) -> NeuralState:
    """`learning.steps` gradient steps on fresh minibatches of the buffer, which must not be empty."""
    optimizer = optax.with_extra_args_support(learning.optimizer)
    count = state.replay.size.astype(state.replay.data.rewards.dtype)

    def objective(trained: Any, data: Data, loss_key: PRNGKey) -> Float[Array, ""]:
        return jnp.mean(loss(trained, state.prior, data, loss_key)) + learning.weight_decay / count * squared_norm(
            trained
        )

    def step(carry: tuple[Any, Any], step_key: PRNGKey) -> tuple[tuple[Any, Any], None]:
        trained, optimizer_state = carry
        sample_key, loss_key, noise_key = jax.random.split(step_key, 3)
        gradient = jax.grad(objective)(trained, sample(state.replay, sample_key, learning.batch), loss_key)
        change, optimizer_state = optimizer.update(gradient, optimizer_state, trained, key=noise_key, count=count)
        return (optax.apply_updates(trained, change), optimizer_state), None

    keys = jax.random.split(key, learning.steps)
    (trained, optimizer_state), _ = jax.lax.scan(step, (state.trained, state.optimizer), keys)
    return state._replace(trained=trained, optimizer=optimizer_state)


def neural_agent(
    model: ValueModel,
    loss: Loss,
    learning: Learning,
    *,
    reference: Callable[[PRNGKey, tuple[int, ...]], Array],
    perturbation: Callable[[PRNGKey, tuple[int, ...]], Array],
    epsilon: float = 0.0,
) -> NeuralAgent:
    """The agent of a value model, a loss and the laws of its indices; the named agents below are made by it.

    Args:
        model: f.
        loss: what a datum costs.
        learning: how and when it is fitted.
        reference: law of the index of a round.
        perturbation: law of what is stored with a datum.
        epsilon: probability of a uniformly random choice.

    Returns:
        the agent.

    Raises:
        ValueError: if a size or scale of `learning` is not possible, or epsilon is not in [0, 1].
    """
    _require_learning(learning)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; it must be in [0, 1].")

    def init(key: PRNGKey) -> NeuralState:
        trained, prior = model.init(key)
        replay = empty_replay(
            learning.capacity,
            input_shape=model.input_shape,
            index_dimension=model.index_dimension,
            input_dtype=model.input_dtype,
        )
        return NeuralState(trained, prior, learning.optimizer.init(trained), replay)

    def act(state: NeuralState, key: PRNGKey, inputs: Array) -> Int[Array, ""]:
        index_key, coin_key, random_key = jax.random.split(key, 3)
        index = reference(index_key, (1, 1, model.index_dimension))
        best = first_maxima(model.values(state.trained, state.prior, inputs, index)[:, 0].reshape(-1))
        if epsilon == 0:
            return best
        anything = jax.random.randint(random_key, (), 0, inputs.shape[0] * model.outputs)
        return jnp.where(jax.random.uniform(coin_key) < epsilon, anything, best)

    def update(state: NeuralState, key: PRNGKey, chosen: Array, output: Any, reward: Any) -> NeuralState:
        perturbation_key, learning_key = jax.random.split(key)
        stored = perturbation(perturbation_key, (model.index_dimension,))
        datum = Data(chosen, jnp.asarray(output), jnp.asarray(reward), stored)
        state = state._replace(replay=add(state.replay, datum))
        # The number of rounds is the same for all seeds, so that this stays a branch under vmap.
        rounds = state.replay.added
        due = (rounds >= max(learning.start, 1)) & (rounds % learning.every == 0)
        trained, optimizer = jax.lax.cond(
            due,
            lambda now: (lambda after: (after.trained, after.optimizer))(learn(now, learning_key, loss, learning)),
            lambda now: (now.trained, now.optimizer),
            state,
        )
        return state._replace(trained=trained, optimizer=optimizer)

    return NeuralAgent(init, act, update, model.outputs)


def neural_hyperagent(
    model: ValueModel,
    learning: Learning,
    *,
    reference: IndexLaw = indices.SPHERE,
    update: IndexLaw = indices.COORDINATE,
    perturbation: IndexLaw = indices.SPHERE,
    draws: int = 16,
) -> NeuralAgent:
    """HyperAgent: `index_loss` over the update set, or over `draws` fresh indices per datum where the law has no set.

    Also the agent of an epinet, with Gaussian references and updates.

    Args:
        model: f.
        learning: how it is fitted.
        reference: law of xi to act with.
        update: law of xi in the loss.
        perturbation: law of z.
        draws: indices per datum where the update law has no finite set.

    Returns:
        the agent.

    Raises:
        ValueError: as `neural_agent`, or if the model has no index.
    """
    require_at_least("draws", draws, 1)
    require_at_least("index_dimension of the model", model.index_dimension, 1)

    def loss(trained: Any, prior: Any, data: Data, key: PRNGKey) -> Float[Array, " B"]:
        if update.update_set is None:
            over = update.reference(key, (data.rewards.shape[0], draws, model.index_dimension))
        else:
            over = update_indices(update, key, model.index_dimension, draws=draws)[None]
        return index_loss(model, trained, prior, data, over, noise_scale=learning.noise_scale)

    return neural_agent(model, loss, learning, reference=reference.reference, perturbation=perturbation.perturbation)


def ensemble_plus_plus(
    model: ValueModel,
    learning: Learning,
    *,
    reference: IndexLaw = indices.SPHERE,
    perturbation: IndexLaw = indices.SPHERE,
) -> NeuralAgent:
    """Ensemble++: `separated_loss` with the features held constant in the factor.

    Args:
        model: f, linear in its index.
        learning: how it is fitted.
        reference: law of xi to act with.
        perturbation: law of z.

    Returns:
        the agent.

    Raises:
        ValueError: as `neural_agent`, or if the model is not linear in its index.
    """
    parts = model.held_parts
    if parts is None:
        raise ValueError("model has no held_parts; ensemble_plus_plus needs one that is linear in the index.")

    def loss(trained: Any, prior: Any, data: Data, key: PRNGKey) -> Float[Array, " B"]:
        return separated_loss(parts, trained, prior, data, noise_scale=learning.noise_scale)

    return neural_agent(model, loss, learning, reference=reference.reference, perturbation=perturbation.perturbation)


def ensemble_plus(model: ValueModel, learning: Learning) -> NeuralAgent:
    """Acts on one member of an ensemble, uniformly chosen; member m is fitted to r + sigma z_m with z_m ~ N(0, 1).

    Departures: public code stores z ~ N(0, I / M), which divides each member's noise by sqrt(M) (errata F9.4).

    Args, Returns, Raises as `neural_agent`.
    """
    law = indices.ONE_HOT._replace(perturbation=indices.GAUSSIAN.reference)
    return neural_hyperagent(model, learning, reference=law, update=law, perturbation=law)


def _no_index(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape)


def neural_greedy(model: ValueModel, learning: Learning, *, epsilon: float = 0.0) -> NeuralAgent:
    """Acts on the fitted value of a model without an index; with probability epsilon at random.

    Args, Returns as `neural_agent`.

    Raises:
        ValueError: as `neural_agent`, or if the model has an index.
    """
    if model.index_dimension != 0:
        raise ValueError(f"model has index_dimension {model.index_dimension}; this agent needs one without an index.")

    def loss(trained: Any, prior: Any, data: Data, key: PRNGKey) -> Float[Array, " B"]:
        over = jnp.zeros((1, 1, 0))
        return index_loss(model, trained, prior, data, over, noise_scale=learning.noise_scale)

    return neural_agent(model, loss, learning, reference=_no_index, perturbation=_no_index, epsilon=epsilon)


def langevin_sampling(model: ValueModel, learning: Learning, *, step_size: float, temperature: float) -> NeuralAgent:
    """LMC-TS: acts on a model whose every gradient step adds noise, so that its weights are nearly a posterior draw.

    theta <- theta - step_size grad J + sqrt(2 step_size temperature / |D|) N(0, I), J = mean loss + beta / |D|
    |theta|^2: Langevin's iteration on |D| J / temperature with steps step_size temperature / |D|. `learning.optimizer`
    is applied to the gradient first and must not turn it around: optax.identity() for the plain iteration, or a
    preconditioner such as optax.scale_by_rms(), not a descent step such as optax.adam.

    Args:
        model: f, without an index.
        learning: how and when it is fitted.
        step_size: eta.
        temperature: 1 / inverse temperature, in squared units of reward.

    Returns, Raises as `neural_greedy`; a ValueError by its `init`, if the optimizer turns gradients around.
    """
    noisy = langevin_noise(learning.optimizer, step_size=step_size, temperature=temperature)
    return neural_greedy(model, learning._replace(optimizer=noisy))


def as_agent(agent: NeuralAgent) -> Agent:
    """The agent in the form that `play` takes: its choices are rows of features.

    Raises:
        ValueError: if it has more than one output.
    """
    if agent.outputs != 1:
        raise ValueError(f"agent has {agent.outputs} outputs; an agent that chooses among rows has 1.")

    def draw(key: PRNGKey, rounds: int) -> tuple[Array, Array]:
        act_key, update_key = jax.random.split(key)
        return jax.random.split(act_key, rounds), jax.random.split(update_key, rounds)

    def update(state: NeuralState, key: PRNGKey, features: Array, reward: Array) -> NeuralState:
        return agent.update(state, key, features, 0, reward)

    return Agent(agent.init, draw, agent.act, update)
