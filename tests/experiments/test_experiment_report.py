"""The report and the comparison: written from files alone, and standing alone."""

import functools
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import write_synthetic_run

from experiments import metric_names as names
from experiments.bounds_report import bounds_section
from experiments.cli import main
from experiments.compare import compared_numbers
from experiments.compare import differing_settings
from experiments.figures import smooth
from experiments.records import read
from experiments.report import write_report
from experiments.run_folder import find_run
from experiments.siblings import alone
from experiments.words import duration

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(html.parser.HTMLParser):
    """Collects what a page loads, its ids, and tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.ids, self.open, self.broken = [], [], [], []

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        self.loads += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    return checker


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("synthetic")
    write_synthetic_run(runs / "sums" / "one")
    write_synthetic_run(runs / "sums" / "two", steps=30, seed=1, complete=False)
    return runs


@functools.cache
def report(runs: Path, run: str) -> str:
    assert main(["report", run, "--runs-folder", str(runs)]) == 0
    return (runs / run / "report.html").read_text()


def test_the_report_stands_alone(finished_runs, synthetic) -> None:
    for page in ((finished_runs / "from_scratch/first/report.html").read_text(), report(synthetic, "sums/one")):
        checker = check(page)
        # Every reference is to a part of the page itself.
        assert all(address.startswith("#") for address in checker.loads)
        assert {address[1:] for address in checker.loads} <= set(checker.ids)
        assert len(set(checker.ids)) == len(checker.ids)
        assert not checker.broken
        assert not checker.open
        assert not re.search(r"@import|url\((?!#)", page)


def test_the_report_follows_the_theme(synthetic) -> None:
    page = report(synthetic, "sums/one")
    assert "prefers-color-scheme: dark" in page
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert svg.count("var(--ink)") > 5
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)


def test_the_report_says_the_numbers(synthetic) -> None:
    page = report(synthetic, "sums/one")
    for part in ("28.0 %", "63.0 %", "+35.0 points", "claim met", "6 min 12 s", "not a certificate", "vacuous"):
        assert part in page
    assert page.count("<figure>") == 7


def test_a_run_that_is_not_complete_has_a_report(synthetic) -> None:
    page = report(synthetic, "sums/two")
    assert "not complete" in page
    assert "30 of 120 batches are done" in page
    assert "after training" not in page.split("Answers before and after")[1].split("What it took")[0]


def test_the_report_says_that_old_batches_were_learned(tmp_path) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "old", steps=3, complete=False)
    write_report(run)
    assert "has no ratio" not in run.report.read_text()
    config = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(config | {"stale": "'grpo' has no ratio to the policy that sampled"}))
    write_report(run)
    assert "has no ratio to the policy that sampled" in run.report.read_text()


def test_generated_text_is_escaped(synthetic, tmp_path) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "evil")
    answers = json.loads(run.samples.read_text())["answers"]
    for answer in answers:
        answer["after"]["text"] = "<script>alert(1)</script>"
    run.samples.write_text(json.dumps({"answers": answers}))
    page = report(tmp_path, "sums/evil")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_bounds_verdict_counts_vacuous_batches(tmp_path) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "loose", steps=10)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]

    def rewrite(sharp: list[float]) -> str:
        for row, value in zip(rows[1:], sharp, strict=True):
            row |= {names.UNIFIED_SHARP: value, names.UNIFIED_PRINTED: 2 * value, names.THRESHOLD: 0.6}
            row |= {names.ERROR: 0.01, names.ERROR_SE: 0.01}
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = bounds_section(read(run), [])
        assert section is not None
        return section["verdict"]

    said = rewrite([0.1] * 4 + [0.4] * 3 + [0.6] * 3)
    assert "vacuous in 6 of 10 batches as printed, and in 3 of 10" in said
    # Largest compatible error 0.01 + 1.96 x 0.01, median sharp bound 0.4.
    assert f"{0.4 / 0.0296:.3g} times" in said
    assert "above the sharp bound" not in said
    assert rewrite([0.7] * 10).startswith("Vacuous here: in all 10 batches")


def test_a_step_that_changed_nothing_can_be_drawn(tmp_path) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "still", steps=3)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row |= {name: 0.0 for name in row if name.startswith(("bounds/", "shift/")) and name != names.THRESHOLD}
        # A single group leaves the standard error unknown.
        row[names.ERROR_SE] = None
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Path(run.path / "report.html").exists() is False
    write_report(run)
    assert (run.path / "report.html").exists()


def test_compare_shows_what_differs(synthetic, capsys) -> None:
    page = synthetic / "compared.html"
    words = ["compare", "sums/one", "two", "--runs-folder", str(synthetic), "--output", str(page)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "seed" in text
    assert "learning_rate" not in text
    assert "63.0 %  [54.0 to 71.0 %]" in text
    checker = check(page.read_text())
    assert not checker.broken
    assert all(address.startswith("#") for address in checker.loads)
    assert page.read_text().count("<figure>") == 9


def test_compared_rows(synthetic) -> None:
    one, two = (read(find_run(name, synthetic)) for name in ("one", "two"))
    pair = alone([one, two])
    assert differing_settings(pair) == [("seed", "0", "1")]
    numbers = {label: values for label, *values in compared_numbers(pair)}
    assert numbers["gain"] == ["+35.0 points  [+25.0 to +44.0]", "not complete"]
    assert numbers["claim met"][0] == "yes"


def test_smoothing_keeps_means_and_lines() -> None:
    np.testing.assert_allclose(smooth(np.full(20, 3.0), 9), 3.0)
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 5)[2:-2], line[2:-2])
    np.testing.assert_array_equal(smooth(np.array([1.0, 5.0]), 9), [1.0, 5.0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (48.4, "48 s"), (372, "6 min 12 s"), (119.6, "2 min 00 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text


def test_names_and_texts_that_are_markup_or_no_text_do_not_break_a_page(tmp_path, capsys) -> None:
    first = write_synthetic_run(tmp_path / "sums" / "$x_1^$ [red]one")
    second = write_synthetic_run(tmp_path / "sums" / "_[/b]\\two$", seed=1)
    samples = json.loads(first.samples.read_text())
    samples["answers"][0] |= {"prompt": "", "answer": "[/red]"}
    samples["answers"][1]["before"]["text"] = "\ud800 half a pair"
    first.samples.write_text(json.dumps(samples))
    rows = [json.loads(line) for line in (first.path / "metrics.jsonl").read_text().splitlines()]
    for row, value in zip(rows[20:24], (float("inf"), float("-inf"), float("nan"), 1e308), strict=True):
        row |= {name: value for name in row if name != "step"}
    (first.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first.path / "objective_check.json").write_text(
        json.dumps(
            {
                "objective": "mine:loss",
                "findings": [{"check": "sign", "sentence": "Goes <up>."}],
                "passed": [],
                "skipped": [],
                "token_weights": None,
            }
        )
    )
    write_report(first)
    page = first.report.read_text()
    assert "(empty)" in page
    assert "objective mine:loss: 0 checks passed, 1 did not." in page
    assert "sign: Goes &lt;up&gt;." in page
    assert main(["compare", str(first.path), str(second.path)]) == 0
    assert "$x_1^$ [red]one" in " ".join(capsys.readouterr().out.split())
    # As text of the figure, not as a formula.
    assert "$x_1^$ [red]one" in (second.path / "compare.html").read_text()
