"""One run, one folder: `runs/<experiment>/<id>/`, what is in it, and how it is found again."""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.durable import sync
from jaxrl_llm.redaction import redact_command
from jaxrl_llm.regular import read_regular

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "chex",
    "orbax-checkpoint",
    "numpy",
    "gguf",
    "tokenizers",
    "reasoning-gym",
    "jaxrl_llm",
)


LONGEST_ID = 150
"""Of a name that a person gives a run; files of 255 bytes beside it take endings. [bytes]"""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one sentence that says what and why."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return self.path.parent.name

    @property
    def label(self) -> str:
        """`experiment/id`, as a person would type it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def shown(self) -> str:
        """The path, relative to the working directory where that is shorter."""
        relative = os.path.relpath(self.path)
        return str(self.path) if relative.startswith("..") else relative

    @property
    def config(self) -> Path:
        """Every setting as it was used."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Commit, versions, machine and time."""
        return self.path / "environment.json"

    @property
    def samples(self) -> Path:
        """Answers to the held-out problems, before and after."""
        return self.path / "samples.json"

    @property
    def summary(self) -> Path:
        """The numbers that the experiment is about; present exactly when the run is complete."""
        return self.path / "summary.json"

    @property
    def figures(self) -> Path:
        """Figures as PNG and SVG."""
        return self.path / "figures"

    @property
    def report(self) -> Path:
        """The report: one file that needs no other."""
        return self.path / "report.html"


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never a half.

    Raises:
        UserError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.write_bytes(_encoded(value))
        sync(part)
        part.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


