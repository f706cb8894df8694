"""Texts with about twenty people's separate ratings each: the source distribution of `vaderSentiment` 3.3.2 (MIT).

Its wheel lacks them, so they are fetched once by an explicit call of `fetch_vader`, never otherwise. Source: Hutto and
Gilbert, VADER, ICWSM 2014: tweets, sentences of Amazon and film reviews and of New York Times editorials, each rated
from -4 (extremely negative) to 4.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from jaxrl_llm.environments.crowd_texts import CrowdTexts
from jaxrl_llm.environments.crowd_texts import merged_texts

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
"""pip refuses another archive before it runs anything of it."""
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
KINDS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")
AGREEMENT = 1e-3
"""Largest difference between a text's mean rating and the mean of the ratings under its number. 200 of the 4,200 tweets
have another person's text under their number; they are left out."""


def fetch_vader(folder: str | Path, *, timeout: float = 300.0) -> Path:
    """Download the source distribution into a folder with pip, unless it is there.

    Args:
        folder: where to; made if need be.
        timeout: seconds to wait.

    Returns:
        the archive.

    Raises:
        OSError: it cannot be downloaded; the sentence gives the command to try by hand.
    """
    folder = Path(folder)
    path = folder / ARCHIVE
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["download", "--no-binary", ":all:", "--no-deps"]
    by_hand = f"pip {' '.join(arguments)} {PACKAGE} --dest {folder}"
    # Into a draft first, so that an archive that is there is whole.
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        pinned = Path(draft) / "requirements.txt"
        pinned.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
        by_hash = ["--require-hashes", "--requirement", str(pinned), "--dest", draft]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pip", "--quiet", *arguments, *by_hash],
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"The rated texts did not arrive within {timeout:g} seconds; try: {by_hand}") from error
        found = Path(draft) / ARCHIVE
        if done.returncode or not found.is_file():
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise OSError(f"The rated texts cannot be downloaded ({said}); with a package index in reach: {by_hand}")
        found.replace(path)
    return path


def read_ratings(archive: str | Path) -> list[tuple[str, list[int]]]:
    """Every text with its ratings, integers from -4 to 4; texts whose ratings are another's are left out.

    Raises:
        FileNotFoundError: no such archive.
        ValueError: the archive is damaged or another one.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} does not exist; fetch it with fetch_vader(folder).")
    rated = []
    try:
        with tarfile.open(archive) as outer:
            name = next(name for name in outer.getnames() if name.endswith(INNER))
            with tarfile.open(fileobj=outer.extractfile(name)) as inner:
                for kind in KINDS:
                    texts = _lines(inner, f"{kind}_GroundTruth.txt", 3)
                    ratings = _lines(inner, f"{kind}_anonDataRatings.txt", 4)
                    for number, (mean, text, *_) in texts.items():
                        scores = json.loads(ratings[number][2]) if number in ratings else []
                        if scores and abs(float(mean) - np.mean(scores)) < AGREEMENT:
                            rated.append((text, scores))
    except (tarfile.TarError, EOFError, StopIteration, KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{archive} is damaged or not {ARCHIVE} ({type(error).__name__}: {error}); remove it and fetch it again."
        ) from error
    return rated


def _lines(archive: tarfile.TarFile, name: str, columns: int) -> dict[str, list[str]]:
    """Columns after the first, by the first, of a file of the archive."""
    file = archive.extractfile(f"hutto_ICWSM_2014/{name}")
    assert file is not None
    rows = [line.split("\t") for line in file.read().decode("utf-8-sig", "replace").splitlines() if line]
    return {row[0]: row[1:] for row in rows if len(row) >= columns}


def vader_texts(archive: str | Path, *, count: int | None = 8000, seed: int = 0) -> CrowdTexts:
    """A seeded choice of the rated texts; the harm of one is the share of its raters who gave it less than 0.

    Args:
        archive: what `fetch_vader` returned.
        count: how many; None for all that are distinct.
        seed: which.

    Raises:
        FileNotFoundError: no such archive.
        ValueError: a damaged archive, or a count that is not possible.
    """
    rated = read_ratings(archive)
    return merged_texts(
        ((text, float(np.mean(np.asarray(scores) < 0))) for text, scores in rated), count=count, seed=seed
    )
