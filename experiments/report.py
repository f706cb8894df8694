"""`report.html`: one file that shows a run, written from the run's files alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup

from experiments import metric_names as names
from experiments import records
from experiments import style
from experiments import words
from experiments.arguments import restored
from experiments.bounds_report import bounds_section
from experiments.episode_page import episodes_section
from experiments.evaluation import summarise
from experiments.evaluation_table import shown_rows
from experiments.evaluation_table import title
from experiments.figures import draw_all
from experiments.objective_check import objective_section
from experiments.records import Record
from experiments.registry import get_experiment
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import named_damage
from experiments.study import Study
from experiments.study import read_results
from experiments.style import Picture
from jaxrl_llm.redaction import redact
from jaxrl_llm.redaction import redact_setting

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_SAMPLES = 12


def write_report(run: RunFolder) -> str:
    """Draw the figures and write the report of a run; returns where it is.

    Raises:
        UserError: the folder is not a run, or cannot be written.
    """
    with named_damage(run):
        record = records.read(run)
        if record.config.get("kind") == "study":
            template, context, pictures = "study.html.j2", *study_context(record)
        else:
            drawn = draw_all(record)
            template, context, pictures = "report.html.j2", report_context(record, drawn), list(drawn.values())
        page = render(template, context)
    try:
        for picture in pictures:
            style.save(picture, run.figures)
        # Half a surrogate pair, as byte tokenizers make it, is no text in UTF-8.
        run.report.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"Cannot write {run.report}: {error.strerror}.") from error
    return RunFolder(run.path).shown + "/report.html"


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page from a template; text is escaped, figures go in as they are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = environment.get_template("page.css").render(light=style.css_variables(), dark=style.css_variables(style.DARK))
    return environment.get_template(template).render(**context, css=Markup(css))


def shown_picture(picture: Picture) -> dict[str, Any]:
    """A figure as the templates read it."""
    return {"title": picture.title, "caption": picture.caption, "svg": Markup(style.inline_svg(picture))}


def report_context(record: Record, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    """Everything the template shows."""
    chosen = {name: shown_picture(picture) for name, picture in pictures.items()}
    return {
        "run": record.run,
        "claim": record.config["claim"],
        "headline": headline(record),
        "verdict": verdict(record),
        "facts": facts(record),
        "stale": record.config.get("stale"),
        "learning": [chosen[name] for name in ("reward", "length", "entropy", "shift") if name in chosen],
        "bounds": bounds_section(record, [chosen[name] for name in ("bounds", "acceptance") if name in chosen]),
        "samples": samples_section(record),
        "episodes": episodes_section(record.run),
        "evaluations": [{"title": title(found), "rows": shown_rows(found)} for found in record.evaluations],
        "objective": objective_section(record.run),
        "cost": [chosen[name] for name in ("time",) if name in chosen],
        "counts": counts(record),
        **_frame(record),
        "files": "config, environment, samples and summary (.json), metrics and timings (.jsonl)",
    }


def _frame(record: Record) -> dict[str, Any]:
    """What every report shows: settings and machine, without the secrets that an older run may have written down."""
    return {
        "settings": [(name, str(redact_setting(name, value))) for name, value in record.settings.items()],
        "environment": [(name, redact(str(value))) for name, value in _flat(record.environment)],
    }


def study_context(record: Record) -> tuple[dict[str, Any], list[Picture]]:
    """Everything the template of a study shows, and its figures.

    Raises:
        UserError: the run is not complete, or its experiment is not there any more.
    """
    study = get_experiment(record.run.experiment)
    if not isinstance(study, Study):
        raise UserError(f"{record.run.config} says that it is of a study; {study.name} trains.")
    if not record.summary:
        raise UserError(f"Run {record.run.label} is not complete; a study has its report once all parts are done.")
    settings = restored(study.tiny if record.config["tiny"] else study.settings, record.settings)
    with matplotlib.rc_context(style.SETTINGS):
        page = study.page(settings, read_results(record.run), record.summary)
        sections = [
            {
                "title": section.title,
                "paragraphs": section.paragraphs,
                "pictures": [shown_picture(picture) for picture in section.pictures],
                "table": section.table,
            }
            for section in page.sections
        ]
    value = {"value": page.value, "range": page.value_range}
    context = {
        "run": record.run,
        "claim": record.config["claim"],
        "headline": {"title": page.value, "before": value, "after": None, "sentence": page.sentence},
        "verdict": verdict(record),
        "facts": " · ".join(
            [page.facts, f"{words.duration(record.summary['seconds'])} of computing", *machine(record)]
        ),
        "sections": sections,
        **_frame(record),
        "files": "config, environment and summary (.json), and parts",
    }
    return context, [picture for section in page.sections for picture in section.pictures]


def machine(record: Record) -> list[str]:
    """Processor and device, if they were written down."""
    environment = record.environment
    if not environment:
        return []
    return [f"{environment['processor']}, {environment['processor_cores']} cores; {environment['device']}"]


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value) if isinstance(value, Mapping) else [(name.replace("_", " "), value)]
    return rows


def _accuracy(summary: Mapping[str, Any], when: str) -> dict[str, str] | None:
    if f"accuracy_{when}" not in summary:
        return None
    return {
        "value": words.percent(summary[f"accuracy_{when}"]),
        "range": words.interval(summary[f"accuracy_{when}_interval"]),
    }


def headline(record: Record) -> dict[str, Any]:
    """Held-out accuracy before and after, and what the difference is."""
    answers = record.samples.get("answers", [])
    summary = record.summary or (summarise(answers) if answers else {})
    before, after = _accuracy(summary, "before"), _accuracy(summary, "after")
    if before is None:
        return {
            "title": "not evaluated yet",
            "before": None,
            "after": None,
            "sentence": "The run has not been evaluated yet.",
        }
    problems = summary["held_out_problems"]
    if after is None:
        sentence = f"Share of {problems} held-out problems answered right before training; the run is not complete."
        return {"title": f"{before['value']} before training", "before": before, "after": None, "sentence": sentence}
    ends = words.point_interval(summary["accuracy_gain_interval"])
    gain = f"{words.points(summary['accuracy_gain'])}, 95 % interval {ends}"
    strict = f"{words.percent(summary['strict_before'])} to {words.percent(summary['strict_after'])}"
    sentence = (
        f"Share of {problems} held-out problems answered right before and after training (greedy; the last number or "
        f"line counts): {gain}. When the whole answer must be right: {strict}. The small ranges are Wilson 95 % "
        "intervals over problems; the one of the gain pairs the answers to each problem."
    )
    return {"title": f"{before['value']} to {after['value']}", "before": before, "after": after, "sentence": sentence}


def verdict(record: Record) -> dict[str, str]:
    """Whether the claim was met, in words."""
    summary = record.summary
    if not summary:
        done = f"{record.batches} of {record.settings['steps']} batches are done."
        return {"kind": "open", "word": "not complete", "sentence": done}
    if summary["claim_met"] is None:
        said = "A tiny run: it shows that everything works and claims nothing."
        return {"kind": "open", "word": "no claim", "sentence": said}
    quantity, least = summary["expected"]["quantity"], summary["expected"]["at_least"]
    measured = "nothing" if summary[quantity] is None else f"{summary[quantity]:.3f}"
    said = f"Expected: {quantity.replace('_', ' ')} of at least {least:g}; measured: {measured}."
    if summary["changed_settings"]:
        said += f" Settings changed from those of the claim: {', '.join(summary['changed_settings'])}."
    if summary["claim_met"]:
        return {"kind": "met", "word": "claim met", "sentence": said}
    return {"kind": "missed", "word": "claim missed", "sentence": said}


def facts(record: Record) -> str:
    """What was run, in one line."""
    settings = record.settings
    parts = [
        f"{record.batches} batches of {settings['prompts']} prompts x {settings['group_size']} answers",
        f"recipe {settings['recipe']}, seed {settings['seed']}",
        str(record.config.get("trained", "")),
    ]
    if record.summary:
        parts.append(f"{words.duration(record.summary['seconds_training'])} of training")
    return " · ".join(part for part in [*parts, *machine(record)] if part)


def samples_section(record: Record) -> dict[str, Any] | None:
    """Answers to the first held-out problems before and after; those that changed come first."""
    answers = record.samples.get("answers", [])
    if not answers:
        return None
    has_after = all("after" in answer for answer in answers)
    rows = sorted(
        answers, key=lambda answer: not has_after or answer["before"]["lenient"] == answer["after"]["lenient"]
    )
    changed = sum(answer["before"]["lenient"] != answer["after"]["lenient"] for answer in answers) if has_after else 0
    others = min(SHOWN_SAMPLES // 3, len(rows) - changed) if changed else SHOWN_SAMPLES
    shown = _spread(rows[:changed], SHOWN_SAMPLES - others) + _spread(rows[changed:], others)
    note = f"{len(shown)} of {len(answers)} held-out problems, greedy answers."
    if has_after:
        note += f" Right or wrong changed for {changed} of them; the first rows are such."
    return {
        "note": note,
        "has_after": has_after,
        "prompt": answers[0]["prompt"],
        "rows": [_sample_row(answer) for answer in shown],
    }


def _spread(rows: list[Any], count: int) -> list[Any]:
    """`count` rows, evenly spread."""
    if len(rows) <= count:
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def _sample_row(answer: Mapping[str, Any]) -> dict[str, Any]:
    question = next(iter(answer["prompt"].splitlines()[-1:]), "") or "(empty)"
    row: dict[str, Any] = {"question": question, "answer": answer["answer"]}
    for when in ("before", "after"):
        if when in answer:
            right = answer[when]["lenient"]
            # Bytes of an untrained model are no text; what cannot be printed is shown as such.
            text = "".join(letter if letter.isprintable() else "\ufffd" for letter in answer[when]["text"].strip())
            row[when] = {
                "kind": "right" if right else "wrong",
                "mark": "✓" if right else "✗",
                "text": text or "(empty)",
            }
    return row


def counts(record: Record) -> list[tuple[str, str]]:
    """What was skipped, replaced and made."""
    rows = []
    for name, label in names.COUNTS.items():
        _, values = record.column(name)
        if len(values):
            rows.append((label, f"{values.sum():,.0f}"))
    summary = record.summary
    if summary:
        rows.append(("problems replaced because their generator ran out of time", f"{summary['replaced_problems']:,}"))
        rows.append(("training, all batches", words.duration(summary["seconds_training"])))
        rows.append(("held-out evaluations", words.duration(summary["seconds_evaluation"])))
    return rows
