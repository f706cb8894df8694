"""Llama and Mistral: no biases, no norms of heads."""

from jaxrl_llm.models.architectures.protocol import Architecture
from jaxrl_llm.models.architectures.protocol import Defaults
from jaxrl_llm.models.architectures.protocol import plain
from jaxrl_llm.models.config import TransformerConfig


def _plain(config: TransformerConfig) -> bool:
    return plain(config) and not config.qkv_bias and not config.qk_norm


LLAMA = Architecture(name="LlamaForCausalLM", model_type="llama", describes=_plain, gguf="llama")

MISTRAL = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    describes=_plain,
    gguf="llama",
    defaults=Defaults(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
)
