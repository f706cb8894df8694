"""Checks of arguments: each raises one sentence that names the argument, what it was and what it must be.

Ranks, shapes and dtypes are known at trace time, so these checks cost nothing under jit. Values are not:
`require_batch_values` looks at them and is meant for concrete arrays, before anything is compiled.
"""

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

LATER = {"later": True}
"""Metadata of a field of settings that is newer than runs that were saved: at its default it is not written down, so
that their settings are still the same."""


def _describe(value: object) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"  # pyright: ignore[reportAttributeAccessIssue]
    return f"{type(value).__name__} {value!r}"


def require_rank(rank: int, axes: str, **arrays: object) -> None:
    """Every given array must have `rank` axes; `axes` says which, for the message. None is skipped.

    Raises:
        TypeError: if one of them is not an array.
        ValueError: if the rank of one of them differs.
    """
    for name, array in arrays.items():
        if array is None:
            continue
        if not hasattr(array, "ndim"):
            raise TypeError(f"{name} is {_describe(array)}; it must be an array with axes [{axes}].")
        if array.ndim != rank:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"{name} is {_describe(array)}; it must have {rank} axes [{axes}].")


def require_same_shape(**arrays: object) -> None:
    """Every given array must have the shape of the first one. None is skipped.

    Raises:
        ValueError: if two shapes differ.
    """
    present = {name: array for name, array in arrays.items() if array is not None}
    names = list(present)
    for name in names[1:]:
        if present[name].shape != present[names[0]].shape:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"{name} is {_describe(present[name])} and {names[0]} is {_describe(present[names[0]])}; "
                "their shapes must be equal."
            )


def require_dtype(kind: str, **arrays: object) -> None:
    """Every given array must be of the kind "floating", "integer" or "boolean". None is skipped.

    Raises:
        TypeError: if the dtype of one of them is of another kind.
    """
    types = {"floating": jnp.floating, "integer": jnp.integer, "boolean": jnp.bool_}
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, types[kind]):  # pyright: ignore[reportAttributeAccessIssue]
            raise TypeError(f"{name} is {_describe(array)}; its dtype must be {kind}.")


def present(array: Array | None) -> Array:
    """An optional array that has been found to be there: tells the type checker, and stops where it was not looked for.

    Raises:
        AssertionError: if it is None after all, which is a mistake of ours and not of the caller.
    """
    assert array is not None, "an array that was needed is None, and nothing has refused it"
    return array


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """`value` must be one of `choices`.

    Raises:
        ValueError: naming the nearest choice, where one is near.
    """
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.{hint}")


def require_between(name: str, value: float, low: float, high: float) -> None:
    """The Python number `value` must lie in [low, high].

    Raises:
        ValueError: if it does not, NaN included.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie in [{low}, {high}].")


def require_positive(name: str, value: float) -> None:
    """The Python number `value` must be positive and finite.

    Raises:
        ValueError: if it is not, NaN included.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be a positive number.")


def require_not_negative(name: str, value: float) -> None:
    """The Python number `value` must be at least 0 and finite.

    Raises:
        ValueError: if it is not, NaN included.
    """
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be a number that is not negative.")


def require_at_least(name: str, value: int, least: int) -> None:
    """The Python number `value` must be at least `least`.

    Raises:
        ValueError: if it is not.
    """
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")


def require_sizes(**sizes: int) -> None:
    """Every given Python number must be at least 1.

    Raises:
        ValueError: naming the first one that is not.
    """
    for name, size in sizes.items():
        require_at_least(name, size, 1)


def require_numbers(low: float, high: float, **values: object) -> None:
    """Every given Python number must lie in [low, high]; arrays, whose values jit may not know, are let through.

    Raises:
        ValueError: if one does not, NaN included.
    """
    for name, value in values.items():
        if isinstance(value, (int, float)) and not low <= value <= high:
            bounds = f"be at least {low:g}" if math.isinf(high) else f"lie in [{low:g}, {high:g}]"
            raise ValueError(f"{name} is {value}; it must {bounds}.")


