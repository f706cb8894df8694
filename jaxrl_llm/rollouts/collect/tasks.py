"""Experience from a task: groups of answers to its problems, scored by its verifier."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace
from typing import Any

import numpy as np

from jaxrl_llm.environments import Curriculum
from jaxrl_llm.environments import CurriculumState
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import replaced_keys
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import CollectError
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.samplers import Sampler
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.scoring import response_columns
from jaxrl_llm.trajectory import single_step
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import PRNGKey


class TaskCollector:
    """The policy answers problems of a task, or of tasks in order of difficulty.

    The cursor holds the state of the curriculum and the keys of generated problems that were replaced.
    """

    def __init__(
        self,
        task: Task | Curriculum,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        seed: int,
        prompts: int,
        group_size: int,
        prompt_length: int,
        response_length: int,
        end_ids: Sequence[int],
        reward_range: tuple[float, float] = (0.0, 1.0),
        samples: int = 0,
    ) -> None:
        """Nothing is sampled yet.

        Args:
            task: the problems and their verifier.
            tokenizer: of the policy.
            sampler: answers the prompts, `group_size` answers of at most `response_length` tokens each.
            seed: of the problems.
            prompts: problems per batch.
            group_size: answers per problem.
            prompt_length: width of the prompts, which are padded on the left. [tokens]
            response_length: width of the answers. [tokens]
            end_ids: tokens that end an answer.
            reward_range: smallest and largest reward that the task may give.
            samples: problems of each batch whose first answer is written down.
        """
        self.curriculum = task if isinstance(task, Curriculum) else Curriculum((task,))
        self.sampler, self._tokenizer = sampler, tokenizer
        self._seed, self._end_ids, self._reward_range, self._samples = seed, tuple(end_ids), reward_range, samples
        width = prompt_length + response_length
        self._shape = BatchShape(prompts * group_size, group_size, width, response_length, prompt_length)

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._shape

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`.

        Raises:
            ValueError: a prompt is longer than `prompt_length`.
            CollectError: the task gave a reward outside its range.
        """
        level = CurriculumState(**cursor.get("curriculum", {}))
        task = self.curriculum.task(level)
        problems = task.train(self._seed, step, self._shape.groups)
        rollout = self.sampler.sample(policy, *self._encoded(problems), key, step)
        ended = (np.isin(rollout.tokens, self._end_ids) & np.asarray(rollout.response_mask)).any(axis=1)
        rollout, ended = self._cut_at_stop(rollout, ended, task.stop)
        scores, texts = self._score(task, problems, rollout)
        rewards = np.array([score.reward for score in scores], np.float32)
        trajectories = single_step(
            np.asarray(rollout.tokens),
            np.asarray(rollout.token_mask),
            np.asarray(rollout.response_mask),
            group_ids=np.asarray(rollout.group_ids),
            outcomes=rewards,
            ended=ended,
            log_prob_behaviour=np.asarray(rollout.log_prob_behaviour),
            version=policy.version,
        )
        right = np.array([score.lenient for score in scores])
        sound = np.isfinite(rewards)
        level = self.curriculum.update(level, answers=int(sound.sum()), passed=int((right & sound).sum()))
        replaced = [{"step": step + 1, **entry} for entry in replaced_keys(problems)]
        return Experience(
            trajectories=trajectories,
            per_row={
                "task/lenient": right,
                "task/strict": np.array([score.strict for score in scores]),
                "prompt_length/mean": (np.asarray(rollout.token_mask) & ~np.asarray(rollout.response_mask)).sum(axis=1),
            },
            metrics={"curriculum/level": float(level.level)} if len(self.curriculum.levels) > 1 else {},
            samples=self._written(problems, texts, scores),
            texts=tuple(texts),
            cursor={"curriculum": asdict(level), "replaced": [*cursor.get("replaced", ()), *replaced]},
            selections=None if rollout.selections is None else np.asarray(rollout.selections),
        )

    def _encoded(self, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
        length = self._shape.prompt_length
        assert length is not None
        try:
            return self._tokenizer.encode_batch([problem.prompt for problem in problems], length=length)
        except ValueError as error:
            raise ValueError(f"prompt_length is {length}, which does not do: {error}") from error

    def _cut_at_stop(
        self, rollout: Rollout, ended: Bool[np.ndarray, " B"], stop: str
    ) -> tuple[Rollout, Bool[np.ndarray, " B"]]:
        """Answers end where the stop text does, whichever tokens it is spread over; what follows was never asked for,
        so it is neither scored nor learned.
        """
        if not stop:
            return rollout, ended
        mask, tokens, ended = np.array(rollout.response_mask), np.asarray(rollout.tokens), ended.copy()
        # Rows that ended too: an end token may come after the stop text.
        for row in range(len(mask)):
            columns = np.flatnonzero(mask[row])
            ids = tokens[row, columns].tolist()
            if stop not in self._tokenizer.decode(ids):
                continue
            # Growing texts contain the stop from some length on; the shortest of them is the answer.
            low, high = 1, len(ids)
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if stop in self._tokenizer.decode(ids[:middle]) else (middle + 1, high)
            mask[row, columns[low:]], ended[row] = False, True
        real = np.asarray(rollout.token_mask) & (mask | ~np.asarray(rollout.response_mask))
        log_probs = np.where(mask, rollout.log_prob_behaviour, np.float32(0))
        changed: dict[str, Any] = {"response_mask": mask, "token_mask": real, "log_prob_behaviour": log_probs}
        return replace(rollout, **changed), ended

    def _score(self, task: Task, problems: Sequence[Problem], rollout: Rollout) -> tuple[list[Score], Sequence[str]]:
        """Decode the answers and score them."""
        answers = (np.asarray(array) for array in (rollout.tokens, rollout.response_mask))
        texts = self._tokenizer.decode_batch(*(response_columns(array, self._shape.actions) for array in answers))
        asked = [problem for problem in problems for _ in range(self._shape.group_size)]
        scores = [task.score(problem, text) for problem, text in zip(asked, texts, strict=True)]
        low, high = self._reward_range
        for problem, text, score in zip(asked, texts, scores, strict=True):
            # What is not a number is dropped with its row, by the trainer.
            if math.isfinite(score.reward) and not low <= score.reward <= high:
                raise CollectError(
                    f"Task {task.name!r} gave {text!r} for {problem.prompt!r} the reward {score.reward}; "
                    f"it must lie in [{low}, {high}] (reward_low, reward_high)."
                )
        return scores, texts

    def _written(
        self, problems: Sequence[Problem], texts: Sequence[str], scores: Sequence[Score]
    ) -> tuple[dict[str, Any], ...]:
        """The first answer to each of the first prompts."""
        rows = range(0, self._samples * self._shape.group_size, self._shape.group_size)
        return tuple(
            {
                "prompt": problem.prompt,
                "answer": problem.answer,
                "text": texts[row],
                "reward": scores[row].reward if math.isfinite(scores[row].reward) else None,
            }
            for problem, row in zip(problems, rows, strict=False)
        )
