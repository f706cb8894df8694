"""One small change to a module at a time: what a careless edit would do to a formula."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
TURNED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr}
ARITHMETIC[ast.BitOr] = ast.BitAnd
NAMES = {
    "minimum": "maximum",
    "masked_min": "masked_max",
    "segment_min": "segment_max",
    "expm1": "exp",
    "log1p": "log",
    "sqrt": "square",
    "any": "all",
    "cumsum": "cumprod",
    "sum": "max",
}
NAMES |= {
    "maximum": "minimum",
    "masked_max": "masked_min",
    "segment_max": "segment_min",
    "square": "sqrt",
    "all": "any",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one place.

    Attributes:
        line: of the place, from 1.
        before, after: the expression.
        source: the whole module with the change.
    """

    line: int
    before: str
    after: str
    source: str


def _changes(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions to put in the place of `node`."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for table in (COMPARE, TURNED):
            other = table.get(type(node.ops[0]))
            if other is not None:
                yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        if name in NAMES:
            function = (
                ast.Attribute(node.func.value, NAMES[name])
                if isinstance(node.func, ast.Attribute)
                else ast.Name(NAMES[name])
            )
            yield ast.Call(function, node.args, node.keywords)
        if name == "where" and len(node.args) == 3:
            yield ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)
        if name in ("minimum", "maximum") and len(node.args) == 2:
            yield from node.args
        if name == "negative":
            yield node.args[0]
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield ast.Constant(node.value + 1)
        if node.value not in (0, 1):
            yield ast.Constant(node.value / 2)


def _expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """Expressions of function bodies: no annotations, defaults, docstrings and messages."""

    def visit(node: ast.AST) -> Iterator[ast.expr]:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("require_"):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from visit(node.value)
            return
        if isinstance(node, ast.expr):
            yield node
        children = node.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ast.iter_child_nodes(node)
        for child in children:
            yield from visit(child)

    for top in tree.body:
        if isinstance(top, (ast.FunctionDef, ast.ClassDef)):
            yield from visit(top)


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module that differs from it."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    raw, found = source.encode(), []
    for node in _expressions(ast.parse(source)):
        if node.end_lineno is None or node.end_col_offset is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        for change in _changes(node):
            before, after = ast.unparse(node), ast.unparse(change)
            if before != after:
                whole = raw[:begin] + f"({after})".encode() + raw[end:]
                found.append(Mutant(node.lineno, before, after, whole.decode()))
    return found
