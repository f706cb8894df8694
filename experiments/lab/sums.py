"""Sums of two digits for a small byte-level transformer: the main task small enough to be enumerated over its problems.

The policy learns by imitation first, until it is right in part, as a language model is before reinforcement learning.
A response earns 1 if it is the sum and its end, else 0. One response per problem has a reward, so that J and L' are
sums over the 100 problems; the divergences are measured on the sampled contexts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.lab.world import Exact
from experiments.lab.world import Sampled
from experiments.lab.world import World
from jaxrl_llm import categorical
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts import predicting
from jaxrl_llm.rollouts.perturb import LogitPerturbation
from jaxrl_llm.rollouts.perturb import context_keys
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

PROMPT, RESPONSE = 4, 3
"""Tokens of "7+8=" and of "15" with its end."""

PROBLEMS = 100


def problems(tokenizer: ByteTokenizer) -> tuple[Int[np.ndarray, "100 7"], Bool[np.ndarray, "100 7"]]:
    """Every problem with its answer and the end, and which tokens are real."""
    rows = [
        [*tokenizer.encode(f"{left}+{right}={left + right}", add_special_tokens=False), tokenizer.eos_id]
        for left in range(10)
        for right in range(10)
    ]
    width = PROMPT + RESPONSE
    tokens = np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in rows], np.int32)
    return tokens, np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def sums(*, prompts: int, group_size: int, width: int, layers: int, imitation_steps: int) -> World:
    """The world.

    Args:
        prompts: problems per batch.
        group_size: responses per problem.
        width: of the model, a multiple of 4.
        layers: of the model.
        imitation_steps: updates on right answers, all problems at once, before reinforcement learning.

    Raises:
        ValueError: for sizes that no model or batch can have.
    """
    if not 1 <= prompts <= PROBLEMS:
        raise ValueError(f"prompts is {prompts}; it must be 1 to {PROBLEMS}, the problems there are.")
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; it must be at least 2, or there is nothing to compare.")
    if width < 4 or width % 4:
        raise ValueError(f"width is {width}; it must be a multiple of 4.")
    tokenizer = ByteTokenizer()
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=2,
        head_dim=width // 2,
        intermediate_size=3 * width,
        max_positions=PROMPT + RESPONSE,
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tokens, mask = (jnp.asarray(array) for array in problems(tokenizer))
    right, right_mask = tokens[:, PROMPT:], mask[:, PROMPT:]

    def response_logits(state: PyTree, tokens: Array, mask: Array) -> Array:
        model = nnx.merge(graphdef, state)
        return model.logits(predicting(model(tokens, mask), RESPONSE))

    def init(key: PRNGKey) -> PyTree:
        state = nnx.state(Transformer(config, rngs=nnx.Rngs(key)))
        optimizer = optax.adam(3e-3)

        def loss(state: PyTree) -> Array:
            log_probs = categorical.log_prob(response_logits(state, tokens, mask), right)
            return -jnp.mean(jnp.where(right_mask, log_probs, 0.0))

        def imitate(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            state, opt_state = carry
            changes, opt_state = optimizer.update(jax.grad(loss)(state), opt_state)
            return (optax.apply_updates(state, changes), opt_state), None

        return jax.lax.scan(imitate, (state, optimizer.init(state)), length=imitation_steps)[0][0]

    def sample(state: PyTree, transform: LogitPerturbation, key: PRNGKey, noise_key: PRNGKey) -> Sampled:
        choice_key, key = jax.random.split(key)
        chosen = jax.random.choice(choice_key, PROBLEMS, (prompts,), replace=False)
        generate = make_generate(
            graphdef,
            max_new_tokens=RESPONSE,
            group_size=group_size,
            sampling=SamplingSettings(),
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            perturb_logits=transform,
        )
        rollout = generate(state, tokens[chosen, :PROMPT], mask[chosen, :PROMPT], key, 0, chosen, noise_key=noise_key)
        answers = rollout.tokens[:, PROMPT:]
        wanted = jnp.repeat(right[chosen], group_size, axis=0)
        return Sampled(
            tokens=answers,
            mask=rollout.response_mask[:, PROMPT:],
            rewards=jnp.all(answers == wanted, axis=1).astype(jnp.float32),
            group_ids=rollout.group_ids,
            texts=(rollout.tokens, rollout.token_mask),
            keys=context_keys(noise_key, rollout.tokens, rollout.token_mask)[:, PROMPT:].reshape(-1),
            row=jnp.arange(answers.size).reshape(answers.shape),
        )

    def exact(
        pi: PyTree, pi_transform: LogitPerturbation, mu: PyTree, mu_transform: LogitPerturbation, noise_key: PRNGKey
    ) -> Exact:
        keys = context_keys(noise_key, tokens, mask)[:, PROMPT:]

        def of_the_right_answers(state: PyTree, transform: LogitPerturbation) -> Array:
            log_probs = categorical.log_prob(transform(response_logits(state, tokens, mask), keys), right)
            return jnp.where(right_mask, log_probs, 0.0)

        log_pi, log_mu = of_the_right_answers(pi, pi_transform), of_the_right_answers(mu, mu_transform)
        probability_mu = jnp.exp(jnp.sum(log_mu, axis=1))
        # A right answer that mu cannot sample is in no expectation under mu.
        possible = probability_mu > 0
        moved = jnp.where(possible[:, None], jnp.expm1(log_pi - jnp.where(possible[:, None], log_mu, 0.0)), 0.0)
        gain = jnp.mean(probability_mu * jnp.sum(moved, axis=1))
        return Exact(jnp.mean(jnp.exp(jnp.sum(log_pi, axis=1))), jnp.mean(probability_mu), gain, None)

    return World(
        horizon=RESPONSE,
        init=init,
        sample=sample,
        logits=lambda state, sampled: response_logits(state, *sampled.texts).reshape(-1, config.vocab_size),
        exact=exact,
    )
