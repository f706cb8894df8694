"""`python -m tests.mutants`: which mutants of objectives and bounds no test notices. README.md says more."""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.mutations import Mutant
from tests.mutants.mutations import mutants

ROOT = Path(__file__).parents[2]
ROOMS = ("objectives", "bounds")
ALSO = {
    "objectives.recipe_fields": ["tests/objectives/test_rules.py"],
    "objectives.distillation": ["tests/exact/test_objectives_losses.py"],
    "objectives.likelihood": ["tests/exact/test_objectives_losses.py"],
    "objectives.preferences": ["tests/exact/test_objectives_losses.py"],
    "objectives.policy_loss": ["tests/objectives/test_recipes.py"],
    "objectives.loss_metrics": ["tests/objectives/test_policy_loss.py"],
    "objectives.ratios": ["tests/objectives/test_ratios_and_corrections.py"],
    "objectives.corrections": ["tests/objectives/test_ratios_and_corrections.py"],
    "objectives.divergences": [
        "tests/objectives/test_ratios_and_corrections.py",
        "tests/exact/test_objectives_gradients.py",
    ],
    "objectives.divergence_augmented": ["tests/exact/test_objectives_methods.py"],
    "objectives.modulation": ["tests/exact/test_objectives_methods.py"],
    "objectives.pruning": ["tests/exact/test_objectives_methods.py"],
    "objectives.token_baseline": ["tests/exact/test_objectives_methods.py"],
    "bounds.inputs": ["tests/bounds/test_surrogate_error.py", "tests/exact/test_bounds_surrogate_error.py"],
    "bounds.sampled": ["tests/exact/test_bounds_surrogate_error.py", "tests/exact/test_bounds_coverage.py"],
    "bounds.masked_guarantee": ["tests/exact/test_bounds_coverage.py"],
}
"""Tests of a module besides those of its own name."""


def modules() -> list[str]:
    """`room.module` of every module that is broken."""
    found = [p for room in ROOMS for p in sorted((ROOT / "jaxrl_llm" / room).glob("*.py")) if p.stem != "__init__"]
    return [f"{path.parent.name}.{path.stem}" for path in found]


def files_of(module: str) -> tuple[list[str], list[str]]:
    """Test files that mirror a module: (those run in float32, those in float64)."""
    room, name = module.split(".")
    names = [f"tests/{room}/test_{name}.py", f"tests/exact/test_{room}_{name}.py", *ALSO.get(module, [])]
    names += [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / room).glob(f"test_{name}_*.py"))]
    found = [name for name in dict.fromkeys(names) if (ROOT / name).exists()]
    return [n for n in found if "/exact/" not in n], [n for n in found if "/exact/" in n]


def _copy(to: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and re.match(r"(jaxrl_llm|kernels|tests|theory_checks|docs|pyproject)", name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def survives(copy: Path, module: str, *, seconds: float) -> bool:
    """Whether the tests of a module pass in the copy; running out of time counts as noticed."""
    environment = dict(os.environ, PYTHONPATH=f"{copy}:{copy / 'kernels'}", JAX_PLATFORMS="cpu")
    for files, wide in zip(files_of(module), ("0", "1"), strict=True):
        if not files:
            continue
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=environment | {"JAX_ENABLE_X64": wide},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return False
        if done.returncode:
            return False
    return True


def chosen(pattern: str, seed: int, count: int) -> list[tuple[str, Mutant]]:
    """A sample of the mutants of the modules whose name matches `pattern`."""
    every = [
        (module, mutant)
        for module in modules()
        if re.search(pattern, module)
        for mutant in mutants((ROOT / "jaxrl_llm" / f"{module.replace('.', '/')}.py").read_text())
    ]
    return random.Random(seed).sample(every, min(count, len(every)))


def main() -> int:
    """Run the sample and print what survives; 1 if anything does."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--modules", default="", help="regular expression on names such as bounds.regret")
    parser.add_argument("--count", type=int, default=40, help="mutants to try")
    parser.add_argument("--seconds", type=float, default=1200.0, help="stop starting new ones after this long")
    parser.add_argument("--each", type=float, default=300.0, help="seconds after which the tests count as failed")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    given = parser.parse_args()
    sample, start, tried, alive = chosen(given.modules, given.seed, given.count), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        if not given.list:
            _copy(copy)
        for module, mutant in sample:
            what = f"{module.replace('.', '/')}.py:{mutant.line}: {mutant.before}  ->  {mutant.after}"
            if given.list:
                print(what)
                continue
            if time.monotonic() - start > given.seconds:
                break
            path = copy / "jaxrl_llm" / f"{module.replace('.', '/')}.py"
            original = path.read_text()
            path.write_text(mutant.source)
            lives = survives(copy, module, seconds=given.each)
            path.write_text(original)
            tried, alive = tried + 1, alive + lives
            print("SURVIVES" if lives else "noticed ", what, flush=True)
    print(f"{tried} tried of {len(sample)}, {alive} survive")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
