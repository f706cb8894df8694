"""`results`: committed result files, and the tables of docs/results.md and README.md made from them."""

import re
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import words
from experiments.run_folder import ROOT
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json
from experiments.run_folder import write_json

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- results: made by python -m experiments results -->", "<!-- end of results -->"
MACHINE = ("processor", "processor_cores", "device", "python", "git_commit", "started")


def keep(run: RunFolder, results: Path = RESULTS) -> Path:
    """Write the result file of a complete run; it replaces that of an earlier run with the same settings changed.

    Raises:
        UserError: the run is not complete, or is a tiny one, which claims nothing.
    """
    summary, environment = read_json(run.summary), read_json(run.environment)
    if summary["claim_met"] is None:
        raise UserError(f"Run {run.label} is a tiny one; results are of runs that claim something.")
    machine = {name: environment[name] for name in MACHINE} | {"jax": environment["packages"]["jax"]}
    results.mkdir(exist_ok=True)
    settings = read_json(run.config)["settings"]
    # A run with other settings than the claim's stands beside that of the claim, under a name of its own.
    changes = [re.sub(r"[^\w.-]+", "_", f"{name}_{_words(settings.get(name))}") for name in summary["changed_settings"]]
    path = results / f"{'.'.join([run.experiment, *changes])}.json"
    write_json(path, {"summary": summary, "machine": machine, "settings": settings})
    return path


def _words(value: Any) -> str:
    """The value of a setting as the command line takes it: the members of a list one after the other."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _named(result: Mapping[str, Any]) -> str:
    """The experiment and what was changed, as on the command line."""
    summary, settings = result["summary"], result["settings"]
    changes = [f" --{name.replace('_', '-')} {_words(settings.get(name))}" for name in summary["changed_settings"]]
    return f"`{summary['experiment']}{''.join(changes)}`"


def table(results: Path = RESULTS) -> str:
    """One row per result file, in Markdown: first the experiments that train, then the studies, which compute."""
    kept = [read_json(path) for path in sorted(results.glob("*.json"))]
    trained = [_row(result) for result in kept if "accuracy_gain" in result["summary"]]
    computed = [_study_row(result) for result in kept if "accuracy_gain" not in result["summary"]]
    made = []
    for head, rows in (
        (("experiment", "before", "after", "gain", "claim", "training", "machine"), trained),
        (("experiment", "claim", "quantity", "measured", "needed", "computing", "machine"), computed),
    ):
        if rows:
            made.append("\n".join(f"| {' | '.join(line)} |" for line in [head, ("---",) * len(head), *rows]))
    return "\n\n".join(made)


def _row(result: Mapping[str, Any]) -> Sequence[str]:
    summary, machine = result["summary"], result["machine"]
    accuracy = [
        f"{words.percent(summary[f'accuracy_{when}'])} ({words.interval(summary[f'accuracy_{when}_interval'])})"
        for when in ("before", "after")
    ]
    gain = f"{words.points(summary['accuracy_gain'])} ({words.point_interval(summary['accuracy_gain_interval'])})"
    claim = ("met" if summary["claim_met"] else "missed") + f": at least {100 * summary['expected']['at_least']:+.0f}"
    duration = words.duration(summary["seconds_training"])
    return _named(result), *accuracy, gain, claim, duration, _where(machine)


def _study_row(result: Mapping[str, Any]) -> Sequence[str]:
    summary = result["summary"]
    quantity, least = summary["expected"]["quantity"], summary["expected"]["at_least"]
    return (
        _named(result),
        " ".join(summary["claim"].split()).replace("|", "\\|"),
        quantity.replace("_", " "),
        words.number(summary[quantity]),
        f"at least {words.number(least)}: {'met' if summary['claim_met'] else 'missed'}",
        words.duration(summary["seconds"]),
        _where(result["machine"]),
    )


def _where(machine: Mapping[str, Any]) -> str:
    cores = f"{machine['processor']}, {machine['processor_cores']} cores"
    return f"{cores}, {machine['device']}, jax {machine['jax']}"


def write_tables(results: Path = RESULTS, root: Path = ROOT) -> list[Path]:
    """Write docs/results.md, and the table in README.md where it has the two marks; returns what was written."""
    made = table(results)
    document = (
        "# Results\n\nMade by `python -m experiments results` from `experiments/results/`; do not edit. Experiments "
        "that train: accuracies over held-out problems, greedy, last number or line; intervals at 95 %, Wilson's over "
        "problems and Agresti-Min (paired) for the gain; one seed each. Studies, which compute: the number that the "
        f"claim is about; what it is, over how many seeds and how sure says the experiment's file.\n\n{made}\n"
    )
    page, readme = root / "docs" / "results.md", root / "README.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(document, encoding="utf-8")
    written = [page]
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if START in text and END in text:
        part = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
        readme.write_text(part.sub(lambda _: f"{START}\n{made}\n{END}", text), encoding="utf-8")
        written.append(readme)
    return written
