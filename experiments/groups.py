"""Runs of one experiment that differ in their seed alone: `runs/<experiment>/<id>.group.json` says which."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import find_run
from experiments.run_folder import is_file
from experiments.run_folder import read_json
from experiments.run_folder import write_json

ENDING = ".group.json"
KEYS = ("experiment", "tiny", "settings", "seeds")


@dataclasses.dataclass(frozen=True)
class Group:
    """Sibling runs.

    Attributes:
        path: the file that says which they are.
        config: experiment, tiny, the settings that they share, and their seeds.
    """

    path: Path
    config: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Name of the group, with which the names of its runs begin."""
        return self.path.name.removesuffix(ENDING)

    @property
    def label(self) -> str:
        """`experiment/id`, as a person would type it."""
        return f"{self.path.parent.name}/{self.id}"

    @property
    def seeds(self) -> Sequence[int]:
        """One for each run."""
        return self.config["seeds"]

    def run(self, seed: int) -> RunFolder:
        """The folder of one of its runs, which may not be there yet."""
        return RunFolder(self.path.parent / sibling(self.id, seed))


def sibling(group_id: str, seed: int) -> str:
    """Name of the run of that seed."""
    return f"{group_id}-seed{seed}"


def write_group(runs: Path, group_id: str, config: Mapping[str, Any]) -> Group:
    """Write down a group, or find that it is there already with these runs.

    Raises:
        UserError: a group of that name has other runs, or the file cannot be written.
    """
    path = (runs / str(config["experiment"]) / f"{group_id}{ENDING}").absolute()
    if path.exists():
        before = _read(path).config
        if [before[name] for name in KEYS] != [config[name] for name in KEYS]:
            raise UserError(
                f"There is a group {group_id} with other seeds or settings; give this one another --id, or go on "
                f"with that one by --resume {group_id}."
            )
    write_json(path, config)
    return Group(path, config)


def _read(path: Path) -> Group:
    config = read_json(path)
    kinds = {"experiment": str, "tiny": bool, "settings": dict, "seeds": list}
    whole = isinstance(config, dict) and all(isinstance(config.get(name), kind) for name, kind in kinds.items())
    if not whole or not all(type(seed) is int for seed in config["seeds"]):
        raise UserError(f"{path} is damaged: it must hold {', '.join(KEYS)} of a group of runs.")
    return Group(path, config)


def find_group(text: str, runs: Path) -> Group | None:
    """The group that a person means by a path, by `experiment/id` or by an id; None where there is none.

    Raises:
        UserError: its file cannot be read.
    """
    text = text.removesuffix(ENDING)
    for path in (Path(f"{text}{ENDING}"), runs / f"{text}{ENDING}"):
        if is_file(path):
            return _read(path.absolute())
    named = [path for path in runs.glob(f"*/*{ENDING}") if path.name == f"{text}{ENDING}"]
    return _read(max(named, key=lambda path: path.stat().st_mtime).absolute()) if named else None


def find_runs(texts: Sequence[str], runs: Path) -> list[RunFolder]:
    """The runs that are meant, those of a group one by one.

    Raises:
        UserError: one of them is not there.
    """
    found: list[RunFolder] = []
    for text in texts:
        group = find_group(text, runs)
        found += (
            [find_run(str(group.run(seed).path), runs) for seed in group.seeds] if group else [find_run(text, runs)]
        )
    return found
