"""The mutants of `make mutants`: each is a program, each differs in one place, and messages are left alone."""

import ast

from tests.mutants.__main__ import files_of
from tests.mutants.__main__ import modules
from tests.mutants.mutations import mutants

SOURCE = '''
"""A docstring with 1 number and a < sign."""
LIMIT = 3.0

def f(x, limit=2):
    """Not 4."""
    if not x < limit:
        raise ValueError(f"x is {x + 1}")
    return jnp.where(x > 0, -jnp.minimum(x, 5), x)
'''


def test_every_kind_of_change_is_made_in_formulas_only():
    changes = {(mutant.before, mutant.after) for mutant in mutants(SOURCE)}
    assert changes == {
        ("not x < limit", "x < limit"),
        ("x < limit", "x <= limit"),
        ("x < limit", "x > limit"),
        ("jnp.where(x > 0, -jnp.minimum(x, 5), x)", "jnp.where(x > 0, x, -jnp.minimum(x, 5))"),
        ("x > 0", "x >= 0"),
        ("x > 0", "x < 0"),
        ("0", "1"),
        ("-jnp.minimum(x, 5)", "jnp.minimum(x, 5)"),
        ("jnp.minimum(x, 5)", "jnp.maximum(x, 5)"),
        ("jnp.minimum(x, 5)", "x"),
        ("jnp.minimum(x, 5)", "5"),
        ("5", "6"),
        ("5", "2.5"),
    }
    for mutant in mutants(SOURCE):
        assert ast.unparse(ast.parse(mutant.source)) != ast.unparse(ast.parse(SOURCE))


def test_every_module_has_tests_to_run():
    assert len(modules()) > 20
    for module in modules():
        assert any(files_of(module)), module
