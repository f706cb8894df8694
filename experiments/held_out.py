"""A policy's greedy answers to the held-out problems, in batches of one shape."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.run_folder import UserError
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import before_stop
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.training import Parts
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import end_tokens

ROWS = 64
"""Most prompts that are answered at a time."""


class HeldOutAnswerer:
    """Encodes the held-out prompts once; called with parameters, it gives a text per problem, up to the task's stop."""

    def __init__(self, parts: Parts, task: Task, settings: TrainSettings) -> None:
        """Check that the prompts fit, before anything is computed.

        Raises:
            UserError: a prompt is longer than `prompt_length`.
        """
        self._tokenizer, self._stop, self._width = parts.tokenizer, task.stop, settings.prompt_length
        self._generate = make_generate(
            nnx.split(parts.model)[0],
            max_new_tokens=settings.response_length,
            group_size=1,
            sampling=SamplingSettings(temperature=0.0),
            eos_id=parts.end_ids or end_tokens(parts.tokenizer, task.stop),
            pad_id=parts.tokenizer.pad_id,
            decode_dtype=parts.decode_dtype,
        )
        prompts = [problem.prompt for problem in task.held_out()]
        try:
            self._tokens, self._mask = parts.tokenizer.encode_batch(prompts, length=settings.prompt_length)
        except ValueError as error:
            raise UserError(f"Field --prompt-length: a held-out prompt does not fit: {error}") from error

    def __call__(self, model_state: nnx.State) -> list[str]:
        """One text per held-out problem, in the task's order."""
        count = len(self._tokens)
        rows = min(ROWS, count)
        texts: list[str] = []
        for start in range(0, count, rows):
            # The last batch is filled up with repeated rows, so that the program is compiled once.
            chosen = np.minimum(np.arange(start, start + rows), count - 1)
            texts += self._answer(model_state, self._tokens[chosen], self._mask[chosen])[: count - start]
        return texts

    def _answer(self, model_state: nnx.State, tokens: np.ndarray, mask: np.ndarray) -> Sequence[str]:
        # The key is not used: the choice is greedy.
        rollout = self._generate(
            model_state, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(0), 0, jnp.arange(len(tokens))
        )
        answers = np.asarray(rollout.tokens)[:, self._width :]
        texts = self._tokenizer.decode_batch(answers, np.asarray(rollout.response_mask)[:, self._width :])
        return [before_stop(text, self._stop) for text in texts]
