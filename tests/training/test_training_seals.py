"""Checkpoints that are not as they were written: whatever was done to them is said, and the one before is taken."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_llm.training.run.checkpoints import Checkpoints
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.seals import SEAL
from jaxrl_llm.training.run.seals import what_is_broken
from jaxrl_llm.training.run.seals import write_seal
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.run.state import state_hash


def make_state(seed: int) -> TrainState:
    params = {"a": jax.random.normal(jax.random.key(seed), (3, 2)), "b": jnp.full(4, seed, jnp.bfloat16)}
    return TrainState.create(params, optax.sgd(0.1), seed)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder)
    for step in (2, 4):
        checkpoints.save(make_state(step), Progress(step=step, settings={}, frozen_hash="", file_bytes={}))
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "checkpoints"))


def flip(path: Path, where: float) -> None:
    """Flip one bit of a file, at this share of its length."""
    content = bytearray(path.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 4
    path.write_bytes(content)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first bit": lambda path: flip(path, 0),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": lambda path: path.unlink(),
    "a folder": as_folder,
    "a link": as_link,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_that_was_changed_is_noticed(two: Path, tmp_path: Path, damage: str) -> None:
    files = [path.relative_to(two) for path in sorted((two / "4").rglob("*")) if path.is_file()]
    assert len(files) > 5
    assert what_is_broken(two / "4") is None
    for number, name in enumerate(files):
        if (two / name).stat().st_size == 0 and "bit" in damage:
            continue
        copy = Path(shutil.copytree(two / "4", tmp_path / str(number) / "4"))
        DAMAGE[damage](copy.parent / name)
        reason = what_is_broken(copy)
        assert reason, name
        if name.name != SEAL:
            assert name.relative_to("4").as_posix() in reason or "elsewhere" in reason


def strange_folder(folder: Path) -> None:
    (folder / "999999").mkdir()


def strange_file(folder: Path) -> None:
    (folder / "7").write_text("not a checkpoint")


def foreign_file(folder: Path) -> None:
    (folder / "4" / "state" / "notes.txt").write_text("mine")


def another_step(folder: Path) -> None:
    (folder / "4").rename(folder / "9")


def no_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "4" / "state")


def sealed_rubbish(folder: Path) -> None:
    for path in (folder / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"{}")
    write_seal(folder / "4")


def arrays_of_one_flipped_bit(folder: Path) -> None:
    files = [path for path in (folder / "4" / "state").rglob("*") if path.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size), 0.7)


@pytest.mark.parametrize(
    ("change", "sound", "said"),
    [
        (strange_folder, 4, r"999999 is not used: seal.json is missing"),
        (strange_file, 4, r"7 is not used: it is no folder"),
        (foreign_file, 2, r"4 is not used: state/notes.txt does not belong to it"),
        (another_step, 2, r"9 is not used: it is that of step 4"),
        (no_arrays, 2, r"4 is not used: state/\S+ is missing"),
        (sealed_rubbish, 2, r"4 is not used: (what arrays it has|its arrays) cannot be read"),
        (arrays_of_one_flipped_bit, 2, r"4 is not used: state/\S+ is damaged: its SHA-256"),
    ],
)
def test_the_newest_sound_one_is_taken_and_the_others_are_set_aside(folder: Path, change, sound, said) -> None:
    change(folder)
    sentences: list[str] = []
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(make_state(0), say=sentences.append)
    assert restored is not None
    assert restored[1].step == sound
    assert state_hash(restored[0]) == state_hash(make_state(sound))
    (sentence,) = sentences
    assert re.search(said, sentence), sentence
    assert checkpoints.latest() == folder / str(sound)
    # Nothing was deleted, and the name is free again.
    assert len(list(folder.glob("*.set-aside"))) == 1
    taken = checkpoints.save(make_state(8), Progress(step=8, settings={}, frozen_hash="", file_bytes={}))
    assert what_is_broken(taken) is None


def test_a_checkpoint_of_the_same_policy_is_not_named_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.last_good(0) == "no checkpoint was saved yet"
    for step, updates in ((1, 4), (2, 8), (3, 8)):
        checkpoints.save(
            make_state(step), Progress(step=step, settings={}, frozen_hash="", file_bytes={}, updates=updates)
        )
    assert checkpoints.last_good(9) == f"the last good checkpoint is {tmp_path / '3'}"
    assert checkpoints.last_good(8).startswith(f"the last good checkpoint is {tmp_path / '1'} (newer ones hold")
    assert checkpoints.last_good(4) == "no checkpoint was saved before that policy"


def test_where_none_is_sound_nothing_is_moved(folder: Path) -> None:
    for step in ("2", "4"):
        (folder / step / SEAL).unlink()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(StorageError, match=r"None of the checkpoints .*4: seal\.json is missing.*2: seal\.json is m"):
        Checkpoints(folder).restore(make_state(0))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_a_killed_process_left_is_swept_away_and_names_of_others_stay(folder: Path) -> None:
    for name in (".unfinished-6", ".unfinished-6.orbax-checkpoint-tmp", ".dropped-2", "mine", "007"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("half")
    restored = Checkpoints(folder).restore(make_state(0))
    assert restored is not None
    assert restored[1].step == 4
    assert sorted(path.name for path in folder.iterdir()) == ["007", "2", "4", "mine"]
