from jaxrl_llm.models.cache import KVCache as KVCache
from jaxrl_llm.models.config import RopeScaling as RopeScaling
from jaxrl_llm.models.config import TransformerConfig as TransformerConfig
from jaxrl_llm.models.transformer import Transformer as Transformer
