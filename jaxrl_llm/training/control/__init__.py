"""Actor-critics for games: old data is reused, and the policy held near those that it comes from."""

from jaxrl_llm.training.control.games import ControlState as ControlState
from jaxrl_llm.training.control.games import GameTrainer as GameTrainer
from jaxrl_llm.training.control.host import HostState as HostState
from jaxrl_llm.training.control.host import HostTrainer as HostTrainer
from jaxrl_llm.training.control.loop import Trained as Trained
from jaxrl_llm.training.control.loop import train as train
from jaxrl_llm.training.control.methods import METHODS as METHODS
from jaxrl_llm.training.control.methods import Method as Method
from jaxrl_llm.training.control.networks import ActorCritic as ActorCritic
from jaxrl_llm.training.control.settings import ControlSettings as ControlSettings
