"""`evaluate` and `export`: a run's checkpoint asked again and written for other programs."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import held_out
from experiments.cli import main
from experiments.evaluate_run import estimates
from experiments.held_out import HeldOutSampler
from experiments.intervals import accuracy
from experiments.pass_at_k import pass_at_k
from jaxrl_llm import load_run
from jaxrl_llm.environments import get_task
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.rollouts.engines import LlamaCppEngine

TOKENIZER = ByteTokenizer()
TEXTS = TOKENIZER.encode_batch(["1234>1234", "9876>98", "55>5"], length=12)


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    assert main(list(words)) == status
    found = capsys.readouterr()
    return found.err if status else found.out


@pytest.fixture(scope="module")
def evaluated(finished_runs, tmp_path_factory) -> Path:
    """A copy of the run that was evaluated, greedily and by three answers from truncated distributions."""
    runs = Path(shutil.copytree(finished_runs, tmp_path_factory.mktemp("evaluated") / "runs"))
    words = ["evaluate", "first", "--samples", "3", "--k", "1", "3", "--top-k", "40", "--top-p", "0.9", "--seed", "5"]
    assert main([*words, "--runs-folder", str(runs)]) == 0
    return runs / "from_scratch" / "first"


def test_an_evaluation_is_written_with_intervals_and_shown_in_the_report(evaluated, capsys) -> None:
    name = "evaluation-step3-3-samples-temperature-1-top-k-40-top-p-0.9-seed-5.json"
    result = json.loads((evaluated / name).read_text())
    assert (result["step"], result["samples"], result["k"], result["held_out_problems"]) == (3, 3, [1, 3], 128)
    answers = json.loads((evaluated / "samples.json").read_text())["answers"]
    assert [row["greedy"] for row in result["problems"]] == [row["after"] for row in answers]
    assert all(set(row["sampled"]) == {"lenient", "strict"} for row in result["problems"])
    assert result["results"] == estimates(result["problems"], 3, [1, 3])
    page = (evaluated / "report.html").read_text()
    for part in ("After 3 steps, 3 answers per problem, temperature 1, top-k 40, top-p 0.9, seed 5", "pass@3"):
        assert part in page


def test_step_and_temperature_choose_what_is_asked(evaluated, capsys) -> None:
    words = ["evaluate", "first", "--runs-folder", str(evaluated.parent.parent)]
    text = said(capsys, *words, "--step", "0", "--temperature", "0", status=0)
    assert "Before training, greedy" in text
    result = json.loads((evaluated / "evaluation-step0-greedy.json").read_text())
    answers = json.loads((evaluated / "samples.json").read_text())["answers"]
    assert [row["greedy"] for row in result["problems"]] == [row["before"] for row in answers]
    assert "sampled" not in result["problems"][0]
    assert [row["name"] for row in result["results"]] == ["greedy", "greedy"]


def test_estimates_are_over_problems() -> None:
    rows = [
        {"identity": name, "greedy": {"lenient": right, "strict": False}, "sampled": {"lenient": count, "strict": 0}}
        for name, right, count in (("a", True, 4), ("b", False, 1), ("b", False, 3), ("c", True, 0))
    ]
    found = {(row["name"], row["scoring"]): row for row in estimates(rows, 4, [1, 2])}
    assert found["greedy", "lenient"]["value"] == pytest.approx(2 / 3)
    wilson = accuracy(np.array([1.0, 0.0, 1.0]))
    assert found["greedy", "lenient"]["interval"] == pytest.approx([wilson.low, wilson.high])
    two = pass_at_k(np.array([4, 1, 3, 0]), 4, 2)
    assert found["pass@2", "lenient"]["value"] == pytest.approx((two[0] + (two[1] + two[2]) / 2 + two[3]) / 3)
    assert found["pass@2", "strict"]["value"] == 0


def test_a_problems_answers_do_not_depend_on_what_is_asked_beside_it(finished_runs, monkeypatch) -> None:
    saved, task = load_run(finished_runs / "from_scratch" / "first"), get_task("copy_digits")

    def ask(rows: int, seed: int) -> list[list[str]]:
        monkeypatch.setattr(held_out, "SAMPLED_ROWS", rows)
        sizes = {"prompt_length": 5, "response_length": 5, "sampling": SamplingSettings(), "samples": 2}
        return HeldOutSampler(saved.model, saved.tokenizer, task, **sizes)(nnx.state(saved.model), seed=seed)

    many, few = ask(100, 0), ask(80, 0)
    assert len(many) == 128
    assert many == few
    assert {len(texts) for texts in many} == {2}
    assert sum(one != two for one, two in many) > 100
    assert sum(first != second for first, second in zip(many, ask(100, 1), strict=True)) > 100


def test_impossible_questions_are_refused(finished_runs, tmp_path, capsys) -> None:
    words = ["evaluate", "first", "--runs-folder", str(finished_runs)]
    assert "--k has 5; of --samples 4 answers 1 to 4" in said(capsys, *words, "--samples", "4", "--k", "1", "5")
    assert "has one answer, so k is 1" in said(capsys, *words, "--temperature", "0", "--k", "2")
    assert "top_p must lie in (0, 1]" in said(capsys, *words, "--top-p", "1.5")
    assert "no checkpoint of step 1; there are those of 2, 3" in said(capsys, *words, "--step", "1")
    assert "Did you mean --samples?" in said(capsys, *words, "--sample", "4")
    run = tmp_path / "linear_bandit" / "one"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"experiment": "linear_bandit", "settings": {}, "tiny": true}')
    assert "is of a study, which computes" in said(capsys, "evaluate", "one", "--runs-folder", str(tmp_path))


def logits(model) -> np.ndarray:
    tokens, mask = (jnp.asarray(array) for array in TEXTS)
    return np.asarray(model.logits(model(tokens, mask)))[np.asarray(mask)]


def test_an_exported_hugging_face_folder_is_the_model_bit_for_bit(finished_runs, tmp_path, capsys) -> None:
    run, folder = finished_runs / "from_scratch" / "first", tmp_path / "out"
    words = ["export", "first", str(folder), "--to", "hf", "--runs-folder", str(finished_runs)]
    text = said(capsys, *words, "--step", "2", status=0)
    assert "tokenizer.json, tokenizer_config.json), the model after 2 steps" in text
    assert "one token per byte" in text
    model, tokenizer = load_pretrained(folder)
    np.testing.assert_array_equal(logits(model), logits(load_run(run, step=2).model))
    for sample in ("1234>é", "<|eos|>"):
        assert tokenizer.encode(sample) == TOKENIZER.encode(sample)
    assert f"{folder} already exists and is not an empty folder" in said(capsys, *words)
    assert "--dtype is F16; it is of GGUF files" in said(capsys, *words[:2], "x", *words[3:], "--dtype", "F16")
    assert "no checkpoint of step 9" in said(capsys, *words[:2], str(tmp_path / "x"), *words[3:], "--step", "9")
    assert not (tmp_path / "x").exists()


def test_an_exported_gguf_file_is_loaded_by_llama_cpp(finished_runs, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))
    words = ["export", "first", str(tmp_path / "out"), "--to", "gguf", "--runs-folder", str(finished_runs)]
    assert "(model.gguf), the model after 3 steps" in said(capsys, *words, status=0)
    saved = load_run(finished_runs / "from_scratch" / "first")
    model, _ = load_pretrained(tmp_path / "out" / "model.gguf")
    np.testing.assert_array_equal(logits(model), logits(saved.model))
    settings = EngineSettings(max_new_tokens=6, group_size=1, eos_ids=(TOKENIZER.eos_id,), pad_id=TOKENIZER.pad_id)
    ours = JaxEngine(saved.model, settings).score(*TEXTS, response_width=3)
    file = tmp_path / "out" / "model.gguf"
    with LlamaCppEngine(file, settings, cache_dtype="F32", slots=1, context=32, tokenizer=TOKENIZER) as engine:
        theirs = engine.score(*TEXTS, response_width=3)
    np.testing.assert_allclose(theirs, ours, atol=2e-3)
    assert np.abs(ours).max() > 1
