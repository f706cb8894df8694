"""Folders of trajectories: bit for bit there and back, legible without us, and never half read."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.trajectory import single_step
from jaxrl_llm.trajectory_files import TrajectoryFileError
from jaxrl_llm.trajectory_files import read_episodes
from jaxrl_llm.trajectory_files import read_trajectories
from jaxrl_llm.trajectory_files import write_trajectories
from jaxrl_llm.trajectory_texts import stretches
from jaxrl_llm.trajectory_texts import text_stretches

FILES = {"arrays.safetensors", "episodes.jsonl", "about.json"}


def batch(rows: int = 3, width: int = 8, seed: int = 0, **changes) -> Trajectories:
    """Left-padded rows with a gap between two stretches of actions; rewards and log-probs of every bit pattern."""
    rng = np.random.default_rng(seed)
    real = np.arange(width) >= rng.integers(0, width - 3, (rows, 1))
    first = np.argmax(real, axis=1)[:, None]
    chosen = (np.arange(width) > first) & (rng.random((rows, width)) < 0.6)
    steps = np.where(chosen, np.cumsum(chosen, axis=1) // 2, -1).astype(np.int32)
    made = Trajectories(
        tokens=rng.integers(0, 250, (rows, width)).astype(np.int32),
        token_mask=real,
        action_mask=chosen,
        group_ids=rng.integers(0, 9, rows),
        rewards=np.where(chosen, rng.normal(size=chosen.shape), 0).astype(np.float32),
        log_prob_behaviour=np.where(chosen, -rng.exponential(size=chosen.shape), 0).astype(np.float32),
        step_ids=steps,
        actor_ids=np.where(chosen, 0, -1).astype(np.int32),
        versions=np.where(chosen, rng.integers(0, 5, chosen.shape), -1).astype(np.int32),
        ended=rng.random(rows) < 0.5,
    )
    return dataclasses.replace(made, **changes)


def same_bits(left: Trajectories, right: Trajectories) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for name, mine in vars(left).items():
        theirs = vars(right)[name]
        if mine is None:
            assert theirs is None
            continue
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        assert mine.dtype == theirs.dtype, name
        assert mine.shape == theirs.shape, name
        assert mine.tobytes() == theirs.tobytes(), name


def test_there_and_back(tmp_path: Path) -> None:
    written = batch()
    about = {"step": 12, "vocab_size": 259, "task": "sums", "loss": float("nan")}
    folder = write_trajectories(tmp_path / "a" / "12", written, about=about)
    read, rows = read_trajectories(folder)
    same_bits(written, read)
    assert {path.name for path in folder.iterdir()} == FILES
    assert not [path for path in folder.parent.iterdir() if path != folder]
    for row, line in enumerate(rows):
        chosen = written.action_mask[row]
        assert line["row"] == row
        assert line["group"] == written.group_ids[row]
        assert line["ended"] == written.ended[row]
        assert line["return"] == pytest.approx(float(written.rewards[row].sum()), rel=1e-6)
        assert line["steps"] == len(set(written.step_ids[row][chosen].tolist()))
        assert "text" not in line
    assert read_episodes(folder).about == {**about, "loss": None}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 4), width=st.integers(4, 9), known=st.booleans(),
    routed=st.booleans(), floats=st.sampled_from(["f2", "f4", "f8", "bf"]),
    ints=st.sampled_from(["i2", "i4", "i8", ">i4"]),
)  # fmt: skip
def test_there_and_back_for_every_kind(tmp_path_factory, seed, rows, width, floats, ints, known, routed) -> None:
    dtype = np.dtype(jnp.bfloat16) if floats == "bf" else np.dtype(floats)
    made = batch(rows, width, seed)
    rewards = made.rewards.astype(dtype)
    if made.action_mask.any():  # rewards that are no numbers keep their bits too
        rewards[np.nonzero(made.action_mask)[0][0], np.nonzero(made.action_mask)[1][0]] = np.nan
    integers = np.dtype(ints)
    made = dataclasses.replace(
        made, rewards=rewards, tokens=made.tokens.astype(integers), step_ids=made.step_ids.astype(integers),
        log_prob_behaviour=made.log_prob_behaviour.astype(dtype) if known else None,
        routes=np.zeros((rows, width, 2, 3), np.uint16) + 3 if routed else None,
    )  # fmt: skip
    read, _ = read_trajectories(write_trajectories(tmp_path_factory.mktemp("any") / "x", made))
    native = jax.tree.map(lambda column: column.astype(column.dtype.newbyteorder("=")), made)
    same_bits(native, read)


def test_arrays_of_jax_are_written_too(tmp_path: Path) -> None:
    made = jax.tree.map(jnp.asarray, batch())
    same_bits(made, read_trajectories(write_trajectories(tmp_path / "x", made))[0])


def test_other_tools_read_it(tmp_path: Path) -> None:
    made = batch()
    folder = write_trajectories(tmp_path / "x", made, extra={"kl": np.ones((3, 8), np.float32)})
    arrays = safetensors.numpy.load_file(folder / "arrays.safetensors")
    np.testing.assert_array_equal(arrays["tokens"], made.tokens)
    np.testing.assert_array_equal(arrays["extra/kl"], np.ones((3, 8)))
    assert "routes" not in arrays
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").open(encoding="utf-8")]
    assert len(rows) == 3
    about = json.loads((folder / "about.json").read_text())
    assert (
        about["files"]["arrays.safetensors"]["sha256"]
        == hashlib.sha256((folder / "arrays.safetensors").read_bytes()).hexdigest()
    )


def test_rewards_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    made = single_step(
        np.zeros((2, 3), int), np.ones((2, 3), bool), mask, group_ids=np.zeros(2, int), outcomes=np.array([np.nan, 2]),
        ended=np.ones(2, bool),
    )  # fmt: skip
    folder = write_trajectories(tmp_path / "x", made, records=[{"score": np.float32("inf")}, {"score": np.int64(3)}])
    read, rows = read_trajectories(folder)
    same_bits(made, read)
    assert [line["return"] for line in rows] == [None, 2.0]
    assert [line["record"] for line in rows] == [{"score": None}, {"score": 3}]
    assert "NaN" not in (folder / "episodes.jsonl").read_text()


HOSTILE = [
    "</td><script>",
    "line\nbreaks\r\u2028\u0085 and \0",
    "\ud800 half a letter",
    '{"role": "chosen"}',
    "é 漢 🙂",
    "",
]


def test_texts_come_back_whatever_is_in_them(tmp_path: Path) -> None:
    made = batch(rows=len(HOSTILE))
    rows = read_trajectories(write_trajectories(tmp_path / "x", made, texts=HOSTILE))[1]
    assert [line["text"] for line in rows] == [[{"role": "chosen", "text": text}] for text in HOSTILE]


def test_stretches_and_pieces_cover_every_token(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    ids = (
        tokenizer.encode("ask é")
        + tokenizer.encode("say 漢")
        + [tokenizer.eos_id]
        + tokenizer.encode("hm")
        + [65, 0xC3]
    )
    given, said = len("ask é".encode()), len("say 漢".encode()) + 1
    tokens = np.array([[256, 256, *ids]])
    chosen = np.zeros(tokens.shape, bool)
    chosen[0, 2 + given : 2 + given + said] = True
    chosen[0, -2:] = True
    made = single_step(
        tokens, tokens != 256, chosen, group_ids=np.zeros(1, int), outcomes=np.ones(1), ended=np.zeros(1, bool)
    )
    assert [(part.start, part.stop, part.chosen) for part in stretches(made, 0)] == [
        (2, 8, False), (8, 16, True), (16, 18, False), (18, 20, True),
    ]  # fmt: skip
    texts = text_stretches(made, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    assert [(part["role"], part["text"]) for part in texts[0]] == [
        ("given", "ask é"), ("chosen", "say 漢<|eos|>"), ("given", "hm"), ("chosen", "A\ufffd"),
    ]  # fmt: skip
    assert texts[0][1]["pieces"] == ["s", "a", "y", " ", "", "", "漢", "<|eos|>"]
    for part in texts[0]:
        assert "".join(part["pieces"]) == part["text"]
    assert read_trajectories(write_trajectories(tmp_path / "x", made, texts=texts))[1][0]["text"] == texts[0]
    texts[0][0]["pieces"].pop()
    with pytest.raises(ValueError, match=r"texts\[0\] has stretches of .* pieces; its tokens stand in stretches of"):
        write_trajectories(tmp_path / "y", made, texts=texts)


def test_a_row_without_real_tokens_has_no_stretches() -> None:
    none = np.zeros((1, 3), bool)
    made = single_step(none.astype(int), none, none, group_ids=np.zeros(1, int), outcomes=np.zeros(1), ended=none[:, 0])
    assert stretches(made, 0) == []


def test_extra_columns_keep_their_names_and_bits(tmp_path: Path) -> None:
    made = batch()
    extra = {"advantages": np.full((3, 8), -0.5, np.float32), "kl": np.full((3, 9), np.nan, np.float64)}
    read = read_episodes(write_trajectories(tmp_path / "x", made, extra=extra)).extra
    assert set(read) == set(extra)
    for name, column in extra.items():
        assert read[name].dtype == column.dtype
        assert read[name].tobytes() == column.tobytes()


REFUSED = {
    "rule": ({"trajectories": batch(token_mask=np.zeros((3, 8), bool))}, ValueError, "no real token"),
    "vocabulary": ({"about": {"vocab_size": 3}}, ValueError, "has a token outside 0 .. 2"),
    "texts": ({"texts": ["one"]}, ValueError, "texts has 1 entries; it must have one for each of 3 rows"),
    "records": ({"records": [{}] * 4}, ValueError, "records has 4 entries"),
    "role": ({"texts": [[{"role": "user", "text": ""}]] * 3}, ValueError, r"texts\[0\] has the stretch"),
    "no JSON": ({"records": [{"a": object()}] * 3}, TypeError, "a object cannot be written as JSON"),
    "extra rows": (
        {"extra": {"kl": np.zeros((2, 8))}},
        ValueError,
        r"extra\['kl'\] has shape \(2, 8\); it must have 3",
    ),
    "extra width": ({"extra": {"kl": np.zeros((3, 1))}}, ValueError, r"a column for each of up to \d chosen tokens"),
    "extra kind": ({"extra": {"kl": np.zeros((3, 8), int)}}, TypeError, "is of int64; it must be of kind floating"),
    "dtype": ({"trajectories": batch(rewards=np.zeros((3, 8), np.longdouble))}, TypeError, "a file can hold BOOL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    arguments, kind, sentence = REFUSED[name]
    arguments = {"trajectories": batch(), **arguments}
    with pytest.raises(kind, match=sentence):
        write_trajectories(tmp_path / "x", arguments.pop("trajectories"), **arguments)
    assert not list(tmp_path.iterdir())


def test_trajectories_are_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "x", batch(seed=1))
    write_trajectories(tmp_path / "x", batch(seed=2))
    same_bits(read_trajectories(tmp_path / "x")[0], batch(seed=2))
    (tmp_path / "empty").mkdir()
    write_trajectories(tmp_path / "empty", batch())
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("x", "file"):
        with pytest.raises(TrajectoryFileError, match=f"{name} is there and holds no trajectories; choose another"):
            write_trajectories(tmp_path / name, batch())
    assert (tmp_path / "x" / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "empty", "file"}


def test_drafts_of_killed_writers_go_once_they_are_old(tmp_path: Path) -> None:
    drafts = [tmp_path / f".x.{number}.{kind}" for number in (1, 2) for kind in ("draft", "old")]
    for draft in drafts:
        draft.mkdir()
    for draft in drafts[:2]:
        os.utime(draft, (0, 0))
    write_trajectories(tmp_path / "x", batch())
    assert [draft.exists() for draft in drafts] == [False, False, True, True]


def test_a_disk_that_refuses_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_trajectories(tmp_path / "x", batch(seed=1))
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "about.json":
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrajectoryFileError, match="x cannot be written: No space left on device"):
        write_trajectories(folder, batch(seed=2))
    same_bits(read_trajectories(folder)[0], batch(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_trajectories(
        tmp_path_factory.mktemp("whole") / "x", batch(), about={"vocab_size": 259}, texts=["a"] * 3
    )


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "x"))


def sentence(folder: Path, **arguments) -> str:
    with pytest.raises(TrajectoryFileError) as caught:
        read_episodes(folder, **arguments)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in sentence(folder)
    assert "about.json is missing" in sentence(folder / "nowhere")


@pytest.mark.parametrize("name", ["arrays.safetensors", "episodes.jsonl"])
def test_half_a_file_and_one_wrong_bit_are_seen(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:cut])
        assert f"{name} has {cut} bytes; about.json says {len(content)}" in sentence(folder)
    for place in np.random.default_rng(0).integers(0, len(content), 20):
        flipped = bytearray(content)
        flipped[place] ^= 1
        (folder / name).write_bytes(flipped)
        assert f"{name} is damaged" in sentence(folder)


def test_an_about_that_is_cut_or_foreign(folder: Path) -> None:
    content = (folder / "about.json").read_bytes()
    for cut in range(0, len(content) - 2, 7):
        (folder / "about.json").write_bytes(content[:cut])
        assert "about.json is not JSON" in sentence(folder)
    stated = json.loads(content)
    for change, said in [
        ({"format": "something else"}, "is not about trajectories"),
        ({"version": 2}, "is of version 2; this reads version 1"),
        ({"files": {}}, "lacks the sizes"),
        ({"files": {"arrays.safetensors": 3, "episodes.jsonl": []}}, "lacks the sizes"),
        ({"about": {"vocab_size": "many"}}, "lacks the sizes"),
        ({"about": None}, "lacks the sizes"),
    ]:
        (folder / "about.json").write_text(json.dumps(stated | change))
        assert said in sentence(folder)
    for other in ("[]", "3", '"jaxrl_llm trajectories"', "[" * 100_000):
        (folder / "about.json").write_text(other)
        assert "about.json" in sentence(folder)
    (folder / "about.json").write_bytes(b" " * (2**20 + 1))
    assert "about.json has 1048577 bytes; the most that is read is 1048576" in sentence(folder)


def sign(folder: Path, name: str, content: bytes) -> None:
    """Put `content` in a file, and its size and sum in about.json, as one who means it would."""
    (folder / name).write_bytes(content)
    stated = json.loads((folder / "about.json").read_text())
    stated["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "about.json").write_text(json.dumps(stated))


def test_well_signed_nonsense_is_refused(folder: Path) -> None:
    good = safetensors.numpy.load_file(folder / "arrays.safetensors")
    for arrays, said in [
        ({name: value for name, value in good.items() if name != "tokens"}, "has the columns"),
        (good | {"another": np.zeros(3)}, "has the columns"),
        (good | {"tokens": good["tokens"] + 300}, "holds no trajectories: row 0 has a token outside 0 .. 258"),
        (good | {"rewards": good["rewards"].astype(int)}, "rewards is of int64"),
        (good | {"ended": np.ones(4, bool)}, "ended has shape (4,)"),
        (good | {"extra/kl": np.zeros((1, 1))}, "extra['kl'] has shape (1, 1)"),
        (good | {"rewards": np.zeros((3, 8), np.complex64)}, "has columns of other dtypes: {'rewards': 'C64'}"),
    ]:
        sign(folder, "arrays.safetensors", safetensors.numpy.save(arrays))
        assert said in sentence(folder)
    for content in (b"", b"PK\x03\x04", (2**62).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"):
        sign(folder, "arrays.safetensors", content)
        assert "is no safetensors file" in sentence(folder)


def test_lines_that_do_not_fit_are_named(folder: Path) -> None:
    lines = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    for content, said in [
        (b"".join(lines[:2]), "has 2 lines; it must have one JSON object per row, 3"),
        (b"".join([*lines, lines[0]]), "has 4 lines"),
        (lines[0] + b"{]\n" + lines[2], "line 2 of "),
        (lines[0] + b"17\n" + lines[2], "one JSON object per row"),
        (lines[0] + b"\xff\n" + lines[2], "line 2 of "),
    ]:
        sign(folder, "episodes.jsonl", content)
        assert said in sentence(folder)


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    size = (folder / "arrays.safetensors").stat().st_size
    assert f"has {size} bytes; the most that is read is 100" in sentence(folder, most_bytes=100)
    os.truncate(folder / "arrays.safetensors", 2**40)  # no terabyte of memory is asked for
    assert f"has {2**40} bytes" in sentence(folder)


def test_a_folder_where_a_file_should_be(folder: Path) -> None:
    (folder / "episodes.jsonl").unlink()
    (folder / "episodes.jsonl").mkdir()
    assert "episodes.jsonl" in sentence(folder)
