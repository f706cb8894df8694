"""The shop: a search page, pages of results, and a page of each listing where options are chosen.

    Buy Laptop with processor: i7, color: silver, for at most $2600.
    search[laptop]                   -> 3 listings
    click[Laptop (processor: i7)]    -> its options and prices
    click[color: silver]             -> what is left of them
    click[buy]                       -> the end; `purchase_reward` says what it was worth

The interface (search[...], click[...]) and the reward are in the manner of WebShop; catalogue, pages and goals are not
its own, and results are no results on WebShop.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import NamedTuple

from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.environments.worlds.shop.catalogue import Listing
from jaxrl_llm.environments.worlds.shop.catalogue import catalogue_version
from jaxrl_llm.environments.worlds.shop.catalogue import read_catalogue
from jaxrl_llm.environments.worlds.shop.goals import Goal
from jaxrl_llm.environments.worlds.shop.goals import all_goals
from jaxrl_llm.environments.worlds.shop.goals import purchase_reward
from jaxrl_llm.environments.worlds.text import Reply

if TYPE_CHECKING:
    from rank_bm25 import BM25Okapi

PAGE = 5
"""Listings on a page of results."""
LONGEST_SEARCH = 200
"""Characters that the search field takes."""
MANUAL = (
    "Actions: search[words] on the search page; click[what a page shows], click[next page], click[previous page], "
    "click[back to search], click[buy]."
)
SEARCH_PAGE = "You are on the search page."
NEXT, PREVIOUS, BACK, BUY = "next page", "previous page", "back to search", "buy"
_ACTION = re.compile(r"\s*(search|click)\s*\[(.*)\]\s*", re.IGNORECASE | re.DOTALL)


class Place(NamedTuple):
    """Where a customer is.

    Attributes:
        query: what was searched for; None on the search page.
        page: of the results.
        listing: what is open, by its index; None where nothing is.
        choices: kinds and values chosen there.
        bought: whether the purchase is made.
    """

    query: str | None = None
    page: int = 0
    listing: int | None = None
    choices: frozenset[tuple[str, str]] = frozenset()
    bought: bool = False


@functools.cache
def _index() -> "BM25Okapi":
    try:
        from rank_bm25 import BM25Okapi
    except ImportError as error:
        raise ModuleNotFoundError(
            "the shop's search needs rank-bm25; run: pip install 'jaxrl_llm[llm]'", name="rank_bm25"
        ) from error
    # Of a listing its title and all that can be chosen; the title twice, so that a camera comes before its bag.
    texts = [
        " ".join([one.title, one.title, *(f"{kind} {value}" for kind in one.kinds for value in one.values(kind))])
        for one in read_catalogue()
    ]
    return BM25Okapi([_words(text) for text in texts])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@functools.lru_cache(maxsize=4096)
def search(query: str) -> tuple[int, ...]:
    """The listings that have a word of the query, best first by BM25; equal ones in the order of the catalogue."""
    scores = _index().get_scores(query.split())
    # Rounded, so that the last digits of another processor change no order.
    found = [(-round(float(score), 9), place) for place, score in enumerate(scores) if score > 1e-9]
    return tuple(place for _, place in sorted(found))


def _price(listing: Listing, choices: frozenset[tuple[str, str]]) -> str:
    prices = sorted(one.price for one in listing.fitting(choices))
    if not prices:
        return "sold out"
    return f"${prices[0]:.2f}" if len(prices) == 1 else f"${prices[0]:.2f} to ${prices[-1]:.2f}"


def _chosen(listing: Listing, choices: frozenset[tuple[str, str]], kind: str, value: str) -> frozenset[tuple[str, str]]:
    """The choices after a click on a value: one that was chosen is taken back, another of its kind is replaced."""
    if (kind, value) in choices:
        return choices - {(kind, value)}
    return frozenset({*(choice for choice in choices if choice[0] != kind), (kind, value)})


@functools.lru_cache(maxsize=16_384)
def buttons(place: Place) -> Mapping[str, Place]:
    """What can be clicked, in the order of the page, and where it leads."""
    if place.bought or place.query is None:
        return {}
    found, results = dict[str, Place](), search(place.query)
    if place.listing is None:
        for index in results[place.page * PAGE : (place.page + 1) * PAGE]:
            found[read_catalogue()[index].title] = place._replace(listing=index)
        if (place.page + 1) * PAGE < len(results):
            found[NEXT] = place._replace(page=place.page + 1)
        if place.page > 0:
            found[PREVIOUS] = place._replace(page=place.page - 1)
    else:
        listing = read_catalogue()[place.listing]
        for kind in listing.kinds:
            for value in listing.values(kind):
                choices = _chosen(listing, place.choices, kind, value)
                if listing.fitting(choices):
                    found[f"{kind}: {value}"] = place._replace(choices=choices)
        if len(listing.fitting(place.choices)) == 1:
            found[BUY] = place._replace(bought=True)
        found[PREVIOUS] = place._replace(listing=None, choices=frozenset())
    found[BACK] = Place()
    return found


def _other_buttons(place: Place) -> str:
    return " ".join(f"[{name}]" for name in buttons(place) if name in (BUY, NEXT, PREVIOUS, BACK))


def page_text(place: Place) -> str:
    """What is shown."""
    if place.bought:
        return "You bought it. Thank you."
    if place.query is None:
        return SEARCH_PAGE
    if place.listing is None:
        results = search(place.query)
        if not results:
            return f"Nothing was found for {place.query}.\n[{BACK}]"
        lines = [f"Results for {place.query}, page {place.page + 1} of {-(-len(results) // PAGE)}:"]
        for index in results[place.page * PAGE : (place.page + 1) * PAGE]:
            listing = read_catalogue()[index]
            lines.append(f"{listing.title}, {_price(listing, frozenset())}")
        return "\n".join([*lines, _other_buttons(place)])
    listing, clickable = read_catalogue()[place.listing], buttons(place)
    lines = [f"{listing.title}, {_price(listing, place.choices)}"]
    for kind in listing.kinds:
        values = []
        for value in listing.values(kind):
            mark = " (chosen)" if (kind, value) in place.choices else ""
            values.append(value + (mark if f"{kind}: {value}" in clickable else " (sold out)"))
        lines.append(f"{kind}: {', '.join(values)}")
    return "\n".join([*lines, _other_buttons(place)])


def follow(place: Place, action: str) -> Place | str:
    """Where an action leads; the shop's words where it leads nowhere."""
    match = _ACTION.fullmatch(action)
    if match is None:
        return "An action is search[words] or click[name]."
    verb, argument = match[1].lower(), " ".join(match[2].split()).lower()
    if verb == "click":
        named = {name.lower(): to for name, to in buttons(place).items()}
        return named.get(argument, "There is no such button here, or it is sold out.")
    if place.query is not None:
        return "There is no search field here; go back to search first."
    if len(argument) > LONGEST_SEARCH:
        return f"The search field takes {LONGEST_SEARCH} characters."
    words = _words(argument)
    return Place(query=" ".join(words)) if words else "There are no words to search for."


