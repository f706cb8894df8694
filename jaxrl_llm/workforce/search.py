"""Search by words: BM25 over titles, the same order on every machine."""

import functools
import re
import unicodedata
from collections.abc import Sequence

COMMON = 20
"""Titles that a word may be in, however few there are, without being a common one."""


@functools.lru_cache(maxsize=65_536)
def words(text: str) -> tuple[str, ...]:
    """The words of a text: lower case, without accents, letters and digits only."""
    plain = unicodedata.normalize("NFKD", text.lower())
    return tuple(re.findall(r"[^\W_]+", "".join(letter for letter in plain if not unicodedata.combining(letter))))


class Index:
    """Titles that can be searched.

    BM25+ and not Okapi's: with a handful of titles, a word that half of them have weighs nothing there, and one that
    most have weighs less than nothing. Titles that share nothing with a query but words of a tenth of all titles
    ("of", "country") are ranked only where it has no other word.

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
        self._places: dict[str, set[int]] = {}
        for place, title in enumerate(titles):
            for word in words(title):
                self._places.setdefault(word, set()).add(place)
        if not self._places:
            raise ValueError(f"titles are {list(titles)[:3]}; at least one must have a word.")
        self._common = max(COMMON, len(titles) // 10)
        self._ranks = BM25Plus([list(words(title)) for title in titles])

    def search(self, query: str, *, most: int = 10) -> tuple[int, ...]:
        """Places of the titles that have a word of the query, best first; equal ones in the order given."""
        asked = words(query)
        known = [self._places[word] for word in asked if word in self._places]
        rare = [places for places in known if len(places) <= self._common]
        ranked = sorted(set().union(*(rare or known)))
        if not ranked:
            return ()
        scores = self._ranks.get_batch_scores(list(asked), ranked)
        # Rounded, so that the last digits of another processor change no order.
        found = sorted((-round(float(score), 9), place) for score, place in zip(scores, ranked, strict=True))
        return tuple(place for _, place in found[:most])
