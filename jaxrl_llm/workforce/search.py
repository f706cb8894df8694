"""Search by words: BM25 over titles, the same order on every machine."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@functools.lru_cache(maxsize=65_536)
def words(text: str) -> tuple[str, ...]:
    """The words of a text: lower case, without accents, letters and digits only."""
    plain = unicodedata.normalize("NFKD", text.lower())
    return tuple(re.findall(r"[a-z0-9]+", "".join(letter for letter in plain if not unicodedata.combining(letter))))


class Index:
    """Titles that can be searched.

    BM25+ and not Okapi's: with a handful of titles, a word that half of them have weighs nothing there, and one that
    most have weighs less than nothing.

    Args:
        titles: what is searched; a result is a place in it.

    Raises:
        ModuleNotFoundError: rank-bm25 is not installed.
        ValueError: no title has a word.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        try:
            from rank_bm25 import BM25Plus
        except ImportError as error:
            raise ModuleNotFoundError(
                "search needs rank-bm25; run: pip install 'jaxrl_llm[llm]'", name="rank_bm25"
            ) from error
        self._words = [frozenset(words(title)) for title in titles]
        if not any(self._words):
            raise ValueError(f"titles are {list(titles)[:3]}; at least one must have a word.")
        self._ranks: BM25Plus = BM25Plus([list(words(title)) for title in titles])

    def search(self, query: str, *, most: int = 10) -> tuple[int, ...]:
        """Places of the titles that have a word of the query, best first; equal ones in the order given."""
        asked = words(query)
        scores = self._ranks.get_scores(list(asked))
        # Rounded, so that the last digits of another processor change no order.
        found = [
            (-round(float(score), 9), place)
            for place, score in enumerate(scores)
            if not self._words[place].isdisjoint(asked)
        ]
        return tuple(place for _, place in sorted(found)[:most])
