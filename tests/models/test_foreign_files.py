"""Files that somebody else wrote, or nobody sane: what each says is read as its reader reads it, or refused at once."""

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl_llm.models.files import JSON_LIMIT
from jaxrl_llm.models.files import MissingModelFileError
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.gguf_header import read_header
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.hf_io import INDEX
from jaxrl_llm.models.hf_io import SINGLE
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.weights import build_model
from jaxrl_llm.models.weights import load_gguf
from jaxrl_llm.models.weights import load_hf
from jaxrl_llm.models.weights import model_tensors
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.models.weights import save_hf
from tests.golden.tiny_checkpoints import CHECKPOINTS
from tests.golden.tiny_checkpoints import tensors_of

NAME = "llama_grouped_tied"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def refused(sentence: str, *, error: type[ModelFileError] = ModelFileError) -> Iterator[None]:
    """The documented exception, with a sentence, in seconds and without a gigabyte."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error, match=sentence) as caught:
        yield
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500
    assert time.process_time() - start < 5
    scale = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale < 1e9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files and an index, without a tokenizer."""
    path, tensors = tmp_path / "folder", tensors_of(NAME)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CHECKPOINTS[NAME]))
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, path / file)
    write_index(path, {name: file for file, held in parts.items() for name in held})
    return path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_the_file_that_the_index_names_counts(folder: Path) -> None:
    """The same tensor, old and new, in either file."""
    tensors, index = tensors_of(NAME), index_of(folder)
    for file, other in (("a.safetensors", "b.safetensors"), ("b.safetensors", "a.safetensors")):
        held = {name: tensors[name] for name, place in index.items() if place == other}
        old = {name: tensors[name] + 1 for name, place in index.items() if place == file}
        save_file(held | old, folder / other)
        found = model_tensors(load_hf(folder))
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
        save_file(held, folder / other)


def test_a_tensor_in_two_files_that_the_index_does_not_name(folder: Path) -> None:
    tensors, index = tensors_of(NAME), index_of(folder)
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in index if index[name] == file or name == NORM}, folder / file)
    write_index(folder, {name: file for name, file in index.items() if name != NORM})
    with refused(f"has {NORM} in a.safetensors and in b.safetensors, and .* names neither"):
        load_hf(folder)
    # In one file only it is where it is.
    save_file({name: tensors[name] for name in index if index[name] == "a.safetensors"}, folder / "a.safetensors")
    np.testing.assert_array_equal(load_hf(folder).final_norm.scale[...], tensors[NORM])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../a.safetensors", "expected names of files of the same folder"),
        ("/etc/passwd", "expected names of files of the same folder"),
        ("sub/../../x", "expected names of files of the same folder"),
        ("..\\\\x", "expected names of files of the same folder"),
        ("..", "expected names of files of the same folder"),
        ("", "expected names of files of the same folder"),
        ("a\0b", "expected names of files of the same folder"),
        ("x" * 5000, "has no x"),
        (3, "has no weight_map"),
        (None, "has no weight_map"),
        (["a.safetensors"], "has no weight_map"),
    ],
)
def test_indices_that_point_elsewhere(name: Any, sentence: str, folder: Path) -> None:
    write_index(folder, {**index_of(folder), NORM: name})
    with refused(sentence):
        load_hf(folder)


