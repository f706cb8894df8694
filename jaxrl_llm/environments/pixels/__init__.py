"""Games seen as arrays of numbers: one reset and step for games in JAX and for simulators on the host."""

from jaxrl_llm.environments.pixels.atari import Atari as Atari
from jaxrl_llm.environments.pixels.minatar import MinAtar as MinAtar
from jaxrl_llm.environments.pixels.protocol import Answer as Answer
from jaxrl_llm.environments.pixels.protocol import ArrayGame as ArrayGame
from jaxrl_llm.environments.pixels.protocol import HostAnswer as HostAnswer
from jaxrl_llm.environments.pixels.protocol import HostGames as HostGames
