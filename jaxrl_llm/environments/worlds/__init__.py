"""Worlds that are acted in over many turns: what one is, panels of their tasks, two of our own, TextWorldExpress."""

from jaxrl_llm.environments.worlds.check_text import check_text_world
from jaxrl_llm.environments.worlds.episodes import STEP_SECONDS
from jaxrl_llm.environments.worlds.episodes import TextEpisodes
from jaxrl_llm.environments.worlds.expert_texts import PROVENANCE
from jaxrl_llm.environments.worlds.expert_texts import write_expert
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
from jaxrl_llm.environments.worlds.textworld_express import TextWorldExpress

__all__ = [
    "PROVENANCE",
    "STEP_SECONDS",
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
    "TextWorldExpress",
    "check_text_world",
    "check_world",
    "split_panels",
    "write_expert",
]
