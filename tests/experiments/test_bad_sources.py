"""Sources of experience on the command line: what cannot be is one sentence, before anything is learned."""

import json
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.sources import SourceSettings
from experiments.sources import law_of
from jaxrl_llm.rollouts import SamplingSettings


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with texts, pairs and a module."""
    (tmp_path / "texts.jsonl").write_text('{"prompt": "1>", "response": "1"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1>", "chosen": "1", "rejected": "2"}\n')
    (tmp_path / "doors_of_mine.py").write_text(
        "import jax.numpy as jnp\n"
        "def reload(folder): pass\n"
        "def off_policy(batch):\n"
        "    losses = -jnp.exp(batch.log_prob - batch.log_prob_behaviour) * batch.response_mask\n"
        "    return losses.sum(), batch.response_mask.sum()\n"
        "def nan(x): return x.rewards * jnp.nan\n"
        "def mean(x): return x.rewards - x.rewards.mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def said(capsys, *words: str) -> str:
    """The sentence of a run that does not begin."""
    assert main(["run", "from_scratch", "--tiny", "--runs-folder", "runs", *words]) == 2
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    return text


MY_RELOAD = ("--reload", "doors_of_mine:reload")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engine", "openai"], "Field --engine is 'openai', so --url must say where the server is"),
        (["--engine", "openai", "--url", "http://127.0.0.1:9/v1"], "so --reload must say how the server takes new we"),
        (["--url", "http://127.0.0.1:9/v1"], "Fields --url and --reload belong to --engine openai; --engine is 'jax'"),
        (["--engine", "vllm"], "vllm"),
        (["--engine", "llama_cpp", "--mismatch", "int8_weights"], "it is the built-in sampler that is perturbed"),
        (["--engine", "llama_cpp", "--demonstrations", "texts.jsonl"], "experience from a file is sampled by nobody"),
        (["--preferences", "pairs.jsonl"], "pairs are learned by --objective dpo or ipo, or one of your own"),
        (["--preferences", "pairs.jsonl", "--objective", "nll"], "pairs are learned by --objective dpo or ipo"),
        (["--demonstrations", "texts.jsonl"], "learned by the objective nll, distil_forward, ... or your own"),
        (
            ["--demonstrations", "texts.jsonl", "--objective", "nll", "--temperature", "0.5", "--dry-run"],
            "sampling.temperature is 0.5; it belongs to sampling",
        ),
        (
            ["--demonstrations", "text.jsonl", "--objective", "nll"],
            "Field --demonstrations: there is no file 'text.jso",
        ),
        (["--demonstrations", "texts.jsonl", "--preferences", "pairs.jsonl"], "one file at a time"),
        (
            ["--demonstrations", "doors_of_mine.py", "--objective", "nll", "--dry-run"],
            "Field --demonstrations: line 1 of doors_of_mine.py is not JSON",
        ),
        (
            ["--preferences", "texts.jsonl", "--objective", "dpo", "--dry-run"],
            "Field --preferences: line 1 of texts.jsonl has the keys ['prompt', 'response']; expected prompt, chosen",
        ),
        (["--signal", "math:sqrt", "--dry-run"], "'sqrt' fails on a small batch"),
        (["--signal", "doors_of_mine:nan", "--dry-run"], "'nan' is not finite on a small batch of ordinary numbers"),
        (
            ["--demonstrations", "texts.jsonl", "--objective", "nll", "--signal", "doors_of_mine:mean", "--dry-run"],
            "a signal is given, but the objective 'nll' reads no advantages; leave it out",
        ),
        (["--recipe-settings.advantage", "given", "--dry-run"], "recipe 'grpo' takes advantages as given; pass a sig"),
        (["--ahead", "2"], "ahead is 2; the built-in sampler works on the devices that train"),
        (["--ahead", "2", "--dry-run"], "ahead is 2; the built-in sampler works on the devices that train"),
    ],
)
def test_what_cannot_be_together_is_said_before_there_is_a_model(words, sentence, files, capsys) -> None:
    if "vllm" in words:
        with pytest.raises(SystemExit):
            said(capsys, *words)
        assert sentence in capsys.readouterr().err
    else:
        assert sentence in said(capsys, *words)
    assert not list(files.glob("runs/*/*")), "no folder is left"


def test_what_is_found_with_the_model_is_a_sentence_too(files, capsys) -> None:
    url = ("--engine", "openai", "--url", "http://user:s3cret@127.0.0.1:9/v1", *MY_RELOAD)
    unreachable = said(capsys, *url)
    assert "Field --engine: " in unreachable
    assert "127.0.0.1:9" in unreachable
    assert "s3cret" not in unreachable
    needs = said(capsys, "--demonstrations", "texts.jsonl", "--objective", "doors_of_mine:off_policy", "--dry-run")
    assert "reads the log-probs of the policy that sampled, which this experience does not have" in needs
    assert not list(files.glob("runs/*/*")), "what learned nothing does not stand in the way of the next try"


def test_a_file_without_responses_names_the_line(files, capsys) -> None:
    (files / "texts.jsonl").write_text('{"prompt": "1>", "response": "1"}\n{"prompt": "2>"}\n')
    assert "line 2 of texts.jsonl" in said(capsys, "--demonstrations", "texts.jsonl", "--objective", "nll")


def test_a_teacher_with_other_tokens_is_refused(files, capsys, finished_runs) -> None:
    text = said(capsys, "--recipe", "hybrid", "--teacher", "smollm2_135m")
    assert (
        "Field --teacher: smollm2_135m has another tokenizer than the policy (49152 tokens, the policy's 259)" in text
    )
    run = finished_runs / "from_scratch" / "first"
    words = ["run", "from_scratch", "--tiny", "--runs-folder", "runs", "--recipe", "hybrid", "--teacher", str(run)]
    assert main([*words, "--id", "taught"]) == 0
    rows = (files / "runs/from_scratch/taught/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 3


def test_a_truncated_engine_has_no_law_that_the_trainer_knows() -> None:
    whole = SamplingSettings()
    assert law_of(SourceSettings(engine="llama_cpp"), whole).known
    assert not law_of(SourceSettings(engine="llama_cpp"), SamplingSettings(top_p=0.9)).known
    assert not law_of(SourceSettings(engine="llama_cpp", sync_dtype="Q8_0"), whole).known
    assert not law_of(SourceSettings(engine="openai"), whole).known
