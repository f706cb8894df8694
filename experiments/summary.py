"""`summary.json`: the few numbers that an experiment is about, computed from the other files of the run."""

from typing import Any

from experiments import metric_names as names
from experiments import records
from experiments.arguments import RunArguments
from experiments.evaluation import summarise
from experiments.registry import Experiment
from experiments.run_folder import RunFolder
from experiments.run_folder import read_json
from experiments.run_folder import write_json
from experiments.settings import changed_settings
from experiments.settings import flat_settings


def write_summary(
    run: RunFolder, experiment: Experiment, arguments: RunArguments, *, state_sha256: str
) -> dict[str, Any]:
    """Compute the summary of a run that has taken all its steps, and write it.

    `state_sha256` is the fingerprint of the last policy and optimiser: equal for runs that are the same bit for bit.

    Raises:
        UserError: a file of the run is missing or cannot be written.
    """
    record = records.read(run)
    claimed = flat_settings(experiment.tiny if arguments.tiny else experiment.settings)
    expected = experiment.expectation
    summary: dict[str, Any] = {"experiment": experiment.name, "run": run.path.name, "claim": experiment.claim}
    summary |= summarise(record.samples["answers"])
    evaluation, total = (
        float(record.column(name)[1].sum()) for name in (names.EVALUATION_SECONDS, names.TOTAL_SECONDS)
    )
    summary |= {
        "steps": record.batches,
        "state_sha256": state_sha256,
        "seconds_training": total - evaluation,
        "seconds_evaluation": evaluation,
        "replaced_problems": replaced_problems(run),
        "expected": {"quantity": expected.quantity, "at_least": expected.at_least},
        # Settings that differ from those under which the claim is made.
        "changed_settings": changed_settings(claimed, record.settings),
    }
    summary["claim_met"] = None if arguments.tiny else expected.check(summary)
    write_json(run.summary, summary)
    return summary


def replaced_problems(run: RunFolder) -> int:
    """How many problems were replaced because their generator ran out of time, by the newest checkpoint."""
    saved = [path for path in (run.path / "checkpoints").glob("*/progress/metadata") if path.parts[-3].isdigit()]
    if not saved:
        return 0
    progress = read_json(max(saved, key=lambda path: int(path.parts[-3])))
    return len(progress["cursor"].get("replaced", ()))
