"""Command lines that nobody meant: each is refused with a sentence or checked and accepted, soon, without a traceback.

`make fuzz` tries many more of them (FUZZ_EXAMPLES).
"""

import dataclasses
import os
import time
import typing
from typing import Any
from typing import Literal

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments.arguments import start_arguments
from experiments.cli import main
from experiments.fields import leaves
from experiments.ranges import Range
from experiments.ranges import RangeError
from experiments.ranges import check_ranges
from experiments.registry import NAMES
from experiments.registry import get_experiment

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
SECONDS = 5.0
OWN = ("settings", "tiny", "runs_folder", "dry_run", "wandb")
"""Arguments that the test itself gives, or that only a run reads."""

INTEGERS = st.sampled_from([-(10**400), -(2**31) - 1, -1, 0, 1, 2, 3, 24, 2**31, 2**32, 2**63, 2**64, 10**400])
FLOATS = st.sampled_from(["nan", "inf", "-inf", "1e400", "-1", "-0.0", "0", "1e-320", "0.5", "1", "2", "1e29", "1e308"])
WORDS = (
    *("", "none", "None", "$x_1$", "[red]", "a" * 300, "../up", "a/b", ".hidden", "os:path", "os:", ":", "a:b:c"),
    *("data=2,tensor=1", "data=0", "data=1,data=1", "\ud800", "\x00", "tab\t", "group_normalised", "top_k"),
)
TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=8),
)


def _kind(settings: Any, path: tuple[str, ...]) -> Any:
    """The annotation of a field."""
    for name in path[:-1]:
        settings = getattr(settings, name)
    return typing.get_type_hints(type(settings))[path[-1]]


def _values(kind: Any) -> st.SearchStrategy[list[str]]:
    """Words for a field of that kind, most of them wrong."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in members:
        return st.one_of(_values(members[0]), st.just(["None"]))
    if origin is Literal:
        return st.sampled_from([[str(member)] for member in members])
    if origin is tuple:
        return st.lists(_values(members[0]), max_size=3).map(lambda parts: [word for part in parts for word in part])
    pools: dict[Any, st.SearchStrategy[Any]] = {int: INTEGERS, float: FLOATS, str: TEXTS}
    return pools.get(kind, TEXTS).map(lambda value: [str(value)])


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """`run NAME` with one to four fields."""
    name = draw(st.sampled_from(NAMES))
    experiment = get_experiment(name)
    start = start_arguments(experiment, experiment.tiny)
    fields = [leaf for leaf in leaves(start) if leaf.path[0] not in OWN or leaf.path[0] == "settings"]
    words = ["run", name, "--tiny", "--dry-run"]
    for leaf in draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4, unique_by=lambda leaf: leaf.name)):
        kind = _kind(start, leaf.path)
        if kind is bool:
            words.append(f"--no-{leaf.shown}" if leaf.value else f"--{leaf.shown}")
        elif leaf.name == "ratings":
            continue  # the other ratings are downloaded
        else:
            words += [f"--{leaf.shown}", *draw(_values(kind))]
    return words


@hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(words=command_lines())
def test_every_command_line_ends_soon_with_a_sentence(tmp_path_factory, capfd, words) -> None:
    runs = tmp_path_factory.getbasetemp() / "fuzzed"
    start = time.process_time()
    try:
        status = main([*words, "--runs-folder", str(runs)])
    except SystemExit as stopped:  # tyro's own sentence, in a box
        status = stopped.code
    spent = time.process_time() - start
    output = capfd.readouterr()
    assert status in (0, 2), words
    assert spent < SECONDS, words
    assert "Traceback" not in output.out + output.err
    if status == 0:
        assert "can be used" in output.out
    else:
        # One sentence: ours begins with "error:" once, tyro's stands in a box.
        assert output.err.count("error: ") + output.err.count("For full helptext") == 1, output.err
    assert not runs.exists()


@pytest.mark.parametrize("name", NAMES)
def test_ranges_are_of_fields_and_hold_the_settings_of_the_claim(name) -> None:
    experiment = get_experiment(name)
    numbers = {
        leaf.name: leaf
        for leaf in leaves(experiment.settings)
        if any(kind in str(_kind(experiment.settings, leaf.path)) for kind in ("int", "float"))
    }
    assert set(experiment.ranges) <= set(numbers), "a range of no field"
    for settings in (experiment.settings, experiment.tiny):
        check_ranges(settings, experiment.ranges)


def test_a_range_leaves_out_its_open_ends_and_nan() -> None:
    closed, opened = Range(0, 1), Range(0, 1, above=True, below=True)
    assert [value in closed for value in (-0.1, 0, 1, 1.1, float("nan"))] == [False, True, True, False, False]
    assert [value in opened for value in (0, 0.5, 1)] == [False, True, False]
    assert str(closed) == "at least 0 and at most 1"
    assert str(opened) == "above 0 and below 1"

    @dataclasses.dataclass(frozen=True)
    class Numbers:
        some: tuple[float, ...] = (0.5, 2.0)
        other: float = float("inf")

    with pytest.raises(RangeError, match=r"Field --some is 2.0; it must be at least 0 and at most 1\."):
        check_ranges(Numbers(), {"some": closed})
    with pytest.raises(RangeError, match="Field --other is inf"):
        check_ranges(Numbers(some=()), {})


@pytest.mark.parametrize("word", [word for word in WORDS if word not in ("none", "None")])
@pytest.mark.parametrize("command", [["report"], ["compare", "first"], ["list"], ["run"], ["run", "psrl", "--resume"]])
def test_a_word_that_names_nothing_is_refused_by_every_command(tmp_path, capsys, command, word) -> None:
    try:
        status = main([*command, word, "--runs-folder", str(tmp_path)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", "1e-300"), ("beta1", "0.99999999"), ("beta2", "0.9999999999")]
)
def test_numbers_that_float32_rounds_to_an_end_are_refused(tmp_path, capsys, field, value):
    words = ["run", "from_scratch", "--tiny", "--dry-run", "--runs-folder", str(tmp_path), f"--{field}", value]
    assert main(words) == 2
    assert f"error: Field --{field} is " in capsys.readouterr().err
