"""Settings of every test process: shape checks at run time, strict promotion in the mathematics, no silent skips."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# A kernel of six GPU threads needs as many threads of XLA to be interpreted; with one per core it waits for ever.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

# The hook must be in place before the modules it checks are imported.
install_import_hook(
    [
        "jaxrl_kernels",
        "jaxrl_llm.objectives",
        "jaxrl_llm.bounds",
        "jaxrl_llm.exploration",
        "jaxrl_llm.masked",
        "jaxrl_llm.tabular",
        "jaxrl_llm.categorical",
    ],
    "beartype.beartype",
)

TESTS = Path(__file__).parent
STRICT = ("kernels", "objectives", "bounds", "exploration", "exact", "test_masked.py", "test_categorical.py")
"""Tests of floors 0 to 2, where an implicit promotion of dtype or rank is an error."""

AS_USERS_DO = (
    "test_token_statistics_values.py",
    "test_dense_gradient.py",
    "test_parity.py",
    "test_pretrained.py",
    "test_transformer.py",
    "test_rollouts_engines.py",
    "test_rollouts_perturb.py",
)
"""Tests of last digits and of large models: compiled with every optimisation."""

SLOW = frozenset((TESTS / "slow.txt").read_text().splitlines())
"""Tests of more than six seconds that `make test` leaves to `make test-slow`; README.md here says which stay."""

CANNOT_RUN_HERE = "needs a newer jax"
"""How the reason of an allowed skip starts."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "requires_jax(version): skip below this jax version (Python 3.11 ends at 0.10.2)"
    )
    config.addinivalue_line("markers", "aot: compiles for hardware that is not here; run by `make aot`")
    # Whoever started the tests in the background had these ignored, and the runs that they stop would inherit that.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        with contextlib.suppress(ValueError):  # not the main thread
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, handler)
    config.addinivalue_line("markers", "slow: more than six seconds; named in tests/slow.txt, run by `make test-slow`")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest file first: another process takes the others meanwhile.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
        marker = item.get_closest_marker("requires_jax")
        if marker and _version(jax.__version__) < _version(marker.args[0]):
            item.add_marker(pytest.mark.skip(reason=f"{CANNOT_RUN_HERE}: {marker.args[0]}, this is {jax.__version__}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Most programs compile without LLVM's optimisation, in about three quarters of the time; XLA's passes stay."""
    quick = item.path.name not in AS_USERS_DO
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1" if quick else "0"  # for processes that the test starts
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        # What is compiled otherwise must not be found again: a run is to be the same in this process and in another.
        jax.clear_caches()
    return (yield)


def _first_part(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit change of dtype or rank in the floors that hold the mathematics."""
    if _first_part(request.node.path) not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if CANNOT_RUN_HERE not in reason:
            _skipped.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and os.environ.get("JAXRL_FAIL_ON_SKIP"):
        print("\nskipped, although this Python could run them:\n  " + "\n  ".join(_skipped))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
