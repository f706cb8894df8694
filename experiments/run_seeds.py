"""`run NAME --seeds 0 1 2`: an ordinary run for each seed, side by side in one group."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import RunArguments
from experiments.arguments import TrainArguments
from experiments.groups import Group
from experiments.groups import find_group
from experiments.groups import sibling
from experiments.groups import write_group
from experiments.registry import Experiment
from experiments.run import go_on_command
from experiments.run import run_config
from experiments.run import run_experiment
from experiments.run_folder import UserError
from experiments.run_folder import check_id
from experiments.run_folder import free_id
from experiments.run_folder import open_folder
from experiments.run_folder import read_rows
from experiments.study import Study


def run_all(experiment: Experiment | Study, arguments: RunArguments, command: Sequence[str]) -> int:
    """Make the run that the arguments ask for, or one for each of their seeds; returns the exit status.

    Args:
        experiment: what is shown.
        arguments: how, with the settings and perhaps seeds; or a group to go on with.
        command: the words that started it, to be written down.

    Raises:
        UserError: as `run_experiment`; where there are several seeds, of the first of them that computed nothing.
    """
    if not isinstance(experiment, Experiment) or not isinstance(arguments, TrainArguments):
        return run_experiment(experiment, arguments, command)
    group = find_group(arguments.resume, arguments.runs_folder) if arguments.resume else None
    if group is None and not arguments.seeds:
        return run_experiment(experiment, arguments, command)
    if arguments.seeds and arguments.resume:
        raise UserError("Fields --seeds and --resume cannot be given together; the group that goes on has its seeds.")
    if arguments.dry_run:
        return run_experiment(experiment, arguments, command)
    if group is None:
        group = _new_group(experiment, arguments)
    return _run_group(experiment, arguments, group, command)


def _new_group(experiment: Experiment, arguments: TrainArguments) -> Group:
    """The group, written down before its first run starts."""
    folder = arguments.runs_folder / experiment.name
    group_id = arguments.id or free_id(folder)
    check_id(group_id)
    check_id(sibling(group_id, max(arguments.seeds)))
    settings = _with_seed(arguments, arguments.seeds[0])
    # Makes the folder of the first run, and with it sees that there is a place to write.
    open_folder(arguments.runs_folder, experiment.name, sibling(group_id, arguments.seeds[0]))
    config = run_config(experiment, settings) | {"seeds": list(arguments.seeds)}
    return write_group(arguments.runs_folder, group_id, config)


def _with_seed(arguments: RunArguments, seed: int, **changes: Any) -> RunArguments:
    train = dataclasses.replace(arguments.settings.train, seed=seed)
    return dataclasses.replace(arguments, settings=dataclasses.replace(arguments.settings, train=train), **changes)


def _run_group(experiment: Experiment, arguments: TrainArguments, group: Group, command: Sequence[str]) -> int:
    """Each run of the group that is not complete; a run that fails in the middle does not keep the others from theirs.

    Returns:
        0 when all are complete, 130 when one was interrupted, 2 when one failed.
    """
    status = 0
    for number, seed in enumerate(group.seeds, start=1):
        run = group.run(seed)
        print(f"seed {seed} ({number} of {len(group.seeds)})", flush=True)
        own = _with_seed(arguments, seed, id=run.path.name, resume=None, seeds=())
        own = dataclasses.replace(own, runs_folder=group.path.parent.parent if arguments.resume else own.runs_folder)
        try:
            ended = run_experiment(experiment, own, command)
        except UserError as error:
            if not read_rows(run.path / "metrics.jsonl"):
                if not any(group.run(each).config.exists() for each in group.seeds):
                    group.path.unlink(missing_ok=True)
                raise
            print(f"error: {error}", file=sys.stderr)
            ended = 2
        status = status or ended
        if ended == 130:
            break
    if status:
        print(f"Go on with all seeds that are not complete: {go_on_command(group.label, arguments)}")
        return status
    words = [*PROGRAM.split(), "compare", group.label]
    words += [] if arguments.runs_folder == RUNS else ["--runs-folder", str(arguments.runs_folder)]
    print(f"Compare the seeds with: {shlex.join(words)}")
    return 0
