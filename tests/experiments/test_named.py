"""Objects of the user's own: found by module:name, and a sentence for each way in which they are not there."""

import json
import sys
import textwrap

import pytest

from experiments.doors import find_objective
from experiments.doors import find_signal
from experiments.doors import find_task
from experiments.named import load_function
from experiments.named import load_object
from experiments.objective_check import examine
from experiments.objective_check import sentences
from experiments.run_folder import UserError

MINE = """
import jax
import jax.numpy as jnp
from jaxrl_llm.environments import Problem, Score, get_task

answer = 42

def my_loss(batch):
    ratio = jnp.exp(batch.log_prob - jax.lax.stop_gradient(batch.log_prob_old))
    losses = jnp.where(batch.response_mask, -ratio * batch.advantages[:, None], 0.0)
    return losses.sum(), batch.response_mask.sum()

def flipped(batch):
    total, count = my_loss(batch)
    return -total, count

def constant(batch): return jnp.sum(batch.rewards)
def table(batch): return batch.log_prob
def branches(batch): return batch.log_prob.sum() if batch.log_prob.sum() > 0 else 0.0
def infinite(batch): return batch.log_prob.sum() / 0
def misspelt(batch): return batch.logprob.sum()

class MyTask:
    name, stop = "mine", "\\n"
    def train(self, seed, step, count):
        return [Problem(f"{i}=", str(i), f"train {i + 100 * step + 1000 * seed}") for i in range(count)]
    def held_out(self): return [Problem("7=", "7", "held out")]
    def score(self, problem, text): return Score.exact(text, problem.answer)

class Leaky(MyTask):
    def held_out(self): return [Problem("0=", "0", "train 0")]

class Failing(MyTask):
    def held_out(self): return {}["nothing"]

class Needy(MyTask):
    def __init__(self, path): self.path = path

def make_task(): return get_task("copy_digits")
instance = MyTask()

class Half:
    name, stop = "half", ""
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module `mine` in the current directory."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "broken.py").write_text("a = 1\nb = a / 0\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import not_there_at_all\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "broken", "wrong", "needs", "leaves"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "nill",
            r"no objective 'nill'; there are nll, dpo, or .* as my_module:my_name\. Did you mean 'nll'",
        ),
        ("mine:", r"is 'mine:'; it must be a module and a name in it"),
        (":my_loss", r"is ':my_loss'; it must be"),
        ("../mine:my_loss", r"it must be a module and a name in it"),
        ("nothere:my_loss", r"There is no module nothere for the objective; it must be a file of "),
        ("mine:my_los", r"mine has no my_los; it has my_loss"),
        ("broken:f", r"cannot be imported: ZeroDivisionError: division by zero \(broken\.py:2\)\."),
        ("wrong:f", r"cannot be imported: SyntaxError: .* \(wrong\.py:1\)\."),
        ("needs:f", r"cannot be imported: ModuleNotFoundError: No module named 'not_there_at_all' \(needs\.py:1\)\."),
        ("leaves:f", r"cannot be imported: SystemExit: 3 \(leaves\.py:2\)\."),
        ("mine:answer", r"'mine:answer' is a int; it must be a function\."),
        ("mine:MyTask", r"'mine:MyTask' is a class; it must be a function\."),
    ],
)
def test_what_is_not_there_has_a_sentence(mine, text, sentence) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_function(text, "objective", ("nll", "dpo"))
    assert "\n" not in str(caught.value)


def test_what_is_there_is_found(mine) -> None:
    assert load_object("mine:answer", "number") == 42
    assert load_object("mine:MyTask.stop", "text") == b"\\n".decode("unicode_escape")
    assert find_objective("mine:my_loss").__name__ == "my_loss"
    assert find_signal("mine:my_loss").__name__ == "my_loss"


def test_names_of_another_door_say_which(mine) -> None:
    with pytest.raises(UserError, match="which is a recipe; use --recipe grpo"):
        find_objective("grpo")
    with pytest.raises(UserError, match=r"use --recipe-settings\.advantage leave_one_out"):
        find_signal("leave_one_out")


@pytest.mark.parametrize("text", ["mine:MyTask", "mine:instance", "mine:make_task", "copy_digits"])
def test_a_task_is_a_name_a_class_a_factory_or_an_instance(mine, text) -> None:
    assert find_task(text).name == ("mine" if "T" in text or "inst" in text else "copy_digits")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mine:Leaky", "breaks a rule: mine: train gives '0=', whose identity is held out"),
        ("mine:Failing", r"fails when it is tried: KeyError: 'nothing' \(mine.py:\d+\)"),
        ("mine:Needy", "cannot be made without arguments: TypeError: .*path"),
        ("mine:Half", "is of type Half, without train, held_out, score"),
        ("mine:answer", "is of type int, without name, stop"),
        ("copy_digit", "Did you mean 'copy_digits'"),
    ],
)
def test_a_task_that_breaks_a_rule_is_refused_before_anything_is_computed(mine, text, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        find_task(text)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("constant", "is 0 for every logit of an ordinary batch, so nothing would be learned"),
        ("table", r"fails on a small batch: TypeError: the loss returned float32\[12, 8\]"),
        ("branches", "cannot be compiled"),
        ("infinite", "it must be finite"),
        ("misspelt", r"AttributeError: 'Batch' object has no attribute 'logprob' \(mine.py:\d+\)"),
    ],
)
def test_an_objective_by_which_nothing_can_be_learned_is_refused(mine, name, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        examine(f"mine:{name}", find_objective(f"mine:{name}"))


def test_findings_are_kept_and_do_not_refuse(mine) -> None:
    flipped = examine("mine:flipped", find_objective("mine:flipped"))
    assert len(set(flipped["passed"])) == len(flipped["passed"]) > 8
    assert {finding["check"] for finding in flipped["findings"]} >= {"sign"}
    assert json.loads(json.dumps(flipped)) == flipped
    first, *rest = sentences(flipped)
    assert first.startswith("objective mine:flipped: ")
    assert any(line.startswith("  sign: ") for line in rest)