def require_batch_values(
    *,
    rewards: Float[Array, " B"],
    response_mask: Bool[Array, "B T"],
    group_ids: Int[Array, " B"],
    minimum_group_size: int = 1,
) -> None:
    """Look at the values of one batch before it is used: finite rewards, no empty response, no group that is too small.

    Not for use under jit, where values are not known; call it once on the rollout.

    Raises:
        TypeError: if an argument is a tracer.
        ValueError: with the first row or group that breaks a rule.
    """
    for name, array in (("rewards", rewards), ("response_mask", response_mask), ("group_ids", group_ids)):
        if isinstance(array, Tracer):
            raise TypeError(f"{name} is a tracer; values can only be checked outside jit, vmap and grad.")
    finite = np.isfinite(np.asarray(rewards))
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"rewards[{row}] is {float(rewards[row])}; every reward must be finite.")
    lengths = np.asarray(response_mask).sum(axis=1)
    if (lengths == 0).any():
        raise ValueError(
            f"response_mask[{int(np.argmin(lengths))}] is empty; every sequence must have at least one response token."
        )
    ids, sizes = np.unique(np.asarray(group_ids), return_counts=True)
    if (sizes < minimum_group_size).any():
        smallest = int(np.argmin(sizes))
        raise ValueError(
            f"group_ids has a group (id {int(ids[smallest])}) of {int(sizes[smallest])} sequences; "
            f"this advantage compares at least {minimum_group_size}."
        )


Function = TypeVar("Function", bound=Callable[..., Any])


def checked(function: Function) -> Function:
    """Hold the arguments of a public function to its signature: rank, dtype and equal sizes of axes of one name.

    What is read are the jaxtyping annotations, so that the signature is written once. An argument whose annotation is
    not one array type (a number, a choice, an array of either of two ranks) is left to the function. Only shapes and
    dtypes are looked at: it costs nothing under jit, and a few microseconds outside.

    Raises (when the function is called):
        TypeError: for an argument that is no array, or has another dtype.
        ValueError: for an argument of another rank, or with an axis of another length than the same axis elsewhere.
    """
    signature = inspect.signature(function)
    arrays = {name: _array_annotation(parameter.annotation) for name, parameter in signature.parameters.items()}
    arrays = {name: annotation for name, annotation in arrays.items() if annotation is not None}

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        seen: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for name, annotation in arrays.items():
            if given.get(name) is not None:
                _require_annotation(name, given[name], annotation, given, seen)
        return function(*args, **kwargs)

    return inner  # pyright: ignore[reportReturnType]


def _array_annotation(annotation: Any) -> Any | None:
    arms = [arm for arm in typing.get_args(annotation) or (annotation,) if arm is not type(None)]
    return arms[0] if len(arms) == 1 and getattr(arms[0], "dim_str", "") else None


def _require_annotation(
    name: str, value: Any, annotation: Any, given: dict[str, Any], seen: dict[str, tuple[str, tuple[int, ...], str]]
) -> None:
    axes = annotation.dim_str.split()
    free = axes[0].startswith("*")
    if not hasattr(value, "ndim"):
        raise TypeError(f"{name} is {_describe(value)}; it must be an array with axes [{' '.join(axes)}].")
    if value.ndim < len(axes) - 1 if free else value.ndim != len(axes):
        number = f"at least {len(axes) - 1}" if free else len(axes)
        raise ValueError(f"{name} is {_describe(value)}; it must have {number} axes [{' '.join(axes)}].")
    require_dtype(_KINDS[annotation.__name__.partition("[")[0]], **{name: value})
    split = value.ndim - (len(axes) - 1) if free else 1
    sizes = [value.shape[:split], *((size,) for size in value.shape[split:])]
    for axis, size in zip(axes, sizes, strict=True):
        if axis == "_":
            continue
        other, length, others_axes = seen.setdefault(axis, (name, size, annotation.dim_str))
        if length != size:
            what = "shapes" if annotation.dim_str == others_axes else f"axes {axis.strip('*')}"
            raise ValueError(
                f"{name} is {_describe(value)} and {other} is {_describe(given[other])}; their {what} must be equal."
            )


_KINDS = {"Float": "floating", "Int": "integer", "Bool": "boolean"}
