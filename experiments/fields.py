"""Nested settings by the flat names they have on the command line and in config.json, and how tyro is told of them.

A field is known by its own name, whichever group it is in: `--learning-rate`, not `--train.optimizer.learning-rate`. A
group that asks for it (`NAMED`) keeps its name in front, `--recipe-settings.clip-high`, and so does the deeper or later
of two fields that would otherwise have the same name.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated
from typing import Any

import tyro

from jaxrl_llm.checks import LATER

NAMED = {"named": True}
"""Metadata of a field that is a group whose name its fields keep; what is None in such a group is not saved."""

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting.

    Attributes:
        path: names of the groups that it is in, from the outermost, and its own.
        name: as it is saved: `learning_rate`, `recipe_settings.clip_high`.
        value: what it is set to.
        named: whether its group keeps its name.
        unwritten: the value at which it is not saved, its default where it is newer than runs that were saved, or a
            None of a group that is named; MISSING where it is always saved.
    """

    path: Path
    name: str
    value: Any
    named: bool
    unwritten: Any = dataclasses.MISSING

    @property
    def shown(self) -> str:
        """As it is written on the command line, without the two dashes in front."""
        return self.name.replace("_", "-")


def leaves(settings: Any) -> list[Leaf]:
    """Every field of the settings, those of nested dataclasses included, in their order."""
    found = _leaves(settings, (), named=False)
    names: dict[Path, str] = {}
    for leaf in sorted(found, key=lambda leaf: len(leaf.path)):
        short, long = leaf.path[-1], ".".join(leaf.path[-2:])
        names[leaf.path] = long if leaf.named or short in names.values() else short
    return [dataclasses.replace(leaf, name=names[leaf.path]) for leaf in found]


def _leaves(settings: Any, path: Path, *, named: bool) -> list[Leaf]:
    found: list[Leaf] = []
    for field in dataclasses.fields(settings):
        value, here = getattr(settings, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, here, named=field.metadata == NAMED)
        else:
            later = field.metadata == LATER or (named and field.default is None)
            found.append(Leaf(here, field.name, value, named, field.default if later else dataclasses.MISSING))
    return found


def flat_values(settings: Any) -> dict[str, Any]:
    """The settings by name, as JSON keeps them: tuples as lists, and nothing for a None of a group that is named, nor
    for a later field at its default."""
    return {
        leaf.name: list(leaf.value) if isinstance(leaf.value, tuple) else leaf.value
        for leaf in leaves(settings)
        if leaf.unwritten is dataclasses.MISSING or leaf.value != leaf.unwritten
    }


def with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """The settings with these values, by name; what is not among them keeps its value.

    Raises:
        ValueError: the settings do not allow a value, or it is of another kind than the field.
    """
    for leaf in leaves(settings):
        if leaf.name in values and not _is_kind(values[leaf.name], _kind(settings, leaf.path)):
            raise ValueError(f"{leaf.name} is {str(values[leaf.name])[:80]!r}, which is not what that field holds.")
    changes = {leaf.path: values[leaf.name] for leaf in leaves(settings) if leaf.name in values}
    return _changed(settings, changes, ())


def restored(settings: Any, saved: Mapping[str, Any]) -> Any:
    """The settings that `flat_values` gave these values of: what it left out is at the value at which it does so, also
    where it is another in `settings`.

    Args:
        settings: of the same kind: those of the experiment.
        saved: by name; what is not among them, and is always saved, keeps its value.

    Raises:
        ValueError: as `with_values`.
    """
    absent = {leaf.name: leaf.unwritten for leaf in leaves(settings) if leaf.unwritten is not dataclasses.MISSING}
    return with_values(settings, {**absent, **saved})


def _kind(settings: Any, path: Path) -> Any:
    """The annotation of a field."""
    for name in path[:-1]:
        settings = getattr(settings, name)
    return typing.get_type_hints(type(settings))[path[-1]]


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a JSON value is one of a field that is annotated so; annotations of other things allow everything."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return any(type(value) is type(member) and value == member for member in members)
    if origin in (typing.Union, types.UnionType):
        return any(_is_kind(value, member) for member in members)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(
            any(_is_kind(item, member) for member in members if member is not ...) for item in value
        )
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind if kind in (str, int, bool, type(None)) else True


def from_tyro(start: Any, parsed: Any) -> Any:
    """The dataclass that `for_tyro(start)` stood for, with the values that were parsed.

    Raises:
        ValueError: it does not allow a value, or not two of them together.
    """
    return _changed(start, {leaf.path: leaf.value for leaf in leaves(parsed)}, ())


def _changed(settings: Any, changes: Mapping[Path, Any], path: Path) -> Any:
    made = {}
    for field in dataclasses.fields(settings):
        value, here = getattr(settings, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            made[field.name] = _changed(value, changes, here)
        elif here in changes:
            made[field.name] = tuple(changes[here]) if isinstance(changes[here], list) else changes[here]
    return dataclasses.replace(settings, **made)


def for_tyro(settings: Any) -> Any:
    """A dataclass of the same shape and values, whose fields carry their names and sentences for tyro.

    Its values are not checked: what a user gives is held to the ranges first, so that the sentence names the field.
    """
    return _for_tyro(settings, {leaf.path: leaf.shown for leaf in leaves(settings)}, ())


def _for_tyro(settings: Any, names: Mapping[Path, str], path: Path) -> Any:
    kinds, sentences = typing.get_type_hints(type(settings)), attribute_sentences(type(settings))
    fields: list[tuple[str, Any, Any]] = []
    values = {}
    for field in dataclasses.fields(settings):
        value, here = getattr(settings, field.name), (*path, field.name)
        group = dataclasses.is_dataclass(value)
        values[field.name] = _for_tyro(value, names, here) if group else value
        kind = type(values[field.name]) if group else kinds[field.name]
        told = tyro.conf.arg(name=None if group else names[here], help=sentences.get(field.name))
        fields.append((field.name, Annotated[kind, told], dataclasses.field(metadata=field.metadata)))
    made = dataclasses.make_dataclass(type(settings).__name__, fields, frozen=True, namespace={"__doc__": ""})
    return made(**values)


def attribute_sentences(settings: type) -> dict[str, str]:
    """What the section Attributes of the docstrings of a dataclass and of those it extends says of each field."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        _, _, section = (kind.__doc__ or "").partition("Attributes:\n")
        section = section.split("\n\n", 1)[0]
        # A field begins eight columns in (four, in a docstring that was made); its further lines are deeper.
        depth = len(section) - len(section.lstrip(" "))
        for entry in re.split(rf"\n {{{depth}}}(?=\S)", "\n" + section):
            name, colon, sentence = entry.strip().partition(":")
            if colon:
                found[name.strip()] = " ".join(sentence.split())
    return found
