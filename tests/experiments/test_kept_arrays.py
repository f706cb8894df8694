"""Files of arrays that are half written, another program's, or made to do harm: a sentence, nothing is allocated."""

import functools
import io
import os
import pickle
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments import study
from experiments import text_features
from experiments.kept_arrays import LARGEST_FILE
from experiments.kept_arrays import KeptArrayError
from experiments.kept_arrays import read_array
from experiments.kept_arrays import read_arrays
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError


class Harm:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def header(text: str, content: bytes = b"", *, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode("latin1") + content


def described(descr: str, shape: str, content: bytes = b"", **options) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n", content, **options)


ARRAY = np.arange(6.0).reshape(2, 3)


def bad_arrays(tmp_path: Path) -> dict[str, bytes]:
    good, one = npy(ARRAY), b"\0" * 8
    return {
        "empty": b"",
        "text": b"hello",
        "half": good[: len(good) // 2],
        "cut": good[:-1],
        "longer": good + b"x",
        "objects": npy(np.array([Harm(tmp_path / "X")], dtype=object), allow_pickle=True),
        "pickle": pickle.dumps(Harm(tmp_path / "X")),
        "objects that claim to be few": described("'|O'", "(1,)", pickle.dumps(Harm(tmp_path / "X"))),
        "a hundred gigabytes": described("'<f8'", "(12500000000,)", one),
        "more than there are numbers": described("'<f8'", f"({10**30}, {10**30})", one),
        "wide texts": described("'<U999999'", "(100000,)", one),
        "wider texts": described("'<U99999999999'", "(1,)", one),
        "negative": described("'<f8'", "(-1, -1)", one),
        "truth": described("'<f8'", "(True,)", one),
        "no shape": described("'<f8'", "7", one),
        "records": described("[('a', '<f8')]", "(1,)", one),
        "void": described("'|V8'", "(1,)", one),
        "dates": described("'<M8[s]'", "(1,)", one),
        "old letters": described("'a8'", "(1,)", one),
        "code": header("__import__('os').system('touch X')", one),
        "deep": header("(" * 3000, one),
        "long header": described("'<f8'", "(1,)" + " " * 9000, one),
        "longest header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100,
        "another version": b"\x93NUMPY\x09\x00" + good[8:],
    }


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@functools.cache
def zeros_packed() -> bytes:
    """A quarter of a gigabyte."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15)
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()


def lying(count: int) -> bytes:
    """An archive whose directory and header claim `count` numbers for its one member, of a quarter of a gigabyte."""
    head = described("'<f8'", f"({count},)")
    claimed = (len(head) + 8 * count) % (1 << 32)
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = compressor.compress(head) + compressor.flush(zlib.Z_FULL_FLUSH)
    packed += zeros_packed()
    name = b"a.npy"
    sizes = struct.pack("<III", 0, len(packed), claimed)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 0x21) + sizes + struct.pack("<HH", len(name), 0) + name
    central = b"PK\x01\x02" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0x21) + sizes
    central += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    return local + packed + central + end


def bad_archives(tmp_path: Path) -> dict[str, bytes]:
    good = npy(ARRAY)
    whole = zipped({"a.npy": good})
    spoiled = bytearray(zipped({"a.npy": good}, zipfile.ZIP_STORED))
    spoiled[spoiled.index(good[-40:]) + 3] ^= 1  # a number
    bomb = described("'<f8'", f"({1 << 23},)", bytes(1 << 26))
    single = {f"array {name}": zipped({"a.npy": content}) for name, content in bad_arrays(tmp_path).items()}
    return single | {
        "empty": b"",
        "text": b"hello",
        "half": whole[: len(whole) // 2],
        "cut": whole[:-1],
        "pickle": pickle.dumps(Harm(tmp_path / "X")),
        "array": good,
        "a spoiled number": bytes(spoiled),
        "not an array": zipped({"a.txt": good}),
        "other packing": zipped({"a.npy": good}, zipfile.ZIP_BZIP2),
        "a bomb": zipped({"a.npy": bomb} | {f"{n}.npy": good for n in range(9)}),
        "a lie of less": lying(100_000),
        "a lie of more": lying(12_500_000_000),
    }


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_what_was_written_is_read(tmp_path):
    for array in (
        ARRAY,
        np.float32([[1, 2]]).T,
        np.array(3),
        np.array([True]),
        np.array(["a", "bc"]),
        np.zeros((0, 3), int),
    ):
        np.save(tmp_path / "a.npy", array)
        found = read_array(tmp_path / "a.npy")
        np.testing.assert_array_equal(found, array)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.savez_compressed(tmp_path / "a.npz", first=ARRAY, second=np.array(1.5))
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["first"], ARRAY)
    np.savez(tmp_path / "a.npz", first=ARRAY.T)
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["first"], ARRAY.T)


def test_what_is_no_array_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = memory()
    for name, content in bad_arrays(tmp_path).items():
        path = tmp_path / "a.npy"
        path.write_bytes(content)
        with pytest.raises(KeptArrayError, match=r"^Cannot read .*a\.npy: .+\.$"):
            pytest.fail(f"{name}: {read_array(path)}")
        path.unlink()
    assert memory() - before < 100_000  # kB
    assert not os.listdir(tmp_path)


def test_what_is_no_archive_of_arrays_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = bad_archives(tmp_path)
    before = memory()
    for name, content in contents.items():
        path = tmp_path / "a.npz"
        path.write_bytes(content)
        with pytest.raises(KeptArrayError, match=r"^Cannot read .*a\.npz: .+\.$"):
            pytest.fail(f"{name}: {read_arrays(path, limit=1 << 24)}")
        path.unlink()
    assert memory() - before < 150_000  # kB
    assert not os.listdir(tmp_path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, kind in (("pipe", "it is a named pipe"), ("device", "it is a device"), (".", "Is a directory")):
        for read in (read_array, read_arrays):
            with pytest.raises(KeptArrayError, match=rf"^Cannot read .*: {kind}.*\.$"):
                read(tmp_path / name)


def test_the_limit_is_that_of_all_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{f"a{n}": np.zeros(1000) for n in range(3)})
    assert len(read_arrays(path)) == 3
    with pytest.raises(KeptArrayError, match=r"claims 2\d\d\d\d bytes unpacked, expected at most 20000"):
        read_arrays(path, limit=20_000)
    np.save(tmp_path / "a.npy", np.zeros(1000))
    with pytest.raises(KeptArrayError, match="claims 8000 bytes, expected at most 7999"):
        read_array(tmp_path / "a.npy", limit=7999)
    for missing in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(KeptArrayError, match="Cannot read"):
            read_arrays(missing)
        with pytest.raises(KeptArrayError, match="Cannot read"):
            read_array(missing)
    assert LARGEST_FILE <= 1 << 30


def folder_of(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "study" / "first")
    (run.path / "parts").mkdir(parents=True)
    return run


def test_damaged_parts_are_said_to_be_so_and_computed_again(tmp_path, monkeypatch, capsys):
    run, computed = folder_of(tmp_path), []

    def part(name):
        return lambda: computed.append(name) or {"final": ARRAY}

    contents = bad_archives(tmp_path) | {"without seconds": zipped({"final.npy": npy(ARRAY)})}
    contents |= {"other seconds": zipped({"seconds.npy": npy(np.array([1, 2]))})}
    parts = {f"part {number}": part(name) for number, name in enumerate(contents)}
    assert study.run_parts(run, {**parts, "whole": part("whole")}) is None
    for path, content in zip([run.path / "parts" / f"{name}.npz" for name in parts], contents.values(), strict=True):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot read .*part 0\.npz: .*--resume study/first: it is computed again"):
        study.read_results(run)
    computed.clear()
    capsys.readouterr()
    assert study.run_parts(run, {**parts, "whole": part("whole")}) is None
    assert computed == list(contents)
    shown = capsys.readouterr().out
    assert shown.count("It is set aside and computed again.") == len(contents)
    results = study.read_results(run)
    assert set(results) == {*parts, "whole"}
    np.testing.assert_array_equal(results["part 3"]["final"], ARRAY)
    assert not (tmp_path / "X").exists()


def test_damaged_features_are_said_to_be_so_and_computed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))
    first = text_features.text_features("hashed", ["good", "bad"])
    (path,) = (tmp_path / "cache" / "features").glob("*.npy")
    others = {
        "other rows": npy(first[:1]),
        "other numbers": npy(first.astype(np.float64)),
        "no numbers": npy(np.full_like(first, np.nan)),
        "other axes": npy(first[None]),
    }
    for content in (bad_arrays(tmp_path) | others).values():
        path.write_bytes(content)
        np.testing.assert_array_equal(text_features.text_features("hashed", ["good", "bad"]), first)
        assert "The features are computed again." in capsys.readouterr().out
        np.testing.assert_array_equal(np.load(path), first)
    assert text_features.text_features("hashed", ["good", "bad"]).shape == (2, 256)
    assert "again" not in capsys.readouterr().out
    assert not (tmp_path / "X").exists()
