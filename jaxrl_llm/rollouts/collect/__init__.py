"""Collectors: who acted, and what came of it."""

from jaxrl_llm.rollouts.collect.agents import AgentCollector as AgentCollector
from jaxrl_llm.rollouts.collect.agents import ExpertCollector as ExpertCollector
from jaxrl_llm.rollouts.collect.ahead import AheadCollector as AheadCollector
from jaxrl_llm.rollouts.collect.conversations import ConversationCollector as ConversationCollector
from jaxrl_llm.rollouts.collect.demonstrations import DemonstrationCollector as DemonstrationCollector
from jaxrl_llm.rollouts.collect.preferences import PreferenceCollector as PreferenceCollector
from jaxrl_llm.rollouts.collect.protocol import BatchShape as BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings as Brings
from jaxrl_llm.rollouts.collect.protocol import CollectError as CollectError
from jaxrl_llm.rollouts.collect.protocol import Collector as Collector
from jaxrl_llm.rollouts.collect.protocol import Experience as Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot as PolicySnapshot
from jaxrl_llm.rollouts.collect.protocol import brought_by as brought_by
from jaxrl_llm.rollouts.collect.protocol import check_experience as check_experience
from jaxrl_llm.rollouts.collect.replay import ReplayCollector as ReplayCollector
from jaxrl_llm.rollouts.collect.samplers import NOBODYS_LAW as NOBODYS_LAW
from jaxrl_llm.rollouts.collect.samplers import EngineSampler as EngineSampler
from jaxrl_llm.rollouts.collect.samplers import Law as Law
from jaxrl_llm.rollouts.collect.samplers import PolicySampler as PolicySampler
from jaxrl_llm.rollouts.collect.samplers import Sampler as Sampler
from jaxrl_llm.rollouts.collect.store import KeptCollector as KeptCollector
from jaxrl_llm.rollouts.collect.store import Store as Store
from jaxrl_llm.rollouts.collect.tasks import TaskCollector as TaskCollector
from jaxrl_llm.rollouts.collect.text_agents import TextAgentCollector as TextAgentCollector
from jaxrl_llm.rollouts.collect.text_agents import TextExpertCollector as TextExpertCollector
from jaxrl_llm.rollouts.collect.turns import TurnsCollector as TurnsCollector
