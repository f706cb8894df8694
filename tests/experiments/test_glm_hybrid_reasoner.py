"""The chain of GLM-4.5: its tasks by hand, what is claimed of made-up numbers, and the tiny run whole."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import glm_hybrid_reasoner
from experiments.cli import main
from experiments.kept_arrays import read_arrays
from experiments.reasoner import stages
from experiments.reasoner.bench import bench_of
from experiments.reasoner.bench import leaks
from experiments.reasoner.chains import Chain
from experiments.reasoner.chains import ChainTask
from experiments.reasoner.numbers import summarise
from experiments.reasoner.page import reasoner_page
from experiments.reasoner.prices import Prices
from experiments.reasoner.prices import PricesEpisode
from experiments.reasoner.prices import conversation
from experiments.reasoner.stages import BEFORE
from experiments.reasoner.stages import STAGES
from experiments.reasoner.texts import cold_start
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import check_task

CHAIN = Chain(3, (("+", 4), ("*", 3), ("-", 2)))


def test_a_chain_by_hand() -> None:
    assert CHAIN.question == "3a+4b*3c-2"
    assert CHAIN.worked() == ("a+42b*31c-24", "4")


def test_chains_are_a_task_in_both_modes() -> None:
    task = ChainTask(3, modes=(True, False), held_out_count=12)
    check_task(task)
    thought, direct = (task.problem(CHAIN, thinking=mode) for mode in (True, False))
    assert thought.prompt == "[gMASK]<sop><|user|>\n3a+4b*3c-2<|assistant|>"
    assert direct.prompt.endswith("/nothink<|assistant|>\n<think></think>")
    # A right digit in the form that was not asked for earns nothing.
    assert task.score(direct, thought.answer).reward == 0
    assert task.score(direct, thought.answer).lenient
    assert task.score(thought, direct.answer).reward == 0
    assert task.score(thought, "\n<think>a+42b*31c-24\n4").reward == 0
    assert task.score(thought, "\n<think>a+42</think>\n3").reward == 0
    assert {len(problem.metadata["question"]) for problem in task.held_out()} == {4, 7, 10}


def test_tools_are_a_world_whose_malformed_calls_end_it() -> None:
    with pytest.raises(ValueError, match="tasks 0 to 5999"):
        Prices().reset(6000)
    kinds = {len(PricesEpisode(seed).plan) for seed in range(20)}
    assert kinds == {1, 2}
    seed = next(seed for seed in range(20) if len(PricesEpisode(seed).plan) == 2)
    episode = PricesEpisode(seed)
    first = episode.step(episode.said(0))
    assert (first.reward, first.done) == (0.0, False)
    assert int(first.text) * int(episode.question.split("*")[1]) == int(episode.answer)
    episode.step(episode.said(1))
    assert episode.step(f"\n{episode.answer}").reward == 1
    assert not episode.step(episode.answer).valid
    assert [PricesEpisode(seed).step(said)[1:3] for said in (f"<think>{episode.answer}", "")] == [(0.0, True)] * 2
    for broken in ("<tool_call>get\n<arg_key>of</arg_key>", "<tool_call>set\n</tool_call>"):
        reply = PricesEpisode(seed).step(broken)
        assert (reply.reward, reply.done) == (0.0, True)
    unknown = PricesEpisode(seed).step(episode.said(0).replace(episode.plan[0].arguments["of"], "cow"))
    assert (unknown.text, unknown.done) == ("?", False)
    assert [message["role"] for message in conversation(seed)] == ["user", *["assistant", "tool"] * 2, "assistant"]


def test_leaks_are_found_in_answers_and_not_in_calls() -> None:
    assert leaks("\na+52b*36\n8")
    assert leaks("\n<think>8")
    assert not leaks("\n8")
    assert not leaks("<arg_value>fig*34</arg_value>", tools=True)
    assert leaks("</think>", tools=True)


def test_no_question_of_the_cold_start_is_in_both_modes() -> None:
    lines = cold_start(dataclasses.replace(glm_hybrid_reasoner.TINY, conversations=200), 0, 1, range(50))
    asked = {kind: {line["identity"] for line in lines if line["kind"] == kind} for kind in ("thinking", "direct")}
    assert asked["thinking"]
    assert asked["direct"]
    assert not asked["thinking"] & asked["direct"]


SUCCESS = {  # thinking, direct, tools
    "pretrain": (0.0, 0.0, 0.0),
    "thinking": (0.5, 0.1, 0.5),
    "hybrid": (0.5, 0.2, 0.5),
    "reasoner": (0.9, 0.1, 0.5),
    "tooler": (0.5, 0.2, 0.9),
    "unified": (0.8, 0.3, 0.8),
    "general": (0.9, 0.3, 0.9),
}


def made_up(last=SUCCESS["general"], leak: float = 0.0) -> dict:
    """Results of one seed with these rates of success; questions differ a little, so that there are errors."""
    ripple = 0.05 * np.where(np.arange(40) % 2, 1.0, -1.0)[:, None] * np.ones((1, 2))
    results = {}
    for number, (stage, rates) in enumerate((SUCCESS | {"general": last}).items()):
        part = {"operations": np.arange(40) % 5 + 1}
        for mode, rate, tokens in zip(("thinking", "direct", "tools"), rates, (20.0, 3.0, 40.0), strict=True):
            part |= {f"{mode}_reward": np.clip(rate + ripple * (1 + 0.1 * number), 0, 1)}
            part |= {f"{mode}_tokens": tokens + ripple, f"{mode}_leak": np.full((40, 2), leak)}
            part |= {f"{mode}_example": np.array("<|user|>\n<think>")}
        curves = ("reward", "loss", "violation", "router_entropy", "dead", "entropy", "tokens")
        results[f"{stage}_0"] = part | {f"curve_{name}": np.linspace(0, 1, 20) for name in curves}
    return results


@pytest.mark.parametrize(
    ("last", "leak", "met", "missed"),
    [
        (SUCCESS["general"], 0.0, 7, None),
        ((0.8, 0.3, 0.9), 0.0, 6, "one_model_minus_reasoner"),
        ((0.9, 0.3, 0.8), 0.0, 6, "one_model_minus_tooler"),
        (SUCCESS["general"], 0.02, 6, "leaked_thinking"),
    ],
)
def test_what_is_claimed_of_made_up_numbers(last, leak, met, missed) -> None:
    settings = glm_hybrid_reasoner.SETTINGS
    summary = summarise(settings, made_up(last, leak))
    assert summary["claims_met"] == met
    assert [name for name in summary if name.endswith("_holds") and not summary[name]] == (
        [f"{missed}_holds"] if missed else []
    )
    assert summary["thinking_minus_direct"] == pytest.approx(last[0] - last[1], abs=1e-6)


def test_the_page_of_made_up_numbers() -> None:
    settings, results = glm_hybrid_reasoner.SETTINGS, made_up()
    page = reasoner_page(settings, results, summarise(settings, results))
    assert page.value == "7 of 7"
    assert sum(len(section.pictures) for section in page.sections) == 5
    assert page.sections[0].table is not None
    assert len(page.sections[0].table.rows) == 7


def test_settings_that_cannot_be_are_named() -> None:
    for change, sentence in ({"width": 96}, "multiple of 64"), ({"chosen": 40}, "32 experts to choose from"):
        with pytest.raises(ValueError, match=sentence):
            glm_hybrid_reasoner.parts(dataclasses.replace(glm_hybrid_reasoner.SETTINGS, **change))


def test_every_stage_begins_where_it_should() -> None:
    parts = glm_hybrid_reasoner.parts(dataclasses.replace(glm_hybrid_reasoner.TINY, seeds=2))
    assert len(glm_hybrid_reasoner.parts(dataclasses.replace(glm_hybrid_reasoner.TINY, full=True))) == 3 * len(STAGES)
    assert list(parts) == [f"{stage}_{seed}" for seed in (0, 1) for stage in STAGES]


@pytest.mark.timeout(900)
def test_the_tiny_chain_whole(tmp_path) -> None:
    assert main(["run", "glm_hybrid_reasoner", "--tiny", "--id", "one", "--runs-folder", str(tmp_path)]) == 0
    run = tmp_path / "glm_hybrid_reasoner" / "one"
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["stages"]) == list(STAGES)
    assert summary["claim_met"] is None
    assert 0 <= summary["claims_met"] <= summary["claims"] == 7
    assert {path.name for path in (run / "parts").iterdir()} == {f"{stage}_0.npz" for stage in STAGES}
    text = (run / "report.html").read_text()
    for said in ("Thinking on and off", "&lt;|user|&gt;", "Load of the experts"):
        assert said in text
    # Imitation moves the weights that a stage begins with; where nothing is solved reinforcement leaves them.
    weights = {stage: read_arrays(run / "parts" / f"{stage}_0.npz")["weights_000"] for stage in STAGES}
    for stage in ("thinking", "hybrid", "unified"):
        assert (weights[stage] != weights[BEFORE[stage]]).any(), stage
    assert (weights["reasoner"] == weights["tooler"]).all()


@pytest.mark.timeout(900)
def test_reinforcement_learns_from_chains_and_from_tools(tmp_path, monkeypatch) -> None:
    """With a reward that random weights earn now and then: by the number of letters of what was said."""
    step = PricesEpisode.step
    monkeypatch.setattr(ChainTask, "score", lambda _, problem, text: Score(float(len(text) % 2), True, True))
    monkeypatch.setattr(PricesEpisode, "step", lambda *said: step(*said)._replace(reward=float(len(said[1]) % 2)))
    bench = bench_of(glm_hybrid_reasoner.TINY, 0)
    stage = stages._Stage(bench, "general", 0, tmp_path, lambda said: None)
    before = bench.initial(0)
    weights = bench.kept(before)
    after = stage.reinforce(before, bench.general, 2, stages.GRPO)
    assert (after["curve_reward"] > 0).all()
    # Groups whose answers earned differently were learned from, in both steps.
    assert np.isfinite(after["curve_violation"]).all()
    assert (after["weights_000"] != weights["weights_000"]).any()
    biases = [name for name, array in weights.items() if array.shape == (glm_hybrid_reasoner.TINY.experts,)]
    assert len(biases) == 1
    np.testing.assert_array_equal(after[biases[0]], weights[biases[0]])
