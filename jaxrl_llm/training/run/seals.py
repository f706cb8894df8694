"""The seal of a folder: size and SHA-256 of each file in it, so that one flipped bit, a lost file or one too many is
noticed before anything is read.

`seal.json` is written last, into a folder that has not got its final name yet. It guards against damage, not against
somebody who changes a file and writes the seal anew.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxrl_llm.regular import open_regular
from jaxrl_llm.regular import read_regular

SEAL = "seal.json"
LARGEST = 1 << 24
"""Of a seal that is read. [bytes]"""


def _inside(folder: Path) -> dict[str, Path]:
    """Everything below the folder that is no folder, by its path from there."""
    found = {}
    for inner, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(inner, name)))]:
            path = Path(inner, name)
            found[path.relative_to(folder).as_posix()] = path
    return found


def _fingerprint(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _of_all(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_seal(folder: Path) -> None:
    """Seal all that is in the folder now.

    Raises:
        OSError: a file cannot be read, or the seal cannot be written.
    """
    files = {name: _fingerprint(path) for name, path in sorted(_inside(folder).items()) if name != SEAL}
    (folder / SEAL).write_text(json.dumps({"files": files, "sha256": _of_all(files)}, indent=1), encoding="utf-8")


def _read_seal(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What is sealed; None where the seal is not one.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read.
    """
    path = folder / SEAL
    if path.stat().st_size > LARGEST:
        return None
    content = json.loads(read_regular(path))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("sha256") != _of_all(files):
        return None
    return files


def what_is_broken(folder: Path) -> str | None:
    """Why a folder is not as it was sealed, as the end of a sentence; None where it is.

    Args:
        folder: sealed by `write_seal`.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    try:
        if not (folder / SEAL).is_file():
            return f"{SEAL} is missing, which every checkpoint has"
        files = _read_seal(folder)
        if files is None:
            return f"{SEAL} is damaged"
        found = _inside(folder)
        foreign = sorted(set(found) - set(files) - {SEAL})
        missing = sorted(set(files) - set(found))
        if missing:
            return f"{missing[0]} is missing"
        if foreign:
            return f"{foreign[0]} does not belong to it"
        return _first_changed(files, found)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return f"it cannot be read: {' '.join(str(reason).split())}"


def _first_changed(files: dict[str, dict[str, Any]], found: dict[str, Path]) -> str | None:
    for name, stated in files.items():
        path = found[name]
        if path.is_symlink() or not path.is_file():
            return f"{name} is no file"
        size = path.stat().st_size
        if size != stated["bytes"]:
            return f"{name} has {size} bytes and was written with {stated['bytes']}"
        if _fingerprint(path) != stated:
            return f"{name} is damaged: its SHA-256 is not the one it was written with"
    return None
