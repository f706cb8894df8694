"""A pretrained model that learns sums by reinforcement learning with Adam, and what a plain gradient step would do.

The formula is about a gradient step, so that is what is probed, from the weights of the moment: the step itself is not
taken. The model trains on as in `smollm2_arithmetic`, with Adam, whose change of the weights is probed as well; it has
no eta in the sense of the formula, so that only ratios and orders of sizes mean anything there.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.dynamics.follow import measuring_steps
from experiments.dynamics.learner import Batch
from experiments.dynamics.learner import Learner
from experiments.dynamics.learner import policy_gradient
from experiments.dynamics.learner import scaled
from experiments.dynamics.probe import batch_probe
from experiments.dynamics.probe import choose_tokens
from experiments.dynamics.probe import token_probe
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import before_stop
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.trainable import combine
from jaxrl_llm.models.trainable import first_trained_layer
from jaxrl_llm.models.trainable import top_layers
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives.advantages import group_normalised
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts import predicting
from jaxrl_llm.rollouts import response_columns
from jaxrl_llm.training import end_tokens
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

BETA_2 = 0.95
"""Of Adam, as in `smollm2_arithmetic`."""


class _Answers:
    """What the functions of the language model share."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        task: Task,
        *,
        layers: int,
        prompts: int,
        group_size: int,
        prompt_length: int,
        response_length: int,
    ) -> None:
        self.tokenizer, self.task, self.prompts, self.group_size = tokenizer, task, prompts, group_size
        self.prompt_length, self.response_length, self.seen = prompt_length, response_length, 0
        self.graphdef, state = nnx.split(model)
        self.learned, self.frozen = top_layers(layers).partition(state)
        self.first = first_trained_layer(self.learned, len(model.layers))
        self.generate = make_generate(
            self.graphdef,
            max_new_tokens=response_length,
            group_size=group_size,
            sampling=SamplingSettings(),
            eos_id=end_tokens(tokenizer, task.stop),
            pad_id=tokenizer.pad_id,
        )
        graphdef, first = self.graphdef, self.first
        self.trunk = jax.jit(lambda state, tokens, mask: nnx.merge(graphdef, state).trunk(tokens, mask, stop=first))

    def logits(self, learned: PyTree, frozen: PyTree, texts: tuple[Array, Array]) -> Array:
        """Of every response token, from the output of the frozen layers."""
        model = nnx.merge(self.graphdef, learned, frozen)
        return model.logits(predicting(model.from_trunk(*texts, start=self.first), self.response_length))

    def sample(self, learned: PyTree, frozen: PyTree, key: PRNGKey) -> Batch:
        """Groups of answers to the next problems."""
        problems, state = self.task.train(0, self.seen, self.prompts), combine(learned, frozen)
        self.seen += 1
        asked = self.tokenizer.encode_batch([one.prompt for one in problems], length=self.prompt_length)
        tokens, mask = (jnp.asarray(x) for x in asked)
        rollout = self.generate(state, tokens, mask, key, 0, jnp.arange(self.prompts))
        answers, real = (response_columns(x, self.response_length) for x in (rollout.tokens, rollout.response_mask))
        texts = [
            before_stop(text, self.task.stop)
            for text in self.tokenizer.decode_batch(np.asarray(answers), np.asarray(real))
        ]
        rewards = [self.task.score(problems[row // self.group_size], text).reward for row, text in enumerate(texts)]
        reward = jnp.asarray(rewards, jnp.float32)
        trunk = self.trunk(state, rollout.tokens, rollout.token_mask)
        advantages = group_normalised(reward, jnp.asarray(rollout.group_ids))
        return Batch((trunk, rollout.token_mask), answers, real, advantages, jnp.mean(reward))


def answers_learner(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    *,
    layers: int,
    prompts: int,
    group_size: int,
    prompt_length: int,
    response_length: int,
) -> Learner:
    """A pretrained model that answers problems; it samples outside of compiled programs, one batch after the other.

    Args:
        model: a pretrained one.
        tokenizer: of the model.
        task: what it learns.
        layers: how many layers learn, from the top.
        prompts: problems per batch.
        group_size: answers to each.
        prompt_length: width of the prompts [tokens].
        response_length: tokens of an answer.
    """
    own = _Answers(
        model,
        tokenizer,
        task,
        layers=layers,
        prompts=prompts,
        group_size=group_size,
        prompt_length=prompt_length,
        response_length=response_length,
    )
    return Learner(lambda key: (own.learned, own.frozen), own.sample, own.logits)


def follow_answers(
    learner: Learner,
    *,
    key: PRNGKey,
    steps: int,
    points: int,
    tokens: int,
    power_iterations: int,
    learning_rate: float,
    training_rate: float,
) -> Mapping[str, Any]:
    """Reward of every step, and the probes of some, with one "seed" so that the arrays are those of `follow`.

    Args:
        learner: of `answers_learner`.
        key: of sampling.
        steps: updates by Adam.
        points: probes along the way.
        tokens: how many are probed alone at each point.
        power_iterations: products with the kernel of a context for its largest eigenvalue.
        learning_rate: eta of the plain step that is probed.
        training_rate: step size of Adam.
    """
    gradient_of = jax.jit(functools.partial(policy_gradient, learner))
    whole_of = jax.jit(functools.partial(batch_probe, learner, learning_rate=learning_rate))
    alone_of = jax.jit(
        functools.partial(token_probe, learner, learning_rate=learning_rate, power_iterations=power_iterations)
    )
    optimizer = optax.adam(training_rate, b2=BETA_2)
    update_of, (params, fixed) = jax.jit(optimizer.update), learner.init(key)
    opt_state, at, rewards = optimizer.init(params), measuring_steps(steps, points), []
    found: dict[str, list[Mapping[str, Any]]] = {"batch": [], "adam": [], "token": []}
    for step in range(steps):
        own_key = jax.random.fold_in(key, step)
        batch = learner.sample(params, fixed, own_key)
        gradient = gradient_of(params, fixed, batch)
        changes, opt_state = update_of(scaled(gradient, -1.0), opt_state)
        if step in at:
            whole, first = whole_of(params, fixed, batch, scaled(gradient, learning_rate))
            found["batch"].append(jax.device_get(whole))
            found["adam"].append(jax.device_get(whole_of(params, fixed, batch, changes)[0]))
            places = choose_tokens(batch, tokens, own_key)
            alone = [jax.device_get(alone_of(params, fixed, batch, first, place=place)) for place in places]
            found["token"].append({name: np.stack([one[name] for one in alone]) for name in alone[0]})
        params = optax.apply_updates(params, changes)
        rewards.append(float(batch.reward))
    arrays: dict[str, Any] = {"reward": np.array([rewards]), "probe_steps": at}
    for prefix, parts in found.items():
        arrays |= {f"{prefix}_{name}": np.stack([part[name] for part in parts])[None] for name in parts[0]}
    return arrays