@functools.cache
def _searches() -> tuple[str, ...]:
    return tuple(f"search[{product.lower()}]" for product in dict.fromkeys(one.product for one in read_catalogue()))


def admissible(place: Place) -> tuple[str, ...]:
    """What can be done; of all searches the one for each product."""
    if place.query is None:
        return () if place.bought else _searches()
    return tuple(f"click[{name}]" for name in buttons(place))


def shortest_way(goal: Goal, place: Place) -> tuple[str, ...]:
    """The fewest actions to a purchase that is worth 1, by breadth-first search from here.

    Listings other than the one that is asked for are not opened, and only its product is searched for: both take one
    action wherever they lead, and the search brings the listing on its first page, so that no other one is shorter.
    """
    searched = f"search[{goal.product.lower()}]"
    queue: collections.deque[tuple[Place, tuple[str, ...]]] = collections.deque([(place, ())])
    seen = {place}
    while queue:
        here, way = queue.popleft()
        ways = {searched: follow(here, searched)} if here.query is None else buttons(here)
        for name, to in ways.items():
            action = name if here.query is None else f"click[{name}]"
            if isinstance(to, str) or to in seen:
                continue
            listing = None if to.listing is None else read_catalogue()[to.listing]
            if to.bought and listing is not None:
                if purchase_reward(goal, listing, listing.fitting(to.choices)[0]) == 1:
                    return (*way, action)
            elif listing is None or (listing.product, listing.attribute) == (goal.product, goal.attribute):
                seen.add(to)
                queue.append((to, (*way, action)))
    raise RuntimeError(f"nothing in the shop is worth 1 to {goal.sentence!r}")


class ShopEpisode:
    """One customer; see `TextEpisode`."""

    def __init__(self, goal: Goal) -> None:
        self.goal, self._place = goal, Place()
        self._way: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """See `TextEpisode.prompt`."""
        return f"{self.goal.sentence}\n{MANUAL}\n{SEARCH_PAGE}"

    @property
    def admissible(self) -> tuple[str, ...]:
        """See `TextEpisode.admissible`."""
        return admissible(Place())

    def step(self, action: str) -> Reply:
        """See `TextEpisode.step`."""
        if self._place.bought:
            return Reply("The shop is left.", 0.0, done=True, valid=False)
        to = follow(self._place, action)
        if isinstance(to, str):
            return Reply(to, 0.0, done=False, valid=False, admissible=admissible(self._place))
        self._way = self._way[1:] if self._way and self._way[0] == action else ()
        self._place, reward = to, 0.0
        if to.bought and to.listing is not None:
            listing = read_catalogue()[to.listing]
            reward = purchase_reward(self.goal, listing, listing.fitting(to.choices)[0])
        return Reply(page_text(to), reward, done=to.bought, valid=True, admissible=admissible(to))

    def expert(self) -> str | None:
        """The next action of a shortest way to a reward of 1; None after the end."""
        if self._place.bought:
            return None
        self._way = self._way or shortest_way(self.goal, self._place)
        return self._way[0]

    def close(self) -> None:
        """There is nothing to let go of."""


@dataclasses.dataclass(frozen=True)
class Shop:
    """The shop as a `TextWorld`: each task is a goal; a third of the product types is held out, with all their goals.

    Attributes:
        turns: actions after which an episode is cut off.

    Raises:
        ValueError: too few turns to solve every task.
    """

    turns: int = 15

    def __post_init__(self) -> None:
        """Refuse too few turns."""
        # Search, open, choose every kind of option, buy.
        longest = 3 + max(len(listing.kinds) for listing in read_catalogue())
        if self.turns < longest:
            raise ValueError(f"turns is {self.turns}; a task of the shop can take {longest}.")

    @property
    def name(self) -> str:
        """See `TextWorld.name`."""
        return f"shop-{catalogue_version()}-{self.turns}"

    @property
    def tasks(self) -> int:
        """Goals."""
        return len(all_goals())

    def held_out(self, seed: int) -> bool:
        """Whether the task is of a product type that is never trained on."""
        return is_held_out(f"shop/{all_goals()[seed].product}")

    def reset(self, seed: int) -> ShopEpisode:
        """See `TextWorld.reset`."""
        if not 0 <= seed < self.tasks:
            raise ValueError(f"seed is {seed}; the tasks of {self.name} are 0 .. {self.tasks - 1}.")
        _index()  # so that a missing package is named before anything is sampled
        return ShopEpisode(all_goals()[seed])
