from jaxrl_llm.serving.app import Limits as Limits
from jaxrl_llm.serving.server import ServerSettings as ServerSettings
from jaxrl_llm.serving.server import serving as serving
