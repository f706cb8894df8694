"""The wheel holds both packages and nothing else, and works from another directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build folder beside its source.
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "setup.py", "pyproject.toml", "README.md", "LICENSE", "jaxrl_llm", "kernels"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, timeout=200)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_two_packages_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert top == {"jaxrl_llm", "jaxrl_kernels"}
    assert "jaxrl_llm/py.typed" in names
    assert "jaxrl_kernels/py.typed" in names
    assert "jaxrl_llm/objectives/recipes.py" in names
    assert "jaxrl_llm/environments/worlds/shop/catalogue.json" in names


def test_the_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    program = (
        "import jax, jax.numpy as jnp, jaxrl_kernels, jaxrl_llm.bounds, jaxrl_llm.training\n"
        "from jaxrl_llm import objectives\n"
        "stats = jaxrl_kernels.token_statistics(jnp.zeros((3, 4)), jnp.zeros((4, 8)), jnp.zeros(3, int))\n"
        "assert jnp.allclose(stats.entropy, jnp.log(8.0)), stats\n"
        f"assert jaxrl_kernels.__file__.startswith({str(target)!r}), jaxrl_kernels.__file__\n"
        "print(objectives.get_recipe('grpo').name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "grpo"