def _encoded(value: Any) -> bytes:
    """JSON in UTF-8; what UTF-8 cannot say (half a surrogate pair, as byte tokenizers make it) as an escape."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2, default=str) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a file of a run.

    Raises:
        UserError: it is missing or is not JSON.
    """
    try:
        return json.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the run has not got that far, or the folder is not a run.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that was cut off by a kill is left out, a missing file has no rows.

    Raises:
        UserError: a line is no row, or its step is not above that of the line before.
    """
    if not path.exists():
        return []
    try:
        lines = read_regular(path).split(b"\n")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(f"Line {number} of {path} is not JSON: {error}.") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
            raise UserError(f"Line {number} of {path} is damaged: it must be an object with a step, 0 or more.")
        if rows and row["step"] <= rows[-1]["step"]:
            raise UserError(
                f"Line {number} of {path} is damaged: step {row['step']} comes after step {rows[-1]['step']}, expected "
                "a later one than in the line before."
            )
        rows.append(row)
    return rows


def is_file(path: Path) -> bool:
    """Whether there is such a file; no for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_config(run: RunFolder) -> dict[str, Any]:
    """What config.json says of a run.

    Raises:
        UserError: it cannot be read, or is not that of a run.
    """
    config = read_json(run.config)
    kinds = {"experiment": str, "tiny": bool, "settings": dict}
    if not isinstance(config, dict) or not all(isinstance(config.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{run.config} is damaged: it must hold experiment, tiny and settings of a run.")
    return config


@contextlib.contextmanager
def named_damage(*runs: RunFolder) -> Iterator[None]:
    """What goes wrong inside because a file of the runs holds something nobody thought of, as one sentence.

    Raises:
        UserError: naming the runs, and what Python said.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"The files of run {', '.join(run.label for run in runs)} cannot be used together "
            f"({type(error).__name__}: {said:.200}); one of them was changed, or is of another version. They are in "
            f"{', '.join(run.shown for run in runs)}."
        ) from error


def check_id(run_id: str) -> None:
    """Refuse a name that is no plain folder name.

    Raises:
        UserError: it has slashes, starts with a dot, cannot be printed or is too long.
    """
    plain = run_id and not run_id.startswith(".") and Path(run_id).name == run_id and run_id.isprintable()
    if not plain or "\\" in run_id or len(run_id.encode(errors="replace")) > LONGEST_ID:
        seen = run_id if len(run_id) <= 40 else f"{run_id[:37]}..."
        raise UserError(
            f"The run id is {seen!r}; it must be one plain folder name of at most {LONGEST_ID} bytes, without slashes "
            "and not starting with a dot."
        )


def open_folder(runs: Path, experiment: str, run_id: str | None, *, needed_bytes: int = 50_000_000) -> RunFolder:
    """Make the folder of a run, or open it again, and make sure that it can be written before anything is computed.

    Args:
        runs: where all runs go.
        experiment: name of the experiment.
        run_id: name of this run; by default the time, which is new.
        needed_bytes: free space below which no run is started. [bytes]

    Raises:
        UserError: the folder cannot be made or written, or the disk is full.
    """
    if run_id is not None:
        check_id(run_id)
    path = (runs / experiment).absolute() / (run_id or "")
    try:
        if run_id is None:
            path = new_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0")
            probe.flush()
        free = shutil.disk_usage(path).free
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot write the run folder {path} ({error.strerror if isinstance(error, OSError) else error}); choose "
            "another place with --runs-folder. Nothing has been computed yet."
        ) from error
    if free < needed_bytes:
        raise UserError(
            f"The disk of {path} has {free / 1e6:.0f} MB free and a run needs at least {needed_bytes / 1e6:.0f} MB; "
            "free some space or choose another place with --runs-folder."
        )
    return RunFolder(path)


def free_id(folder: Path) -> str:
    """A name that no run in the folder has: the time."""
    start = name = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    number = 1
    while os.path.lexists(folder / name):
        number += 1
        name = f"{start}-again{number}"
    return name


def new_folder(folder: Path) -> Path:
    """Make a folder below this one under a name of its own; of several processes that ask, each gets another.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = folder / free_id(folder)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path


def all_runs(runs: Path, experiment: str | None = None) -> list[RunFolder]:
    """Runs under `runs`, the oldest first."""
    found = runs.glob(f"{experiment or '*'}/*/config.json")
    return [RunFolder(path.parent.absolute()) for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def find_run(text: str, runs: Path) -> RunFolder:
    """The run a person means by a path, by `experiment/id`, by an id, or by an experiment's name (its newest run).

    Raises:
        UserError: there is none, naming the nearest one.
    """
    for path in (Path(text), runs / text):
        if is_file(path / "config.json"):
            return RunFolder(path.absolute())
    known = all_runs(runs)
    by_id = [run for run in known if run.path.name == text]
    by_experiment = [run for run in known if run.experiment == text.rstrip("/")]
    if by_id or by_experiment:
        return (by_id or by_experiment)[-1]
    labels = [run.label for run in known]
    near = difflib.get_close_matches(text, [*labels, *(run.path.name for run in known)], n=1, cutoff=0.5)
    hint = (
        f" Did you mean {near[0]}?"
        if near
        else f" The newest is {labels[-1]}."
        if labels
        else f" There are no runs in {runs} yet."
    )
    raise UserError(f"There is no run {text if len(text) <= 200 else text[:197] + '...'!r}.{hint}")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment(command: list[str]) -> dict[str, Any]:
    """What the numbers of a run depend on besides its settings.

    Args:
        command: the words that started the run; keys and passwords among them are not written down.
    """
    import jax

    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redact_command(command),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changed is None else len(changed.splitlines()),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "processor_cores": cores,
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "default_matmul_precision": str(jax.config.jax_default_matmul_precision or "default"),
        "packages": _versions(),
    }


def unfinished_twin(runs: Path, experiment: str, settings: Mapping[str, Any]) -> RunFolder | None:
    """The newest run of the same experiment with the same settings that has no summary yet."""
    for run in reversed(all_runs(runs, experiment)):
        # A damaged run is nobody's twin.
        with contextlib.suppress(UserError):
            if not run.summary.exists() and read_config(run)["settings"] == settings:
                return run
    return None
