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
from jaxrl_llm.rollouts import response_columns
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

IMITATION_RATE = 3e-3
"""Step size of Adam before reinforcement learning."""


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


def _config(tokenizer: ByteTokenizer, *, width: int, layers: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=2,
        head_dim=width // 2,
        intermediate_size=3 * width,
        max_positions=PROMPT + RESPONSE,
    )


class _Sums:
    """What the functions of the world share; each method is a field of `World` or a part of one."""

    def __init__(
        self,
        config: TransformerConfig,
        tokenizer: ByteTokenizer,
        *,
        prompts: int,
        group_size: int,
        imitation_steps: int,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.prompts, self.group_size, self.imitation_steps = prompts, group_size, imitation_steps
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        self.tokens, self.mask = (jnp.asarray(array) for array in problems(tokenizer))
        self.right, self.right_mask = (response_columns(array, RESPONSE) for array in (self.tokens, self.mask))

    def response_logits(self, state: PyTree, tokens: Array, mask: Array) -> Array:
        """Logits of every response token [rows, R, V]."""
        model = nnx.merge(self.graphdef, state)
        return model.logits(predicting(model(tokens, mask), RESPONSE))

    def log_probs_of_the_right(self, state: PyTree, transform: LogitPerturbation, keys: Array) -> Array:
        """log p of each token of the right answers [100, R]; 0 at padding."""
        logits = transform(self.response_logits(state, self.tokens, self.mask), keys)
        return jnp.where(self.right_mask, categorical.log_prob(logits, self.right), 0.0)

    def init(self, key: PRNGKey) -> PyTree:
        """A policy that has imitated right answers for some steps."""
        state = nnx.state(Transformer(self.config, rngs=nnx.Rngs(key)))
        optimizer = optax.adam(IMITATION_RATE)

        def loss(state: PyTree) -> Array:
            log_probs = categorical.log_prob(self.response_logits(state, self.tokens, self.mask), self.right)
            return -jnp.mean(jnp.where(self.right_mask, log_probs, 0.0))

        def imitate(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            state, opt_state = carry
            changes, opt_state = optimizer.update(jax.grad(loss)(state), opt_state)
            return (optax.apply_updates(state, changes), opt_state), None

        return jax.lax.scan(imitate, (state, optimizer.init(state)), length=self.imitation_steps)[0][0]

    def sample(self, state: PyTree, transform: LogitPerturbation, key: PRNGKey, noise_key: PRNGKey) -> Sampled:
        """Groups of responses to some problems."""
        choice_key, key = jax.random.split(key)
        chosen = jax.random.choice(choice_key, PROBLEMS, (self.prompts,), replace=False)
        generate = make_generate(
            self.graphdef,
            max_new_tokens=RESPONSE,
            group_size=self.group_size,
            sampling=SamplingSettings(),
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            perturb_logits=transform,
        )
        prompts = self.tokens[chosen, :PROMPT], self.mask[chosen, :PROMPT]
        rollout = generate(state, *prompts, key, 0, chosen, noise_key=noise_key)
        answers = response_columns(rollout.tokens, RESPONSE)
        keys = context_keys(noise_key, rollout.tokens, rollout.token_mask)
        wanted = jnp.repeat(self.right[chosen], self.group_size, axis=0)
        return Sampled(
            tokens=answers,
            mask=response_columns(rollout.response_mask, RESPONSE),
            rewards=jnp.all(answers == wanted, axis=1).astype(jnp.float32),
            group_ids=rollout.group_ids,
            clusters=rollout.group_ids,
            texts=(rollout.tokens, rollout.token_mask),
            keys=response_columns(keys, RESPONSE).reshape(-1),
            row=jnp.arange(answers.size).reshape(answers.shape),
        )

    def logits(self, state: PyTree, sampled: Sampled) -> Array:
        """One row per sampled token."""
        return self.response_logits(state, *sampled.texts).reshape(-1, self.config.vocab_size)

    def exact(
        self,
        pi: PyTree,
        pi_transform: LogitPerturbation,
        mu: PyTree,
        mu_transform: LogitPerturbation,
        noise_key: PRNGKey,
    ) -> Exact:
        """J and L' as sums over the problems; the inputs of the bounds are left to samples."""
        keys = response_columns(context_keys(noise_key, self.tokens, self.mask), RESPONSE)
        log_pi = self.log_probs_of_the_right(pi, pi_transform, keys)
        log_mu = self.log_probs_of_the_right(mu, mu_transform, keys)
        probability_mu = jnp.exp(jnp.sum(log_mu, axis=1))
        # A right answer that mu cannot sample is in no expectation under mu.
        possible = probability_mu > 0
        moved = jnp.where(possible[:, None], jnp.expm1(log_pi - jnp.where(possible[:, None], log_mu, 0.0)), 0.0)
        gain = jnp.mean(probability_mu * jnp.sum(moved, axis=1))
        return Exact(jnp.mean(jnp.exp(jnp.sum(log_pi, axis=1))), jnp.mean(probability_mu), gain, None, None)


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
    config = _config(tokenizer, width=width, layers=layers)
    own = _Sums(config, tokenizer, prompts=prompts, group_size=group_size, imitation_steps=imitation_steps)
    return World(horizon=RESPONSE, init=own.init, sample=own.sample, logits=own.logits, exact=own.exact)
