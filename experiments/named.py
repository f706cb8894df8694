"""`module:name` on the command line: an object of the user's own, and the sentence where there is none."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.run_folder import ROOT
from experiments.run_folder import UserError

FORM = "my_module:my_name"


def is_own(text: str) -> bool:
    """Whether a text says where an object of the user's own is, rather than a name of the project."""
    return ":" in text


def unknown_name(text: str, what: str, known: Iterable[str]) -> UserError:
    """The error of a name that is not there: what there is, the nearest of them, and how one's own is named."""
    names = list(known)
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    there = f"there are {', '.join(names)}" if names else "none comes with the project"
    return UserError(f"There is no {what} {text!r}; {there}, or give one of your own as {FORM}.{hint}")


def load_object(text: str, what: str, known: Iterable[str] = ()) -> Any:
    """The object that `module:name` names; modules of the current directory are found too.

    Args:
        text: the module, a colon, and the name in it (with dots for what is inside a class).
        what: what it should be, for the sentences: "objective", "task", "signal".
        known: names of the project that could have been meant, for the sentence where there is no colon.

    Raises:
        UserError: there is no colon, no such module or no such name in it, or the module itself fails.
    """
    module, colon, name = text.partition(":")
    if not colon:
        raise unknown_name(text, what, known)
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UserError(f"The {what} is {text!r}; it must be a module and a name in it, as in {FORM}.")
    found = _import(module, what)
    for part in name.split("."):
        names = vars(found)
        if part not in names and not hasattr(found, part):
            public = sorted(each for each in names if not each.startswith("_"))
            near = difflib.get_close_matches(part, public, n=3, cutoff=0.5) or public[:8]
            there = f"it has {', '.join(near)}" if near else "it has no public names"
            raise UserError(f"The {what} {text!r} is not there: {module} has no {part}; {there}.")
        found = getattr(found, part)
    return found


def load_function(text: str, what: str, known: Iterable[str] = ()) -> Callable[..., Any]:
    """`load_object`, where the object must be a function, or something else that can be called.

    Raises:
        UserError: as `load_object`; or it cannot be called.
    """
    found = load_object(text, what, known)
    if isinstance(found, type) or not callable(found):
        seen = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise UserError(f"The {what} {text!r} is {seen}; it must be a function.")
    return found


def _import(module: str, what: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"The module {module} of the {what} cannot be imported: {own_words(error)}.") from error
        raise UserError(
            f"There is no module {error.name} for the {what}; it must be a file of {here} or be installed."
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"The module {module} of the {what} cannot be imported: {own_words(error)}.") from error


def own_words(error: BaseException) -> str:
    """What went wrong in a user's own code, and where: `ZeroDivisionError: division by zero (my_module.py:3)`."""
    said = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{kind}: {error.msg} ({Path(error.filename).name}:{error.lineno})"
    place = _place(error)
    return f"{kind}{f': {said}' if said else ''}{f' ({place})' if place else ''}"


def _place(error: BaseException) -> str | None:
    """File and line of the innermost frame that is the user's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    ours = tuple(str(ROOT / room) for room in ("experiments", "jaxrl_llm"))
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith(ours)]
    # Frames of the standard library are inside the interpreter's folder.
    own = [frame for frame in own if not frame.filename.startswith(sys.base_prefix + "/lib/python")] or own
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else None
