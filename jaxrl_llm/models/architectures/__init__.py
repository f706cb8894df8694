"""Architectures whose checkpoints are read and written, a file for each family."""

from jaxrl_llm.models.architectures.entries import Entries as Entries
from jaxrl_llm.models.architectures.glm4_moe import GLM4_MOE as GLM4_MOE
from jaxrl_llm.models.architectures.glm4_moe import glm45 as glm45
from jaxrl_llm.models.architectures.glm4_moe import glm45_air as glm45_air
from jaxrl_llm.models.architectures.llama import LLAMA as LLAMA
from jaxrl_llm.models.architectures.llama import MISTRAL as MISTRAL
from jaxrl_llm.models.architectures.protocol import Architecture as Architecture
from jaxrl_llm.models.architectures.protocol import Defaults as Defaults
from jaxrl_llm.models.architectures.qwen import QWEN2 as QWEN2
from jaxrl_llm.models.architectures.qwen import QWEN3 as QWEN3
from jaxrl_llm.models.architectures.qwen import QWEN3_MOE as QWEN3_MOE

ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GLM4_MOE)
"""All of them. Of those that describe a configuration the first one is written."""
