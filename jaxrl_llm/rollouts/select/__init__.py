"""Which sampled answers become demonstrations: filters with counted reasons, the best of each, modes, files."""

from jaxrl_llm.rollouts.select.answers import SampledAnswer as SampledAnswer
from jaxrl_llm.rollouts.select.answers import answers_of as answers_of
from jaxrl_llm.rollouts.select.answers import best_of_each as best_of_each
from jaxrl_llm.rollouts.select.answers import longest_answered as longest_answered
from jaxrl_llm.rollouts.select.filters import Filter as Filter
from jaxrl_llm.rollouts.select.filters import Sifted as Sifted
from jaxrl_llm.rollouts.select.filters import earned as earned
from jaxrl_llm.rollouts.select.filters import ended as ended
from jaxrl_llm.rollouts.select.filters import long_between as long_between
from jaxrl_llm.rollouts.select.filters import matching as matching
from jaxrl_llm.rollouts.select.filters import repeated_share as repeated_share
from jaxrl_llm.rollouts.select.filters import sift as sift
from jaxrl_llm.rollouts.select.filters import unrepetitive as unrepetitive
from jaxrl_llm.rollouts.select.modes import DIRECT as DIRECT
from jaxrl_llm.rollouts.select.modes import PROVENANCE as PROVENANCE
from jaxrl_llm.rollouts.select.modes import THINKING as THINKING
from jaxrl_llm.rollouts.select.modes import Mode as Mode
from jaxrl_llm.rollouts.select.modes import unpaired as unpaired
from jaxrl_llm.rollouts.select.modes import write_demonstrations as write_demonstrations
