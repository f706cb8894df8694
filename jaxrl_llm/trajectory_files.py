"""Trajectories in a folder: every column bit for bit, and a line of JSON per row that a person can read.

    arrays.safetensors   all columns; columns of one number per chosen token, `[B, R]`, as `extra/NAME`
    episodes.jsonl       of each row: group, ended, return, steps, its texts, and what else was said of it
    about.json           format, sizes and SHA-256 of both, size of the vocabulary, and what else was said of the batch

Other tools need nothing of ours:

    arrays = safetensors.numpy.load_file("arrays.safetensors")            # {"tokens": int32 [B, T], "rewards": ..}
    rows = [json.loads(line) for line in open("episodes.jsonl", encoding="utf-8")]
    about = json.load(open("about.json", encoding="utf-8"))

(`load_file` of NumPy knows no bfloat16; that of torch and of flax does.)
"""

import dataclasses
import glob
import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save

from jaxrl_llm.durable import sync
from jaxrl_llm.durable import sync_tree
from jaxrl_llm.regular import require_regular
from jaxrl_llm.trajectory import OPTIONAL
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.trajectory import check_trajectory
from jaxrl_llm.trajectory_texts import stretches

FORMAT = "jaxrl_llm trajectories"
VERSION = 1
ARRAYS, EPISODES, ABOUT = "arrays.safetensors", "episodes.jsonl", "about.json"
EXTRA = "extra/"
MOST_BYTES = 4 * 2**30
"""Size of a file above which reading is refused; a batch is read as a whole."""
MOST_ABOUT = 2**20
ABANDONED_AFTER = 3600.0
"""Age [seconds] from which the draft of a process that was killed is removed."""
COLUMNS = tuple(field.name for field in dataclasses.fields(Trajectories))
DTYPES = {
    "BOOL": np.bool_,
    "BF16": jnp.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
}
"""Names of dtypes in the file, and what they are."""


class TrajectoryFileError(ValueError):
    """A folder does not hold whole trajectories, or they cannot be written; one sentence that says what and where."""


@dataclasses.dataclass(frozen=True)
class Episodes:
    """What one folder holds.

    Attributes:
        trajectories: the columns.
        rows: the line of each row.
        extra: further columns by name, `[B, R]`: one number per chosen token.
        about: what was said of the batch; `step` and `vocab_size` where they were given.
    """

    trajectories: Trajectories
    rows: list[dict[str, Any]]
    extra: dict[str, np.ndarray]
    about: dict[str, Any]


