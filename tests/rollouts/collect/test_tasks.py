"""Answers to a task: where they end, what is learned, what the cursor remembers, which rewards are refused."""

import math

import jax
import numpy as np
import pytest

from jaxrl_llm.environments import Curriculum
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.collect import CollectError
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import TaskCollector
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.trajectory import check_trajectory

KEY = jax.random.key(0)
TOKENIZER = ByteTokenizer()
END = "\x03"
"""How the end token is written here."""
WIDTH = 6


class Written:
    """A sampler that gives the answers it was made with, each token at the log-prob -1, -2, .."""

    law, repeatable, own_device = Law(known=False), True, False

    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def sample(self, policy, prompt_tokens, prompt_mask, key, step) -> Rollout:
        group = len(self.answers) // len(prompt_tokens)
        tokens = np.full((len(self.answers), WIDTH), TOKENIZER.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, answer in enumerate(self.answers):
            ids = [TOKENIZER.eos_id if letter == END else ord(letter) for letter in answer]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        nothing = np.zeros((len(tokens), prompt_tokens.shape[1]), bool)
        chosen = np.concatenate([nothing, mask], axis=1)
        log_probs = np.concatenate([nothing, np.where(mask, -1 - np.arange(WIDTH), 0)], axis=1).astype(np.float32)
        return Rollout(
            tokens=np.concatenate([np.repeat(prompt_tokens, group, axis=0), tokens], axis=1),
            token_mask=np.concatenate([np.repeat(prompt_mask, group, axis=0), mask], axis=1),
            response_mask=chosen,
            log_prob_behaviour=log_probs,
            group_ids=np.repeat(np.arange(len(prompt_tokens)), group),
        )


class Says:
    """Answer with the digit; `stop` ends an answer."""

    def __init__(self, stop: str = "", name: str = "says", reward: float = 1.0) -> None:
        self.stop, self.name, self.reward = stop, name, reward

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        return [Problem(f"{(step + index) % 10}>", str((step + index) % 10), str(index)) for index in range(count)]

    def held_out(self) -> list[Problem]:
        return []

    def score(self, problem: Problem, text: str) -> Score:
        right = text.removesuffix(self.stop) == problem.answer
        return Score(self.reward if right else 0.0, lenient=right, strict=right)


def collector(task, *answers: str, prompts: int = 1, **options) -> TaskCollector:
    options = {"seed": 0, "prompt_length": 2, "end_ids": (TOKENIZER.eos_id,)} | options
    group = len(answers) // prompts
    return TaskCollector(
        task, TOKENIZER, Written(*answers), prompts=prompts, group_size=group, response_length=WIDTH, **options
    )


def lengths(experience) -> list[int]:
    return np.asarray(experience.trajectories.action_mask).sum(axis=1).tolist()


def test_an_answer_ends_where_the_stop_text_does(at_version) -> None:
    """Over several tokens, at once, never, twice, and before an end token: what follows was never asked for."""
    answers = ("0::xyz", "::0", "0:x:", "0::x::", f"0::x{END}", f"0:{END}", "0")
    experience = collector(Says("::"), *answers).collect(at_version(3), KEY, 0, {})
    t = experience.trajectories
    check_trajectory(t, vocab_size=TOKENIZER.vocab_size)
    assert lengths(experience) == [3, 2, 4, 3, 3, 3, 1]
    assert t.ended.tolist() == [True, True, False, True, True, True, False]
    assert experience.texts[:5] == ("0::", "::", "0:x:", "0::", "0::")
    np.testing.assert_array_equal(t.token_mask[:, 2:], t.action_mask[:, 2:])
    # The reward stands at the last token that is left, and nothing else of the answer has a log-prob.
    assert [int(np.flatnonzero(row)[-1]) for row in t.rewards[[0, 3, 4]]] == [4, 4, 4]
    assert t.log_prob_behaviour[0].tolist() == [0, 0, -1, -2, -3, 0, 0, 0]
    assert experience.per_row["task/strict"].tolist() == [True, False, False, True, True, False, True]
    assert (t.versions[t.action_mask] == 3).all()


def test_without_a_stop_text_only_end_tokens_end(at_version) -> None:
    experience = collector(Says(), "0::xyz", f"0{END}").collect(at_version(0), KEY, 0, {})
    assert lengths(experience) == [6, 2]
    assert experience.trajectories.ended.tolist() == [False, True]


def test_samples_are_the_first_answers_of_the_first_problems(at_version) -> None:
    experience = collector(Says(), "0", "1", "7", "1", prompts=2, samples=3).collect(at_version(0), KEY, 0, {})
    assert [dict(row) for row in experience.samples] == [
        {"prompt": "0>", "answer": "0", "text": "0", "reward": 1.0},
        {"prompt": "1>", "answer": "1", "text": "7", "reward": 0.0},
    ]
    assert experience.trajectories.group_ids.tolist() == [0, 0, 1, 1]
    assert experience.trajectories.returns.tolist() == [1, 0, 0, 1]


def test_the_cursor_remembers_the_level_of_the_curriculum(at_version) -> None:
    levels = Curriculum((Says(name="easy"), Says(name="hard", stop="!")), promote_at=0.5, window=4)
    cursor, seen = {}, []
    for step in range(4):
        # Half of the answers to step 0 are right, and half of those to step 1.
        made = collector(levels, str(step), "x!y").collect(at_version(0), KEY, step, cursor)
        cursor = made.cursor
        seen.append((cursor["curriculum"]["level"], cursor["curriculum"]["answers"], made.texts[1]))
        assert made.metrics["curriculum/level"] == cursor["curriculum"]["level"]
    # The hard task has a stop, so it is seen in the texts which one was asked.
    assert seen == [(0, 2, "x!y"), (1, 0, "x!y"), (1, 2, "x!"), (1, 0, "x!")]
    assert "curriculum/level" not in collector(Says(), "0").collect(at_version(0), KEY, 0, {}).metrics


def test_keys_that_were_replaced_add_up_with_their_step(at_version) -> None:
    class Replaces(Says):
        def train(self, seed: int, step: int, count: int) -> list[Problem]:
            problem = Problem("0>", "0", "0", {"replaced_keys": [7 + step], "key": 9})
            return [problem] * count if step < 2 else super().train(seed, step, count)

    cursor = {}
    for step in range(3):
        cursor = collector(Replaces(), "0").collect(at_version(0), KEY, step, cursor).cursor
    assert cursor["replaced"] == [{"step": step, "index": 0, "key": 6 + step, "replaced_by": 9} for step in (1, 2)]


@pytest.mark.parametrize("reward", [1.5, -0.1])
def test_a_reward_outside_its_range_names_the_answer(reward, at_version) -> None:
    with pytest.raises(CollectError, match=rf"Task 'says' gave '0' for '0>' the reward {reward}; it must lie in"):
        collector(Says(reward=reward), "0").collect(at_version(0), KEY, 0, {})
    wide = collector(Says(reward=reward), "0", reward_range=(-1.0, 2.0)).collect(at_version(0), KEY, 0, {})
    assert wide.trajectories.returns.tolist() == [pytest.approx(reward)]


def test_a_reward_that_is_no_number_is_left_to_the_trainer(at_version) -> None:
    experience = collector(Says(reward=math.nan), "0", "1", samples=1).collect(at_version(0), KEY, 0, {})
    assert np.isnan(experience.trajectories.returns).tolist() == [True, False]
    assert experience.samples[0]["reward"] is None


def test_a_prompt_that_is_too_long_is_one_sentence(at_version) -> None:
    with pytest.raises(ValueError, match="prompt_length is 1, which does not do"):
        collector(Says(), "0", prompt_length=1).collect(at_version(0), KEY, 0, {})
