"""Worlds that are acted in over many turns: what one is, frozen panels of their tasks, and two of our own."""

from jaxrl_llm.environments.worlds.check_text import check_text_world
from jaxrl_llm.environments.worlds.episodes import TextEpisodes
from jaxrl_llm.environments.worlds.panels import HoldsOut
from jaxrl_llm.environments.worlds.panels import Panel
from jaxrl_llm.environments.worlds.panels import split_panels
from jaxrl_llm.environments.worlds.protocol import Answer
from jaxrl_llm.environments.worlds.protocol import ArrayWorld
from jaxrl_llm.environments.worlds.protocol import check_world
from jaxrl_llm.environments.worlds.rooms import Rooms
from jaxrl_llm.environments.worlds.rooms import RoomsState
from jaxrl_llm.environments.worlds.shop import Shop
from jaxrl_llm.environments.worlds.text import Reply
from jaxrl_llm.environments.worlds.text import TextEpisode
from jaxrl_llm.environments.worlds.text import TextWorld

__all__ = [
    "Answer",
    "ArrayWorld",
    "HoldsOut",
    "Panel",
    "Reply",
    "Rooms",
    "RoomsState",
    "Shop",
    "TextEpisode",
    "TextEpisodes",
    "TextWorld",
    "check_text_world",
    "check_world",
    "split_panels",
]
