"""A shop of our own on a real retail catalogue: search, choose options, buy."""

from jaxrl_llm.environments.worlds.shop.catalogue import Listing
from jaxrl_llm.environments.worlds.shop.catalogue import Variant
from jaxrl_llm.environments.worlds.shop.goals import Goal
from jaxrl_llm.environments.worlds.shop.goals import purchase_reward
from jaxrl_llm.environments.worlds.shop.world import Shop

__all__ = [
    "Goal",
    "Listing",
    "Shop",
    "Variant",
    "purchase_reward",
]
