"""`compare` over any number of runs: seeds of one setting together, and differences paired by what is common."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic_run import write_synthetic_run

from experiments import metric_names as names
from experiments.cli import main
from experiments.compare import compared_numbers
from experiments.compare import differing_settings
from experiments.compare import overlay
from experiments.intervals import paired_difference
from experiments.records import Record
from experiments.records import read
from experiments.run_folder import RunFolder
from experiments.siblings import Difference
from experiments.siblings import Siblings
from experiments.siblings import alone
from experiments.siblings import differences
from experiments.siblings import over_seeds
from experiments.siblings import siblings

PROBLEMS = 40


def write(runs: Path, name: str, *, seed: int, rate: float, right: int, complete: bool = True) -> RunFolder:
    """A run with a learning rate, after which the first `right` of the problems are answered right."""
    run = write_synthetic_run(runs / "sums" / name, steps=30, seed=seed, complete=complete)
    config = json.loads(run.config.read_text())
    config["settings"]["learning_rate"] = rate
    run.config.write_text(json.dumps(config))
    if complete:
        answers = json.loads(run.samples.read_text())["answers"]
        for index, answer in enumerate(answers):
            answer["after"] |= {"lenient": index < right, "strict": index < right - 5}
        run.samples.write_text(json.dumps({"answers": answers}))
        summary = json.loads(run.summary.read_text())
        run.summary.write_text(json.dumps({**summary, "accuracy_after": right / PROBLEMS}))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for seed, right in ((0, 20), (1, 24), (2, 19)):
        write(folder, f"slow{seed}", seed=seed, rate=1e-5, right=right)
    for seed, right in ((0, 30), (1, 33), (2, 30)):
        write(folder, f"fast{seed}", seed=seed, rate=1e-4, right=right)
    return folder


def records_of(runs: Path, *wanted: str) -> list[Record]:
    return [read(RunFolder(runs / "sums" / name)) for name in wanted]


def test_runs_that_differ_in_their_seed_are_one_group(runs, tmp_path) -> None:
    found = records_of(runs, "slow0", "fast0", "slow1", "slow2", "fast1")
    groups = siblings(found)
    assert [len(group.records) for group in groups] == [3, 2]
    assert [group.label for group in groups] == [
        "sums, learning_rate 1e-05 (3 seeds)",
        "sums, learning_rate 0.0001 (2 seeds)",
    ]
    again = write(tmp_path, "again", seed=1, rate=1e-5, right=20)
    assert [len(group.records) for group in siblings([*found, read(again)])] == [3, 2, 1]  # no seed of its own
    assert [group.label for group in alone(found[:2])] == ["sums/slow0", "sums/fast0"]


def test_one_page_for_any_number_of_runs(runs, capsys) -> None:
    page = runs / "page.html"
    wanted = [f"{name}{seed}" for name in ("slow", "fast") for seed in range(3)]
    assert main(["compare", *wanted, "--runs-folder", str(runs), "--output", str(page)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("Settings that differ", "Differences from", "higher"):
        assert part in text
    text = page.read_text()
    assert "paired by seed, 3 seeds" in text
    assert text.count("<figure>") == 9
    assert "Accepted by the trust region" in text
    assert "of several seeds" in text.lower()
    assert main(["compare", "slow0", "--runs-folder", str(runs)]) == 2
    assert "compare was given 1 run; it must be at least two" in capsys.readouterr().err


def test_a_groups_number_is_the_mean_over_seeds_with_students_interval(runs) -> None:
    groups = siblings(records_of(runs, "slow0", "slow1", "slow2", "fast0"))
    numbers = {label: cells for label, *cells in compared_numbers(groups)}
    shares = np.array([20, 24, 19]) / PROBLEMS
    half = stats.t.ppf(0.975, 2) * stats.sem(shares)
    low, high = 100 * (shares.mean() - half), 100 * (shares.mean() + half)
    assert numbers["held-out accuracy after"][0] == f"{100 * shares.mean():.1f} %  [{low:.1f} to {high:.1f} %]"
    assert numbers["held-out accuracy after"][1].startswith("75.0 %  [54.0")  # its own interval, over problems
    assert numbers["rollout batches"] == ["30", "30"]
    assert numbers["claim met"] == ["3 of 3 yes", "yes"]
    assert {name: cells for name, *cells in differing_settings(groups)} == {
        "seed": ["0, 1, 2", "0"],
        "learning_rate": ["1e-05", "0.0001"],
    }
    with pytest.raises(ValueError, match="there are 1 seeds; an interval over seeds needs at least 2"):
        over_seeds([0.5])


def test_differences_of_groups_are_paired_by_seed(runs) -> None:
    slow, fast = siblings(records_of(runs, "slow0", "slow1", "slow2", "fast1", "fast2", "fast0"))
    lenient, strict = differences(slow, fast)
    by_seed = (np.array([30, 33, 30]) - [20, 24, 19]) / PROBLEMS
    half = stats.t.ppf(0.975, 2) * stats.sem(by_seed)
    assert (lenient.what, lenient.how) == ("held-out accuracy after", "paired by seed, 3 seeds")
    assert lenient.value == pytest.approx(by_seed.mean())
    assert (lenient.low, lenient.high) == pytest.approx((by_seed.mean() - half, by_seed.mean() + half))
    assert lenient.verdict == "higher"
    assert differences(fast, slow)[0].verdict == "lower"
    # What seeds do to both sides alike is not in it.
    apart = np.hypot(*(stats.sem(np.array(right) / PROBLEMS) for right in ([20, 24, 19], [30, 33, 30])))
    assert stats.sem(by_seed) < 0.5 * apart
    assert strict.what == "strict accuracy after"


def test_two_runs_are_paired_by_problem(runs) -> None:
    one, two = alone(records_of(runs, "slow0", "fast0"))
    lenient, _ = differences(one, two)
    answered = [np.arange(PROBLEMS) < right for right in (20, 30)]
    expected = paired_difference(*(right.astype(float) for right in answered))
    assert (lenient.value, lenient.low, lenient.high) == (expected.value, expected.low, expected.high)
    assert lenient.how == "paired by problem, 40 problems"
    # One run against several: those are averaged problem by problem.
    (several,) = siblings(records_of(runs, "fast0", "fast1", "fast2"))
    lenient, _ = differences(one, several)
    mean = np.mean([np.arange(PROBLEMS) < right for right in (30, 33, 30)], axis=0)
    expected = paired_difference(answered[0].astype(float), mean)
    assert (lenient.value, lenient.low) == pytest.approx((expected.value, expected.low))


def test_what_is_not_resolved_says_so() -> None:
    assert Difference("a", "b", 0.1, -0.02, 0.2, "").verdict == "not resolved"
    assert Difference("a", "b", 0.1, 0.0, 0.2, "").verdict == "not resolved"
    assert Difference("a", "b", -0.1, -0.2, -0.01, "").verdict == "lower"


def test_runs_that_cannot_be_paired_are_not(runs, tmp_path) -> None:
    one = read(RunFolder(runs / "sums" / "slow0"))
    open_run = read(write(tmp_path, "open", seed=0, rate=1e-4, right=0, complete=False))
    assert differences(*alone([one, open_run])) == []
    other = write(tmp_path, "other", seed=0, rate=1e-4, right=30)
    answers = json.loads(other.samples.read_text())["answers"]
    answers[3]["identity"] = "another problem"
    other.samples.write_text(json.dumps({"answers": answers}))
    assert differences(*alone([one, read(other)])) == []
    group = Siblings("g", (*records_of(runs, "fast0", "fast1"), open_run))
    (row,) = [cells for label, *cells in compared_numbers([group]) if label == "held-out accuracy after"]
    assert row[0].endswith("(1 of 3 not complete)")


def test_evaluations_that_were_asked_alike_are_compared(runs) -> None:
    sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    found = records_of(runs, "slow0", "fast0")
    for record, right in zip(found, (1, 3), strict=True):
        problems = [
            {"identity": str(index), "sampled": {"lenient": right if index < 30 else 0, "strict": 0}}
            for index in range(PROBLEMS)
        ]
        results = [{"name": "pass@2", "scoring": "lenient", "value": 0.0, "interval": [0, 0]}]
        result = {"step": 3, "samples": 4, "seed": 0, "sampling": sampling, "results": results, "problems": problems}
        object.__setattr__(record, "evaluations", [result])
    sampled = differences(*alone(found))[-1]
    assert sampled.what == "pass@2 (lenient), After 3 steps, 4 answers per problem, temperature 1, seed 0"
    # 1 - C(3, 2) / C(4, 2) = 1 / 2 and 1 for 30 of the 40 problems.
    assert sampled.value == pytest.approx(0.75 * 0.5)


def test_bands_are_over_seeds_and_leave_the_axes_to_the_runs(runs) -> None:
    groups = siblings(records_of(runs, "slow0", "slow1", "fast0", "fast1"))
    pictures = {picture.name: picture for picture in overlay(groups)}
    axes = pictures[names.REWARD.replace("/", "-")].figure.axes[0]
    assert [line.get_label() for line in axes.lines] == [group.label for group in groups]
    assert len(axes.collections) == 2
    mean = np.mean([record.column(names.REWARD)[1] for record in groups[0].records], axis=0)
    assert abs(float(np.mean(np.asarray(axes.lines[0].get_ydata()))) - mean.mean()) < 0.02
    low, high = axes.get_ylim()
    assert -0.1 < low < high < 1.1  # a band of two seeds is 13 standard errors wide
