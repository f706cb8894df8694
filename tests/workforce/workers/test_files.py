"""Files of one folder, and nothing beyond it."""

import os
from pathlib import Path

import pytest

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import FilesWorker
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce.workers.files import LARGEST_FILE
from tests.workforce.team import First
from tests.workforce.team import Texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files, and beside it a secret to which links lead."""
    (tmp_path / "secret.txt").write_text("secret 42")
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "a.txt").write_text("On 3 days, -2.5 degrees; room B12 is 7.")
    (inside / "sub" / "Zoë x.txt").write_text("none")
    (inside / "link.txt").symlink_to("../secret.txt")
    (inside / "link").symlink_to("..")
    (inside / "safe").symlink_to("a.txt")
    (inside / "bytes").write_bytes(b"\xff\xfe")
    os.mkfifo(inside / "pipe")
    return inside


def do(folder: Path, text: str, **results: str) -> Answer:
    given = {int(name[1:]): value for name, value in results.items()}
    return FilesWorker(folder).work(Assignment("", text, given))


def test_files_are_listed_read_and_searched_for_numbers(folder: Path) -> None:
    assert do(folder, "list") == Answer("a.txt, bytes, link, link.txt, pipe, safe, sub")
    assert do(folder, "list sub") == Answer("Zoë x.txt")
    assert do(folder, "read ./sub//Zoë x.txt") == Answer("none")
    assert do(folder, "numbers in a.txt") == Answer("3, -2.5, 7")
    assert do(folder, "read #1.txt", r1="a").text.startswith("On 3 days")
    # A result with another's name in it stays as it is.
    assert "#2.txt cannot be used" in do(folder, "read #1.txt", r1="#2", r2="a").text
    assert do(folder, "numbers in sub/Zoë x.txt") == Answer("sub/Zoë x.txt has no numbers", failed=True)


def test_numbers_are_read_as_far_as_they_go(folder: Path) -> None:
    (folder / "n.txt").write_text("1e-05, .5, -.25 and 2.5E3. Not 1.5x, 3e, 1.2.x, v2 or 4x.")
    assert do(folder, "numbers in n.txt") == Answer("1e-05, .5, -.25, 2.5E3, 1.2")


def test_a_name_that_is_no_text_is_listed(folder: Path) -> None:
    """As Python reads it: with halves of surrogate pairs, which the room replaces."""
    (folder / "odd").mkdir()
    with open(os.fsencode(folder / "odd") + b"/\xff.txt", "w"):
        pass
    room = Workforce(Texts("1. list odd"), First(), [FilesWorker(folder)])
    assert room.run(["what is there?"])[0].answer == "?.txt"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../secret.txt", "outside the folder"),
        ("sub/../../secret.txt", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        ("a.txt\0", "outside the folder"),
        ("link.txt", "goes through a link"),
        ("link/secret.txt", "goes through a link"),
        ("safe", "goes through a link"),
        ("pipe", "it is no file"),
        ("sub", "it is no file"),
        ("bytes", "no text in UTF-8"),
        ("missing", "No such file"),
        ("a.txt/b", "Not a directory"),
        ("x" * 5000, "File name too long"),
        (".", "it is a folder"),
    ],
)
def test_what_is_outside_or_no_file_is_refused(folder: Path, path: str, why: str) -> None:
    for command in ("read", "numbers in"):
        answer = do(folder, f"{command} {path}")
        assert answer.failed
        assert why in answer.text
        assert "42" not in answer.text


def test_folders_are_confined_as_well(folder: Path) -> None:
    for path in ("..", "link", "/"):
        answer = do(folder, f"list {path}")
        assert answer.failed
        assert "secret" not in answer.text


def test_a_file_that_is_too_large_is_refused(folder: Path) -> None:
    (folder / "large").write_text("1" * (LARGEST_FILE + 1))
    assert f"more than {LARGEST_FILE} bytes" in do(folder, "read large").text


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    for path in ("a.txt", "link.txt", "pipe", "sub/missing", "bytes"):
        do(folder, f"read {path}")
    do(folder, "list sub")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("text", ["remove a.txt", "read", "numbers in", "", "cat a.txt"])
def test_other_commands_are_refused(folder: Path, text: str) -> None:
    assert "is no command" in do(folder, text).text


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is no folder"):
        FilesWorker(tmp_path / "missing")