def write_trajectories(
    folder: str | Path,
    trajectories: Trajectories,
    *,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write trajectories as a folder that is there as a whole or not at all; earlier trajectories there are replaced.

    Args:
        folder: where to.
        trajectories: arrays on the host.
        texts: of each row: what it chose as one text, or its stretches as `text_stretches` makes them.
        records: of each row, what else to say of it: JSON.
        about: of the batch: JSON; "vocab_size" bounds the tokens, "step" is the step that collected it.
        extra: floating columns with one number per chosen token, `[B, R]`, such as "advantages" and "kl".

    Returns:
        The folder.

    Raises:
        TypeError, ValueError: the trajectories break a rule of `check_trajectory`, or another argument does not fit.
        TrajectoryFileError: the folder holds something else, or cannot be written.
    """
    about = dict(about or {})
    check_trajectory(trajectories, vocab_size=about.get("vocab_size"))
    arrays = _arrays(trajectories, extra or {})
    lines = _lines(trajectories, texts, records)
    packed = save(arrays)
    text = b"".join(_json(line) + b"\n" for line in lines)
    stated = {
        "format": FORMAT,
        "version": VERSION,
        "rows": len(lines),
        "files": {name: _fingerprint(content) for name, content in ((ARRAYS, packed), (EPISODES, text))},
        "about": about,
    }
    _replace_folder(Path(folder), {ARRAYS: packed, EPISODES: text, ABOUT: _json(stated) + b"\n"})
    return Path(folder)


def read_trajectories(folder: str | Path) -> tuple[Trajectories, list[dict[str, Any]]]:
    """The trajectories of a folder and the line of each row; see `read_episodes`."""
    episodes = read_episodes(folder)
    return episodes.trajectories, episodes.rows


def read_episodes(folder: str | Path, *, most_bytes: int = MOST_BYTES) -> Episodes:
    """All that `write_trajectories` wrote, verified; arrays have the dtypes and bits they had.

    Args:
        folder: as it was written.
        most_bytes: size above which a file is not read.

    Raises:
        TrajectoryFileError: a file is missing, damaged, cut off, too large or of another kind.
    """
    folder = Path(folder)
    stated = _read_about(folder)
    contents = {}
    for name in (ARRAYS, EPISODES):
        contents[name] = _read(folder / name, most_bytes, expected=stated["files"][name])
    columns = _columns(folder / ARRAYS, contents[ARRAYS])
    extra = {name.removeprefix(EXTRA): columns.pop(name) for name in list(columns) if name.startswith(EXTRA)}
    needed = [name for name in COLUMNS if name not in OPTIONAL]
    strange = sorted(set(needed) - set(columns)) or sorted(set(columns) - set(COLUMNS))
    if strange:
        raise TrajectoryFileError(f"{folder / ARRAYS} has the columns {sorted(columns)}; expected {list(COLUMNS)}.")
    trajectories = Trajectories(**{name: columns.get(name) for name in COLUMNS})  # type: ignore[arg-type]
    try:
        check_trajectory(trajectories, vocab_size=stated["about"].get("vocab_size"))
        _check_extra(trajectories, extra)
    except (TypeError, ValueError) as error:
        raise TrajectoryFileError(f"{folder / ARRAYS} holds no trajectories: {error}") from error
    return Episodes(trajectories, _rows(folder / EPISODES, contents[EPISODES], trajectories), extra, stated["about"])


def _arrays(trajectories: Trajectories, extra: Mapping[str, Any]) -> dict[str, np.ndarray]:
    columns = {name: np.asarray(value) for name, value in vars(trajectories).items() if value is not None}
    further = {name: np.asarray(value) for name, value in extra.items()}
    _check_extra(trajectories, further)
    columns |= {EXTRA + name: array for name, array in further.items()}
    known = {np.dtype(dtype) for dtype in DTYPES.values()}
    for name, array in columns.items():
        if array.dtype.newbyteorder("=") not in known:
            raise TypeError(f"{name} is of {array.dtype}; a file can hold {', '.join(DTYPES)}.")
    return {name: np.ascontiguousarray(array, array.dtype.newbyteorder("=")) for name, array in columns.items()}


def _check_extra(trajectories: Trajectories, extra: Mapping[str, np.ndarray]) -> None:
    counts = np.asarray(trajectories.action_mask).sum(axis=1)
    rows, most = len(counts), int(counts.max(initial=0))
    for name, array in extra.items():
        if not name or array.ndim != 2 or len(array) != rows or array.shape[1] < most:
            raise ValueError(
                f"extra[{name!r}] has shape {array.shape}; it must have {rows} rows and a column for each of up to "
                f"{most} chosen tokens."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"extra[{name!r}] is of {array.dtype}; it must be of kind floating.")


def _lines(
    trajectories: Trajectories,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None,
    records: Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]]:
    t = trajectories
    groups, ended, returns = (np.asarray(x).tolist() for x in (t.group_ids, t.ended, np.asarray(t.returns, np.float64)))
    steps = np.asarray(t.step_ids)
    for name, given in (("texts", texts), ("records", records)):
        if given is not None and len(given) != len(groups):
            raise ValueError(f"{name} has {len(given)} entries; it must have one for each of {len(groups)} rows.")
    lines = []
    for row, group in enumerate(groups):
        count = len(np.unique(steps[row][np.asarray(t.action_mask)[row]]))
        line = {"row": row, "group": group, "ended": ended[row], "return": returns[row], "steps": count}
        if texts is not None:
            line["text"] = _checked_text(t, row, texts[row])
        if records is not None:
            line["record"] = dict(records[row])
        lines.append(line)
    return lines


def _checked_text(
    trajectories: Trajectories, row: int, text: str | Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if isinstance(text, str):
        return [{"role": "chosen", "text": text}]
    parts = [dict(part) for part in text]
    for part in parts:
        if part.get("role") not in ("given", "chosen") or not isinstance(part.get("text"), str):
            raise ValueError(f"texts[{row}] has the stretch {part}; it needs a role, given or chosen, and a text.")
    if any("pieces" in part for part in parts):
        wanted = [
            ("chosen" if part.chosen else "given", part.stop - part.start) for part in stretches(trajectories, row)
        ]
        found = [(part["role"], len(part.get("pieces", ()))) for part in parts]
        if wanted != found:
            raise ValueError(
                f"texts[{row}] has stretches of {found} pieces; its tokens stand in stretches of {wanted}."
            )
    return parts


def _json(value: Any) -> bytes:
    """JSON in UTF-8; numbers that are not finite become null, and half letters that UTF-8 cannot write are escaped."""
    value = _plain(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON; expected texts, numbers, lists and mappings.")


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files under another name, then swap: a reader meets the old folder, none, or the new one."""
    if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):
        raise TrajectoryFileError(f"{folder} is there and holds no trajectories; choose another folder.")
    draft, aside = (folder.parent / f".{folder.name}.{uuid.uuid4().hex}.{kind}" for kind in ("draft", "old"))
    try:
        draft.mkdir(parents=True)
        _remove_abandoned(folder)
        for name, content in files.items():
            (draft / name).write_bytes(content)
        sync_tree(draft)
        if folder.exists():
            folder.rename(aside)
        draft.rename(folder)
        sync(folder.parent)
    except OSError as error:
        if aside.exists() and not folder.exists():
            with suppress(OSError):
                aside.rename(folder)
        raise TrajectoryFileError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed writers of `folder` left behind, once nobody can be writing there any more."""
    for kind in ("draft", "old"):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.{kind}"):
            if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(left, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {ARRAYS, EPISODES, ABOUT} and (folder / ABOUT).is_file()


def _read(path: Path, most: int, expected: Mapping[str, Any] | None = None) -> bytes:
    """A file, whole and as it was written.

    Raises:
        TrajectoryFileError: it is missing, too large, or not what `expected` says.
    """
    try:
        require_regular(path)
        size = path.stat().st_size
        if size > most:
            raise TrajectoryFileError(f"{path} has {size} bytes; the most that is read is {most}.")
        if expected is not None and size != expected["bytes"]:
            raise TrajectoryFileError(
                f"{path} has {size} bytes; {ABOUT} says {expected['bytes']}. It is cut or foreign."
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise TrajectoryFileError(
            f"{path} is missing; a folder of trajectories has {ARRAYS}, {EPISODES} and {ABOUT}."
        ) from error
    except OSError as error:
        raise TrajectoryFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if expected is not None and hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise TrajectoryFileError(f"{path} is damaged: its SHA-256 is not the one in {ABOUT}.")
    return content


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    stated = _parsed(path, _read(path, MOST_ABOUT))
    if not isinstance(stated, dict) or stated.get("format") != FORMAT:
        raise TrajectoryFileError(f"{path} is not about trajectories; its format must be {FORMAT!r}.")
    if stated.get("version") != VERSION:
        raise TrajectoryFileError(f"{path} is of version {stated.get('version')!r}; this reads version {VERSION}.")
    files, about = stated.get("files"), stated.get("about")
    whole = isinstance(files, dict) and all(
        isinstance(files.get(name), dict)
        and type(files[name].get("bytes")) is int
        and isinstance(files[name].get("sha256"), str)
        for name in (ARRAYS, EPISODES)
    )
    if not whole or not isinstance(about, dict) or type(about.get("vocab_size", 0)) is not int:
        raise TrajectoryFileError(f"{path} lacks the sizes and SHA-256 of its files, or what it says of the batch.")
    return stated


def _parsed(path: Path, content: bytes, where: str = "") -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TrajectoryFileError(f"{where}{path} is not JSON ({error}).") from error


def _columns(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        found = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise TrajectoryFileError(f"{path} is no safetensors file ({error}).") from error
    strange = {name: entry["dtype"] for name, entry in found.items() if entry["dtype"] not in DTYPES}
    if strange:
        raise TrajectoryFileError(f"{path} has columns of other dtypes: {strange}; expected {', '.join(DTYPES)}.")
    return {
        name: np.frombuffer(entry["data"], np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<")).reshape(entry["shape"])
        for name, entry in found.items()
    }


def _rows(path: Path, content: bytes, trajectories: Trajectories) -> list[dict[str, Any]]:
    # Split at line feeds only: JSON may hold other separators within a text.
    lines = content.split(b"\n")[:-1]
    rows = [_parsed(path, line, f"line {number} of ") for number, line in enumerate(lines, start=1)]
    count = len(np.asarray(trajectories.tokens))
    if len(rows) != count or not all(isinstance(row, dict) for row in rows):
        raise TrajectoryFileError(f"{path} has {len(rows)} lines; it must have one JSON object per row, {count}.")
    return rows
