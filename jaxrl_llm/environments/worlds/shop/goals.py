"""What a customer of the shop asks for, and what a purchase is worth."""

import functools
import itertools
import math
from typing import NamedTuple

from jaxrl_llm.environments.splits import stable_key
from jaxrl_llm.environments.worlds.shop.catalogue import Listing
from jaxrl_llm.environments.worlds.shop.catalogue import Variant
from jaxrl_llm.environments.worlds.shop.catalogue import read_catalogue


class Goal(NamedTuple):
    """What is to be bought.

    Attributes:
        product: name of the product type.
        attribute: kind and value that the listing must have.
        options: kinds and values that are asked for; the other kinds are free.
        limit: highest price [$].
    """

    product: str
    attribute: tuple[str, str]
    options: tuple[tuple[str, str], ...]
    limit: int

    @property
    def sentence(self) -> str:
        """As the customer says it."""
        wishes = ", ".join(f"{kind}: {value}" for kind, value in (self.attribute, *self.options))
        return f"Buy {self.product} with {wishes}, for at most ${self.limit}."


def purchase_reward(goal: Goal, listing: Listing, variant: Variant) -> float:
    """What a purchase y is worth to a customer u, by the formula of WebShop (Yao et al. 2022, section 3):

        r = r_type (|U_att ∩ Y_att| + |U_opt ∩ Y_opt| + 1[price_y <= price_u]) / (|U_att| + |U_opt| + 1)

    Departures from the paper: r_type, which it reads off the overlap of the words of two titles, is here 1 for the
    product type that was asked for and 0 for any other, since the catalogue names the type; U_att has one element.
    Options match when kind and value are equal, not approximately.

    Args:
        goal: what was asked for.
        listing: what was opened.
        variant: of that listing, what was bought.

    Returns:
        In [0, 1]; 1 where everything fits.
    """
    if listing.product != goal.product:
        return 0.0
    bought = set(zip(listing.kinds, variant.options, strict=True))
    met = (listing.attribute == goal.attribute) + len(bought & {*goal.options}) + (variant.price <= goal.limit)
    return met / (1 + len(goal.options) + 1)


@functools.cache
def all_goals() -> tuple[Goal, ...]:
    """Every goal: what is in stock, with each choice of kinds to ask for, at most its own price in whole dollars.

    So the price decides wherever a dearer variant has the options too. In the order of a hash, so that the first few
    are a sample.
    """
    found = set()
    for listing in read_catalogue():
        for variant in listing.fitting(frozenset()):
            options = tuple(zip(listing.kinds, variant.options, strict=True))
            for count in range(len(options) + 1):
                for asked in itertools.combinations(options, count):
                    found.add(Goal(listing.product, listing.attribute, asked, math.ceil(variant.price)))
    return tuple(sorted(found, key=lambda goal: (stable_key(goal.sentence), goal)))
