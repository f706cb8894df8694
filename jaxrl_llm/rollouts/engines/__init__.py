from jaxrl_llm.rollouts.engines.jax_engine import JaxEngine as JaxEngine
from jaxrl_llm.rollouts.engines.llama_cpp import LlamaCppEngine as LlamaCppEngine
from jaxrl_llm.rollouts.engines.openai_server import OpenAIEngine as OpenAIEngine
from jaxrl_llm.rollouts.engines.protocol import DistributionEngine as DistributionEngine
from jaxrl_llm.rollouts.engines.protocol import Engine as Engine
from jaxrl_llm.rollouts.engines.protocol import EngineError as EngineError
from jaxrl_llm.rollouts.engines.protocol import EngineSettings as EngineSettings
from jaxrl_llm.rollouts.engines.protocol import IncompleteRolloutsError as IncompleteRolloutsError
