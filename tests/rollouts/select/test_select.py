"""From sampled answers to a file of demonstrations, each rule by hand, and the file as the collector reads it."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from jaxrl_llm import durable
from jaxrl_llm.environments import Problem
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.collect import DemonstrationCollector
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.select import DIRECT
from jaxrl_llm.rollouts.select import PROVENANCE
from jaxrl_llm.rollouts.select import THINKING
from jaxrl_llm.rollouts.select import SampledAnswer
from jaxrl_llm.rollouts.select import answers_of
from jaxrl_llm.rollouts.select import best_of_each
from jaxrl_llm.rollouts.select import earned
from jaxrl_llm.rollouts.select import ended
from jaxrl_llm.rollouts.select import long_between
from jaxrl_llm.rollouts.select import longest_answered
from jaxrl_llm.rollouts.select import matching
from jaxrl_llm.rollouts.select import repeated_share
from jaxrl_llm.rollouts.select import sift
from jaxrl_llm.rollouts.select import unpaired
from jaxrl_llm.rollouts.select import unrepetitive
from jaxrl_llm.rollouts.select import write_demonstrations
from jaxrl_llm.trajectory import single_step


def answer(question="q", text="one two three", reward=1.0, length=3, finished=True) -> SampledAnswer:
    return SampledAnswer(f"{question}?", question, text, reward, length, finished)


def test_each_answer_is_counted_once_under_the_first_reason():
    filters = {
        "truncated": ended,
        "length": long_between(2, 10),
        "form": matching(r"(<think>.*</think>)?[^<]+"),
        "repetition": unrepetitive(most=0.25, words=2),
        "wrong": earned(),
    }
    fine = [answer(), answer(text="<think>\n</think>a b"), answer(length=2), answer(length=10, text="a b a b c")]
    bad = {
        "truncated": [answer(finished=False, reward=0.0, length=99), answer(finished=False)],
        "length": [answer(length=1), answer(length=11, reward=0.0)],
        "form": [answer(text="<think>never closed"), answer(text="")],
        "repetition": [answer(text="a b a b a b", reward=0.0)],
        "wrong": [answer(reward=0.5), answer(reward=math.nan)],
    }
    mixed = list(itertools.chain.from_iterable(itertools.zip_longest(fine, *bad.values())))
    sifted = sift([one for one in mixed if one is not None], filters)
    assert sifted.kept == fine
    assert sifted.rejected == {name: len(group) for name, group in bad.items()}
    assert sift(fine, filters).rejected == dict.fromkeys(filters, 0)


def test_how_much_was_said_before():
    assert repeated_share("a b c a b c", words=3) == 1 - 3 / 4
    assert repeated_share("a b c a b d", words=3) == 0
    assert repeated_share("x x x x", words=1) == 0.75
    assert repeated_share("a b", words=3) == repeated_share("", words=1) == 0


def test_the_best_answers_of_each_question_without_those_that_say_the_same():
    sampled = [
        answer("a", "low", 0.1),
        answer("b", "only", 0.0),
        answer("a", "same", 0.2),
        answer("a", "first", 1.0),
        answer("a", "same", 1.0),
        answer("a", "first", 1.0),
        answer("a", "third", 1.0),
    ]
    assert [one.text for one in best_of_each(sampled)] == ["first", "only"]
    assert [(one.text, one.reward) for one in best_of_each(sampled, 3)] == [
        ("first", 1.0),
        ("same", 1.0),
        ("third", 1.0),
        ("only", 0.0),
    ]
    assert [one.text for one in best_of_each(sampled, 9)] == ["first", "same", "third", "low", "only"]


def test_the_half_of_the_questions_with_the_shortest_answers_is_dropped():
    lengths = {"a": (1, 9), "b": (4, 4), "c": (7, 7), "d": (5, 5), "e": (2, 3)}
    sampled = [answer(name, length=length) for name, pair in lengths.items() for length in pair]
    assert {one.identity for one in longest_answered(sampled)} == {"a", "c", "d"}  # 2 of 5, and of a and d neither
    assert longest_answered(sampled, dropped=0.0) == sampled
    assert {one.identity for one in longest_answered(sampled, dropped=0.6)} == {"a", "c"}  # of equal ones the later
    assert longest_answered(sampled[:1]) == sampled[:1]
    hundred = [answer(str(number)) for number in range(100)]
    assert len(longest_answered(hundred, dropped=0.29)) == 71
    assert longest_answered([]) == []


def test_no_question_is_kept_in_both_modes():
    names = [str(number) for number in range(400)]
    thinking = [answer(name, text) for name in names[:300] for text in ("t1", "t2")]
    direct = [answer(name, "d") for name in names[100:]]
    kept = unpaired(thinking, direct, share=0.25)
    with_thinking, without = ({one.identity for one in part} for part in kept)
    assert not with_thinking & without
    assert with_thinking | without == set(names)
    assert set(names[:100]) <= with_thinking
    assert set(names[300:]) <= without
    assert 0.15 < (len(with_thinking) - 100) / 200 < 0.35
    assert len(kept[0]) == 2 * len(with_thinking)
    assert unpaired(thinking[::-1], direct, share=0.25)[1] == kept[1]
    assert unpaired(thinking, direct, share=0.25, seed=1)[1] != kept[1]
    assert unpaired(thinking, direct, share=1.0) == (thinking, [one for one in direct if int(one.identity) >= 300])
    assert unpaired(thinking, direct, share=0.0)[1] == direct


@pytest.fixture
def experience():
    """Two questions, two answers each, as a collector of a task brings them."""
    tokens = np.arange(4 * 5, dtype=np.int32).reshape(4, 5)
    chosen = np.array([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], bool)
    return Experience(
        trajectories=single_step(
            tokens,
            chosen | (np.arange(5) < 2),
            chosen,
            group_ids=np.array([0, 0, 1, 1], np.int32),
            outcomes=np.array([0.5, 1.0, 0.0, 0.25], np.float32),
            ended=np.array([False, True, True, True]),
            log_prob_behaviour=np.zeros((4, 5), np.float32),
            version=0,
        ),
        texts=("long", "r", "no", "yes"),
        cursor={},
    )


PROBLEMS = [Problem("2+2=", "4", "sum"), Problem("3*3=", "9", "product")]


def test_rows_of_a_batch_become_answers(experience):
    found = answers_of(experience, PROBLEMS)
    assert found == [
        SampledAnswer("2+2=", "sum", "long", 0.5, 3, False),
        SampledAnswer("2+2=", "sum", "r", 1.0, 1, True),
        SampledAnswer("3*3=", "product", "no", 0.0, 2, True),
        SampledAnswer("3*3=", "product", "yes", 0.25, 3, True),
    ]
    with pytest.raises(ValueError, match="problems has 1 entries; the groups are 0 to 1"):
        answers_of(experience, PROBLEMS[:1])
    nothing = jax.tree.map(lambda array: array[:0], experience.trajectories)
    with pytest.raises(ValueError, match="experience has no rows; expected the answers of a batch"):
        answers_of(dataclasses.replace(experience, trajectories=nothing, texts=()), PROBLEMS)
    with pytest.raises(ValueError, match="experience has 4 rows and 0 texts"):
        answers_of(dataclasses.replace(experience, texts=()), PROBLEMS)


def test_what_is_written_is_read_by_the_collector_of_demonstrations(experience, tmp_path):
    path, tokenizer = tmp_path / "mixed.jsonl", ByteTokenizer()
    best = best_of_each(answers_of(experience, PROBLEMS))
    again = dataclasses.replace(best[1], question="3*3=/nothink", text="<think></think>\nnine")
    parts = [(THINKING, best[:1]), (DIRECT, [best[1], again])]
    assert write_demonstrations(path, parts, source="run 7, step 3") == {"thinking": 1, "direct": 2}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {
        "prompt": "2+2=",
        "response": "r",
        "identity": "sum",
        "mode": "thinking",
        "reward": 1.0,
        "source": "run 7, step 3",
    }
    assert [(line["prompt"], line["response"]) for line in lines[1:]] == [
        ("3*3=/nothink", "<think></think>\nyes"),
        ("3*3=/nothink", "<think></think>\nnine"),
    ]
    assert list(tmp_path.iterdir()) == [path]
    collector = DemonstrationCollector(path, tokenizer, rows=3, width=48, ignored=PROVENANCE)
    brought = collector.collect(None, None, 0, {})
    assert sorted(brought.texts) == sorted(line["response"] for line in lines)
    # The end token is chosen, too: one token more than the bytes of the response.
    assert sorted(brought.trajectories.action_mask.sum(axis=1).tolist()) == sorted(
        len(line["response"].encode()) + 1 for line in lines
    )


def test_what_cannot_be_is_refused(tmp_path):
    path = tmp_path / "file.jsonl"
    refused = [
        ("count is 0", lambda: best_of_each([], 0)),
        ("has the reward nan; leave it out first", lambda: best_of_each([answer(reward=math.nan)])),
        ("dropped is 1.0", lambda: longest_answered([], dropped=1.0)),
        ("share is 1.5", lambda: unpaired([], [], share=1.5)),
        ("low is 3 and high 2", lambda: long_between(3, 2)),
        (r"pattern is '\(', which is no regular expression", lambda: matching("(")),
        ("most is 2", lambda: unrepetitive(most=2)),
        ("words is 0", lambda: unrepetitive(most=0.5, words=0)),
        ("parts has the answers {}", lambda: write_demonstrations(path, [], source="")),
        (
            "parts has the answers {'direct': 1}; it must have some, and each mode once",
            lambda: write_demonstrations(path, [(DIRECT, []), (DIRECT, [answer()])], source=""),
        ),
        ("with the reward inf", lambda: write_demonstrations(path, [(DIRECT, [answer(reward=math.inf)])], source="")),
        ("is ' ' with the reward 1.0", lambda: write_demonstrations(path, [(DIRECT, [answer(text=" ")])], source="")),
    ]
    for sentence, call in refused:
        with pytest.raises(ValueError, match=sentence):
            call()
    assert not [*tmp_path.iterdir()]


def test_direct_answers_have_one_empty_pair_and_no_thinking(tmp_path):
    path = tmp_path / "direct.jsonl"
    said = ["\n<think></think>\nyes", "\nyes", "<think></think>yes"]
    write_demonstrations(path, [(DIRECT, [answer(text=text) for text in said])], source="")
    written = [json.loads(line)["response"] for line in path.read_text().splitlines()]
    assert written == ["<think></think>\nyes", "<think></think>\nyes", "<think></think>yes"]
    for text in ("<think>reason</think>\nyes", "<think></think>\n<think>reason</think>yes", "reason</think>yes"):
        with pytest.raises(ValueError, match=r"has '</?think>' in .*; answers of the mode 'direct' have none"):
            write_demonstrations(path, [(DIRECT, [answer(text=text)])], source="")
    with pytest.raises(ValueError, match="it must have a text"):
        write_demonstrations(path, [(DIRECT, [answer(text="<think></think>\n")])], source="")
    write_demonstrations(path, [(THINKING, [answer(text="\n<think>reason</think>\nyes")])], source="")
    assert json.loads(path.read_text())["response"] == "\n<think>reason</think>\nyes"


def test_a_file_that_fails_leaves_the_old_one_and_no_draft(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_demonstrations(path, [(THINKING, [answer(text="\ud800")])], source="")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "old"


def test_the_disk_has_the_file_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "file.jsonl", [], durable.sync

    def watched(place):
        synced.append((place.name, path.exists()))
        sync(place)

    monkeypatch.setattr(durable, "sync", watched)
    write_demonstrations(path, [(THINKING, [answer()])], source="")
    assert synced == [("file.jsonl.part", False), (tmp_path.name, True)]
