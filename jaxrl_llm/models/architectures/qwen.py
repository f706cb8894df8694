"""Qwen2, with biases of queries, keys and values, and Qwen3, with norms of heads; dense, and with experts."""

from dataclasses import replace
from typing import Any

from jaxrl_llm.models.architectures.entries import Entries
from jaxrl_llm.models.architectures.protocol import Architecture
from jaxrl_llm.models.architectures.protocol import Defaults
from jaxrl_llm.models.architectures.protocol import plain
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import TransformerConfig

QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    describes=lambda config: plain(config) and config.qkv_bias and not config.qk_norm,
    gguf="qwen2",
    defaults=Defaults(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096),
    reads=lambda entries: {"qkv_bias": True},
    windows=True,
)

QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    describes=lambda config: plain(config) and config.qk_norm and not config.qkv_bias,
    gguf="qwen3",
    defaults=Defaults(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, sliding_window=4096),
    reads=lambda entries: {"qk_norm": True},
    windows=True,
)


def _experts(entries: Entries) -> dict[str, Any]:
    dense = entries.settings.get("mlp_only_layers") or []
    step = entries.integer("decoder_sparse_step", 1)
    if step != 1 or not isinstance(dense, list) or dense != list(range(len(dense))):
        raise entries.unexpected(
            "decoder_sparse_step with mlp_only_layers", "1 with the first layers, if any", (step, dense)
        )
    experts = ExpertsConfig(
        # transformers 5 writes the second name.
        count=entries.integer("num_experts", entries.integer("num_local_experts", 128)),
        chosen=entries.integer("num_experts_per_tok", 8),
        width=entries.integer("moe_intermediate_size", 768),
        dense_layers=len(dense),
        scores="softmax",
        bias=False,
        normalise=entries.truth("norm_topk_prob", False),
    )
    return {"qk_norm": True, "experts": experts}


def _say_experts(config: TransformerConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.dense_layers)),
    }


def _of_qwen3_moe(config: TransformerConfig) -> bool:
    experts = config.experts
    if experts is None or experts.bias or experts.shared or experts.groups != 1 or experts.scale != 1:
        return False
    own = plain(replace(config, experts=None)) and config.qk_norm and not config.qkv_bias
    return own and experts.scores == "softmax"


QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    describes=_of_qwen3_moe,
    gguf="qwen3moe",
    defaults=Defaults(num_key_value_heads=4, max_position_embeddings=32768, sliding_window=4096),
    own=("num_experts", "num_local_experts"),
    reads=_experts,
    says=_say_experts,
    windows=True,
)
