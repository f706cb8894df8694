"""A policy's answers to the held-out problems, greedy or sampled, in batches of one shape."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import metric_names as names
from experiments.evaluation import merge_answers
from experiments.evaluation import score_answers
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json
from experiments.run_folder import read_rows
from experiments.run_folder import write_json
from experiments.run_shapes import samples_problem
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import before_stop
from jaxrl_llm.models import Transformer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts import response_columns
from jaxrl_llm.training import Parts
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import end_tokens

ROWS = 64
"""Most prompts that are answered at a time with one answer each."""
SAMPLED_ROWS = 256
"""Most sampled answers at a time."""


class HeldOutSampler:
    """Encodes the held-out prompts once; called with parameters, it gives the same number of texts per problem.

    Args:
        model: its structure; parameters come with the call.
        tokenizer: of the model.
        task: whose problems are asked; answers are cut at its stop.
        prompt_length: width of the prompts [tokens].
        response_length: most tokens of an answer.
        sampling: how answers are drawn.
        samples: answers per problem.
        end_ids: tokens that end an answer; empty for the tokenizer's end token and the task's stop.
        decode_dtype: see `make_generate`.

    Raises:
        UserError: a prompt is longer than `prompt_length`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        task: Task,
        *,
        prompt_length: int,
        response_length: int,
        sampling: SamplingSettings,
        samples: int = 1,
        end_ids: Sequence[int] = (),
        decode_dtype: Any = None,
    ) -> None:
        self._tokenizer, self._stop, self._width, self._samples = tokenizer, task.stop, response_length, samples
        self._batch = ROWS if samples == 1 else max(1, SAMPLED_ROWS // samples)
        self._generate = make_generate(
            nnx.split(model)[0],
            max_new_tokens=response_length,
            group_size=samples,
            sampling=sampling,
            eos_id=end_ids or end_tokens(tokenizer, task.stop),
            pad_id=tokenizer.pad_id,
            decode_dtype=decode_dtype,
        )
        prompts = [problem.prompt for problem in task.held_out()]
        try:
            self._tokens, self._mask = tokenizer.encode_batch(prompts, length=prompt_length)
        except ValueError as error:
            raise UserError(f"Field --prompt-length: a held-out prompt does not fit: {error}") from error

    def __call__(self, model_state: nnx.State, *, seed: int = 0) -> list[list[str]]:
        """The texts of each held-out problem, in the task's order; the seed is not used by a greedy choice.

        A problem's answers are drawn with random numbers of its own, whatever is asked beside it.
        """
        count = len(self._tokens)
        rows = min(self._batch, count)
        texts: list[list[str]] = []
        for start in range(0, count, rows):
            # The last batch is filled up with repeated rows, so that the program is compiled once.
            chosen = np.minimum(np.arange(start, start + rows), count - 1)
            texts += self._answer(model_state, chosen, seed)[: count - start]
        return texts

    def _answer(self, model_state: nnx.State, chosen: np.ndarray, seed: int) -> list[list[str]]:
        prompts = (jnp.asarray(self._tokens[chosen]), jnp.asarray(self._mask[chosen]))
        rollout = self._generate(model_state, *prompts, jax.random.key(seed), 0, jnp.asarray(chosen))
        answers = (np.asarray(array) for array in (rollout.tokens, rollout.response_mask))
        texts = self._tokenizer.decode_batch(*(response_columns(array, self._width) for array in answers))
        texts = [before_stop(text, self._stop) for text in texts]
        return [texts[row : row + self._samples] for row in range(0, len(texts), self._samples)]


class HeldOutAnswerer:
    """One greedy answer per held-out problem, up to the task's stop."""

    def __init__(self, parts: Parts, task: Task, settings: TrainSettings) -> None:
        """Check that the prompts fit, before anything is computed.

        Raises:
            UserError: a prompt is longer than `prompt_length`.
        """
        self._sampler = HeldOutSampler(
            parts.model,
            parts.tokenizer,
            task,
            prompt_length=settings.prompt_length,
            response_length=settings.response_length,
            sampling=SamplingSettings(temperature=0.0),
            end_ids=parts.end_ids,
            decode_dtype=parts.decode_dtype,
        )

    def __call__(self, model_state: nnx.State) -> list[str]:
        """One text per held-out problem, in the task's order."""
        return [text for (text,) in self._sampler(model_state)]


class HeldOutEvaluation:
    """Measures the policy on the held-out problems, and keeps its first and last answers in samples.json."""

    def __init__(self, run: RunFolder, task: Task, answerer: HeldOutAnswerer, steps: int) -> None:
        """Nothing is answered yet."""
        self._run, self._task, self._answerer, self._steps = run, task, answerer, steps

    def __call__(self, step: int, model_state: nnx.State) -> Mapping[str, float]:
        """Answer all problems; returns both accuracies."""
        rows = score_answers(self._task, self._answerer(model_state))
        if step == 0:
            write_json(self._run.samples, {"answers": merge_answers(rows, None)})
        elif step == self._steps:
            before = [{**row, **row["before"]} for row in read_json(self._run.samples)["answers"]]
            write_json(self._run.samples, {"answers": merge_answers(before, rows)})
        count = len(rows)
        return {
            names.HELD_OUT: sum(row["lenient"] for row in rows) / count,
            names.HELD_OUT_STRICT: sum(row["strict"] for row in rows) / count,
        }

    def mend_before(self, model_state: nnx.State) -> None:
        """Answer as the model before training again, where a run goes on whose answers were lost or changed.

        Args:
            model_state: before training.
        """
        problem = samples_problem(self._run)
        if problem is None:
            asked = [row["identity"] for row in read_json(self._run.samples)["answers"]]
            if asked == [problem.identity for problem in self._task.held_out()]:
                return
            problem = f"{self._run.samples} has answers to other problems."
        if self._run.samples.exists() or read_rows(self._run.path / "metrics.jsonl"):
            print(f"{problem} The answers before training are given again.", flush=True)
            self(0, model_state)

    def mend_after(self, model_state: nnx.State) -> None:
        """Answer as the model after training again, where that was lost after the last step."""
        if not all("after" in row for row in read_json(self._run.samples)["answers"]):
            self(self._steps, model_state)
