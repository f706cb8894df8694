"""Records of files: found again where they stand, and the first mistake named by its line."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.rollouts.collect import records as module
from jaxrl_llm.rollouts.collect.records import open_records


def anything(record: dict, place: str) -> None:
    """Every record will do."""


def test_lines_are_found_again_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 0}\r\n\n  \n{"a": "\xc3\xa9"}\n{"a": "\\u2028"}\n\n{"a": 3}')
    seen = []
    records = open_records(path, lambda record, place: seen.append((record["a"], place)))
    assert len(records) == 4
    assert [records[index]["a"] for index in (3, 0, 2, 1)] == [3, 0, "\u2028", "é"]
    assert [records.place(index) for index in range(4)] == [f"line {number} of {path}" for number in (1, 4, 5, 7)]
    assert seen == [(records[index]["a"], records.place(index)) for index in range(4)]


def test_another_content_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 0}\n')
    first = open_records(path, anything).fingerprint
    assert first == open_records(path, anything).fingerprint
    path.write_text('{"a": 1}\n')
    assert first != open_records(path, anything).fingerprint


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1', "is not JSON"),
        (b"[1, 2]", "holds a list; expected one JSON object per line"),
        (b'"text"', "holds a str"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1} {"a": 2}', "is not JSON"),
        (b"\x1f\x8b\x08\x00", "is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 0}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=f"line 3 of .*{said}") as caught:
        open_records(path, anything)
    assert str(caught.value).endswith(".")


def test_a_check_stops_at_the_first_record_it_refuses(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 0}\n{"a": 1}\n{"a": 2}\n')

    def check(record: dict, place: str) -> None:
        if record["a"]:
            raise ValueError(f"{place} is refused.")

    with pytest.raises(ValueError, match=r"line 2 of .* is refused"):
        open_records(path, check)


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LINE", 100)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"a": "x" * 90}) + "\n" + json.dumps({"a": "x" * 200}) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is longer than 100 bytes"):
        open_records(path, anything)


def test_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no records; it must have at least one"):
        open_records(tmp_path / "empty.jsonl", anything)
    for path in (tmp_path, tmp_path / "no.jsonl"):
        with pytest.raises(FileNotFoundError, match="is not a file; expected JSON lines or Parquet"):
            open_records(path, anything)


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{number}"}], "score": number / 2} for number in range(2500)]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    seen = []
    records = open_records(path, lambda record, place: seen.append((record, place)))
    assert [record for record, _ in seen] == rows
    assert [records[index] for index in (2499, 0, 1025)] == [rows[2499], rows[0], rows[1025]]
    assert records.place(1025) == f"row 1026 of {path}"
    assert seen[1025][1] == records.place(1025)
    assert len(records.fingerprint) == 64


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": "x" * 50}] * 20), path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"{}\n", content[:4] + bytes(len(content) - 8) + content[-4:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"data.parquet is not a readable Parquet file") as caught:
            open_records(path, anything)
        assert len(str(caught.value).splitlines()) == 1


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow; run: pip install pyarrow, or give JSON lines"):
        open_records(path, anything)
