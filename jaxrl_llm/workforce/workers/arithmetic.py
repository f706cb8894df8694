"""Arithmetic read from its syntax tree: numbers, lists, + - * / // %, sum, max, min, len, abs, numbers(text)."""

import ast
import math
import operator
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.workforce.workers.files import NUMBER

LONGEST = 2_000
"""Characters of an expression."""
LARGEST = 10**30
"""Size above which a number is refused, so that none grows without end."""
Value = int | float | str | list

_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def numbers(text: Value) -> list:
    """The numbers in a text, as the sandbox reads them."""
    if not isinstance(text, str):
        raise ValueError(f"numbers takes a text; it was given a {type(text).__name__}")
    found = NUMBER.findall(text)
    return [int(number) if number.lstrip("-").isdigit() else float(number) for number in found]


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": sum, "max": max, "min": min, "len": len, "abs": abs, "int": int, "float": float, "numbers": numbers
}  # fmt: skip


def evaluate(text: str, names: Mapping[str, str]) -> Value:
    """The value of an expression.

    Args:
        text: the expression.
        names: texts that it may name.

    Raises:
        ValueError: it is none, is too long or too deep, or does something else than arithmetic.
        ArithmeticError: division by zero, or a number beyond `LARGEST`.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters; at most {LONGEST} are read")
    try:
        return _value(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error
    except TypeError as error:
        raise ValueError(str(error)) from error


def _value(node: ast.AST, names: Mapping[str, str]) -> Value:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return _bounded(value)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, names) for part in parts]
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -_number(_value(part, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_number(_value(left, names)), _number(_value(right, names))))
        case ast.Call(func=ast.Name(id=name), args=[part], keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](_value(part, names)))
    raise ValueError(f"{ast.unparse(node)[:60]!r} is no arithmetic on numbers, lists and results")


def _number(value: Value) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a {type(value).__name__} is no number; numbers(#1) reads those in a result")
    return value


def _bounded(value: Value) -> Value:
    if isinstance(value, int | float) and (not math.isfinite(value) or abs(value) > LARGEST):
        raise OverflowError(f"a number is beyond {LARGEST:.0e}")
    return value
