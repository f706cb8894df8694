"""When a run goes on to another temperature, other data or harder tasks: pure state machines, whose states a
caller can save.
"""

from jaxrl_llm.training.phases.distillation import IteratedDistillation as IteratedDistillation
from jaxrl_llm.training.phases.distillation import Phase as Phase
from jaxrl_llm.training.phases.plateau import Plateau as Plateau
from jaxrl_llm.training.phases.temperature import TemperatureControl as TemperatureControl
from jaxrl_llm.training.phases.temperature import TemperatureState as TemperatureState
from jaxrl_llm.training.phases.temperature import largest_near_best as largest_near_best