@pytest.mark.parametrize(
    "content", ['{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "a"}', '{"x": 1}', "[]"]
)
def test_indices_of_another_kind(content: str, folder: Path) -> None:
    (folder / INDEX).write_text(content)
    with refused("weight_map|holds a list"):
        load_hf(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a newer jax: no named pipes on Windows")
@pytest.mark.parametrize("name", ["config.json", INDEX, "a.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_files_that_are_no_files(name: str, kind: str, folder: Path) -> None:
    ByteTokenizer().save(folder)
    (folder / name).unlink(missing_ok=True)
    {
        "pipe": lambda path: os.mkfifo(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": lambda path: path.mkdir(),
    }[kind](folder / name)
    with refused("is a folder; expected" if kind == "folder" else r"is a (named pipe|device|socket); expected"):
        load_pretrained(folder)


def test_names_that_cannot_be_printed(folder: Path) -> None:
    """A line end would forge a second sentence, an escape steer the terminal, half a letter break whoever prints it."""
    name, index = "a\n\x1b[2J\ud800", index_of(folder)
    write_index(folder, {**index, name: "a.safetensors"})
    with refused(r"names tensors that its files do not hold: a\\n\\x1b\[2J\\ud800\."):
        load_hf(folder)
    write_index(folder, {**index, NORM: name})
    with refused(r"has no a\\n\\x1b\[2J\\ud800, which"):
        load_hf(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a newer jax: no named pipes on Windows")
def test_a_pipe_in_place_of_a_gguf_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", Path("/dev/zero")):
        with refused("is a (named pipe|device); expected a"):
            load_gguf(path)
        with refused("is a (named pipe|device); expected a"):
            load_pretrained(path)
    with refused("does not exist", error=MissingModelFileError):
        load_pretrained(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bit_floats(dtype: type, folder: Path) -> None:
    held = {name: tensors_of(NAME)[name] for name, file in index_of(folder).items() if file == "b.safetensors"}
    save_file(held | {NORM: held[NORM].astype(dtype)}, folder / "b.safetensors")
    with refused(rf"holds '{NORM}' in the dtype 'F8_E\d.*', which is not read here"):
        load_hf(folder)


def safetensors_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a header of 0 bytes is promised in a file of 0"),
        (safetensors_of({}, length=2**60), "a header of 1152921504606846976 bytes"),
        (safetensors_of({}, length=2**64 - 1), "a header of 18446744073709551615 bytes"),
        (safetensors_of(b"["), "its header is no JSON"),
        (safetensors_of(b"[" * 20_000), "its header is no JSON"),
        (safetensors_of(b"\xff\xfe"), "its header is no JSON"),
        (safetensors_of([]), "its header is a list"),
        (safetensors_of({"a": entry(), "__metadata__": []}, bytes(8)), "__metadata__"),
        (safetensors_of({"a": entry(), "__metadata__": {"a": 1}}, bytes(8)), "__metadata__"),
        (safetensors_of({"a": 1}), "is not described by"),
        (safetensors_of({"a": {**entry(), "more": 1}}, bytes(8)), "is not described by"),
        (safetensors_of({"a": entry(dtype="F99")}, bytes(8)), "in the dtype 'F99'"),
        (safetensors_of({"a": entry(dtype=3)}, bytes(8)), "in the dtype 3"),
        (safetensors_of({"a": entry(shape=[2**60])}, bytes(8)), "in 8 bytes"),
        (safetensors_of({"a": entry(shape=[2**62, 4])}, bytes(8)), "in 8 bytes"),
        (safetensors_of({"a": entry(shape=[-2])}, bytes(8)), r"has the shape \[-2\]"),
        (safetensors_of({"a": entry(shape="2")}, bytes(8)), "has the shape '2'"),
        (safetensors_of({"a": entry(shape=[True, 2])}, bytes(8)), "has the shape"),
        (safetensors_of({"a": entry(offsets=[8, 0])}, bytes(8)), "in -8 bytes"),
        (safetensors_of({"a": entry(offsets=[0])}, bytes(8)), "the offsets"),
        (safetensors_of({"a": entry(offsets=[4, 12])}, bytes(12)), "begins at 4, where 0"),
        (safetensors_of({"a": entry(), "b": entry()}, bytes(8)), "begins at 0, where 8"),
        (safetensors_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "begins at 4, where 8"),
        (safetensors_of({"a": entry()}, bytes(7)), "have 8 bytes, and 7 follow"),
        (safetensors_of({"a": entry()}, bytes(9)), "have 8 bytes, and 9 follow"),
        (safetensors_of(b'{"a": 1, "a": 2}'), "'a' is given twice"),
    ],
)
def test_headers_of_safetensors_that_do_not_hold(content: bytes, sentence: str, folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SINGLE).write_bytes(content)
    with refused(sentence):
        load_hf(folder)


def test_a_huge_sparse_file_is_refused_by_its_header(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).unlink()
    size = 300 * 10**9
    header = {"a": entry(shape=[size // 4], offsets=[0, size])}
    (folder / SINGLE).write_bytes(safetensors_of(header))
    os.truncate(folder / SINGLE, len(safetensors_of(header)) + size)
    with refused("lacks 20 tensors"):
        load_hf(folder)
    save_gguf(build_model(config_from_hf(CHECKPOINTS[NAME]), tensors_of(NAME)), tmp_path / "it.gguf")
    os.truncate(tmp_path / "it.gguf", size)
    with refused("its tensors end at byte"):
        load_gguf(tmp_path / "it.gguf")


def test_a_model_larger_than_the_machine(folder: Path) -> None:
    """Everything fits together, in a sparse file of a terabyte."""
    settings = {**CHECKPOINTS[NAME], "vocab_size": 2**31 - 1, "max_position_embeddings": 8}
    shapes = {name: tensor.shape for name, tensor in tensors_of(NAME).items()}
    shapes["model.embed_tokens.weight"] = (2**31 - 1, 128)
    width = {32: 128}
    shapes = {name: tuple(width.get(size, size) for size in shape) for name, shape in shapes.items()}
    shapes["model.embed_tokens.weight"] = (2**31 - 1, 128)
    settings |= {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name in list(shapes):
        if "k_proj" in name or "v_proj" in name:
            shapes[name] = (64, 128)
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=object))
        header[name] = entry(shape=list(shape), offsets=[place, place + size])
        place += size
    (folder / INDEX).unlink()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / SINGLE).write_bytes(safetensors_of(header))
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size + place)
    with refused(r"is a model of \d+ GB; this machine has \d+ GB"):
        load_hf(folder)


def gguf_of(
    entries: list[bytes] = (),  # pyright: ignore[reportArgumentType]
    tensors: list[bytes] = (),  # pyright: ignore[reportArgumentType]
    *,
    counts: tuple[int, int] | None = None,
    data: bytes = b"",
    version: int = 3,
) -> bytes:
    count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


FORTY_NINE_BYTES = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("k", 9, struct.pack("<IQ", 8, 2**60))
NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(20_000)) + struct.pack("<IQB", 0, 1, 0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"GGUF", "it is shorter than any header"),
        (gguf_of(counts=(2**60, 0)), "it promises 1152921504606846976 tensors"),
        (gguf_of(counts=(0, 2**60)), "it promises 1152921504606846976 entries"),
        (FORTY_NINE_BYTES, "'k' promises 1152921504606846976 elements"),
        (gguf_of([pair("k", 9, struct.pack("<IQ", 0, 2**60))]), "'k' promises 1152921504606846976 elements"),
        (gguf_of([pair("k", 9, struct.pack("<IQ", 8, 2**60))]), "'k' promises 1152921504606846976 elements"),
        (gguf_of([pair("k", 9, struct.pack("<IQ", 0, 2**21)) + bytes(2**21)]), "'k' promises 2097152 elements"),
        (
            gguf_of([pair(f"k{i}", 9, struct.pack("<IQ", 0, 2**19) + bytes(2**19)) for i in range(5)]),
            "its arrays promise 2621440 elements",
        ),
        (gguf_of([pair("k", 8, struct.pack("<Q", 2**60))]), "1152921504606846976 bytes are promised"),
        (gguf_of([struct.pack("<Q", 2**64 - 1)]), "18446744073709551615 bytes are promised"),
        (gguf_of([pair("k", 9, NESTED)]), "'k' is an array of the type 9"),
        (gguf_of([pair("k", 13, b"")]), "'k' has the type 13"),
        (gguf_of([pair("k", 7, b"\2")]), "'k' is a truth value of 2"),
        (gguf_of([pair("k", 0, b"\0")] * 2), "the entry 'k' is given twice"),
        (gguf_of([pair("k", 8, text(b"\xff"))]), "is not UTF-8"),
        (gguf_of([pair("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
        (gguf_of([pair("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment is 24"),
        (gguf_of([pair("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
        (gguf_of(version=1), "version 1; supported are 2 and 3"),
        (gguf_of(version=3 << 24), "in the byte order of other machines"),
        (gguf_of([], [tensor(shape=(2**60,))]), "ends at byte"),
        (gguf_of([], [tensor(shape=(2**40, 2**40))]), "has the shape"),
        (gguf_of([], [tensor(shape=(0,))]), "has the shape"),
        (gguf_of([], [tensor(shape=())]), "has 0 dimensions"),
        (gguf_of([], [tensor(shape=(1,) * 5)]), "has 5 dimensions"),
        (gguf_of([], [tensor(), tensor()], data=bytes(64)), "'a' is given twice"),
        (gguf_of([], [tensor(name="x" * 64)]), "name of a tensor has 64 bytes"),
        (gguf_of([], [tensor(offset=2**64 - 64)], data=bytes(64)), "begins at 18446744073709551552, where 0"),
        (gguf_of([], [tensor(offset=64)], data=bytes(64)), "begins at 64, where 0"),
        (gguf_of([], [tensor(), tensor("b", offset=0)], data=bytes(64)), "'b' begins at 0, where 32"),
        (gguf_of([], [tensor(), tensor("b", offset=16)], data=bytes(64)), "'b' begins at 16, where 32"),
        (gguf_of([], [tensor()], data=bytes(31)), "'a' ends at byte"),
        (gguf_of([], [tensor(kind=99)], data=bytes(64)), "in the format 99, which is not known"),
        (gguf_of([], [tensor(kind=26)], data=bytes(64)), "in the format I32, which cannot be dequantised"),
        (gguf_of([], [tensor(kind=28)], data=bytes(64)), "in the format F64, which cannot be dequantised"),
        (gguf_of([], [tensor(kind=15, shape=(256,))], data=bytes(292)), "in the format Q8_K, which cannot"),
        (gguf_of([], [tensor(kind=8, shape=(33,))], data=bytes(64)), "rows of 33 elements, and Q8_0 blocks of 32"),
        (gguf_of([], [tensor()], data=bytes(2**21)), "its tensors end at byte"),
        (gguf_of(), "has the architecture None"),
        (gguf_of([pair("general.architecture", 4, struct.pack("<I", 1))]), "has the architecture 1"),
    ],
)
def test_headers_of_gguf_that_do_not_hold(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "it.gguf").write_bytes(content)
    with refused(sentence):
        load_gguf(tmp_path / "it.gguf")


def test_every_number_and_format_of_a_sound_header_is_read(tmp_path: Path) -> None:
    kinds = {0: ("B", 200), 1: ("b", -3), 2: ("H", 60_000), 3: ("h", -300), 4: ("I", 2**31), 5: ("i", -(2**20))}
    kinds |= {6: ("f", 0.5), 10: ("Q", 2**63), 11: ("q", -(2**40)), 12: ("d", 0.1)}
    entries = [pair(f"k{kind}", kind, struct.pack(f"<{code}", value)) for kind, (code, value) in kinds.items()]
    entries += [
        pair(f"l{kind}", 9, struct.pack(f"<IQ2{code}", kind, 2, value, 0)) for kind, (code, value) in kinds.items()
    ]
    entries += [pair("t", 7, b"\1"), pair("s", 9, struct.pack("<IQ", 8, 2) + text("ä") + text(""))]
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    (tmp_path / "it.gguf").write_bytes(gguf_of(entries, [tensor(shape=(4, 2))], data=values.tobytes()))
    header = read_header(tmp_path / "it.gguf")
    for kind, (_, value) in kinds.items():
        assert header.entries[f"k{kind}"] == value
        assert header.entries[f"l{kind}"] == [value, 0]
    assert (header.entries["t"], header.entries["s"]) == (True, ["ä", ""])
    np.testing.assert_array_equal(header.values("a"), values)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[" * 20_000, "nested too deep|not valid JSON"),
        (b'{"a": ' * 20_000, "nested too deep|not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "holds a list; expected a JSON object"),
        (b"null", "holds a NoneType"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (JSON_LIMIT + 1), "expected a JSON file of at most"),
        (b"", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(content: bytes, sentence: str, name: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with refused(sentence):
        load_hf(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_saved_models_tell_the_next_reader_where_to_stop(name: str, folder: Path, tmp_path: Path) -> None:
    from jaxrl_llm.models.tokenizers import Tokenizer

    settings = {**CHECKPOINTS[NAME], "vocab_size": 260}
    tensors = tensors_of(NAME)
    tensors["model.embed_tokens.weight"] = np.resize(tensors["model.embed_tokens.weight"], (260, 32))
    plain = ByteTokenizer()
    tokenizer = Tokenizer(plain.backend, eos_id=258, eos_ids=(10, 258, 3), bos_id=257, pad_id=256)
    save_hf(build_model(config_from_hf(settings), tensors), tmp_path / "saved", tokenizer=tokenizer)
    written = json.loads((tmp_path / "saved" / name).read_text())
    assert (written["eos_token_id"], written["bos_token_id"], written["pad_token_id"]) == ([258, 10, 3], 257, 256)
    named = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert (named["eos_token"], named["bos_token"], named["pad_token"]) == ("<|eos|>", "<|bos|>", "<|pad|>")
    model, found = load_pretrained(tmp_path / "saved")
    assert found.eos_ids == (258, 10, 3)
    assert found.eos_id == 258
    assert model.config.vocab_size == 259  # the last of the 260 rows was padding
    assert found.has_text(260).tolist() == [True] * 259 + [False]
    assert found.text_ids_count == found.known_ids.sum() == 259
    save_hf(model, tmp_path / "one", tokenizer=plain)
    assert json.loads((tmp_path / "one" / name).read_text())["eos_token_id"] == 258
