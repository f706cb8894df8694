"""GLM-4.5 and its Air (arXiv:2508.06471): half of each head turns, sigmoid routers with a correction bias."""

from typing import Any

from jaxrl_llm.models.architectures.entries import Entries
from jaxrl_llm.models.architectures.protocol import Architecture
from jaxrl_llm.models.architectures.protocol import Defaults
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import TransformerConfig


def _experts(entries: Entries) -> dict[str, Any]:
    experts = ExpertsConfig(
        count=entries.integer("n_routed_experts", 128),
        chosen=entries.integer("num_experts_per_tok", 8),
        width=entries.integer("moe_intermediate_size", 1408),
        shared=entries.integer("n_shared_experts", 1),
        dense_layers=entries.integer("first_k_dense_replace", 1),
        normalise=entries.truth("norm_topk_prob", True),
        scale=entries.number("routed_scaling_factor", 1.0),
        groups=entries.integer("n_group", 1),
        chosen_groups=entries.integer("topk_group", 1),
    )
    return {
        "qkv_bias": entries.truth("attention_bias", False),
        "qk_norm": entries.truth("use_qk_norm", False),
        "experts": experts,
        "mtp_layers": entries.integer("num_nextn_predict_layers", entries.integer("num_mtp_layers", 1)),
    }


def _say(config: TransformerConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    return {
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm,
        "partial_rotary_factor": config.rotary_fraction,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "n_shared_experts": experts.shared,
        "first_k_dense_replace": experts.dense_layers,
        "norm_topk_prob": experts.normalise,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.groups,
        "topk_group": experts.chosen_groups,
        "num_nextn_predict_layers": config.mtp_layers,
    }


GLM4_MOE = Architecture(
    name="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    describes=lambda config: config.experts is not None and config.experts.scores == "sigmoid" and config.experts.bias,
    gguf="glm4moe",
    defaults=Defaults(
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, partial_rotary_factor=0.5
    ),
    own=("attention_bias", "partial_rotary_factor", "n_routed_experts", "num_local_experts"),
    reads=_experts,
    says=_say,
)


def glm45() -> TransformerConfig:
    """GLM-4.5: 355 billion parameters, 32 billion of them active (Table 1 of the report)."""
    return TransformerConfig(
        vocab_size=151552,
        hidden_size=5120,
        num_layers=92,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=12288,
        rope_theta=1e6,
        norm_eps=1e-5,
        tie_embeddings=False,
        max_positions=131072,
        qkv_bias=True,
        qk_norm=True,
        rotary_fraction=0.5,
        experts=ExpertsConfig(count=160, chosen=8, width=1536, shared=1, dense_layers=3, scale=2.5),
        mtp_layers=1,
    )


def glm45_air() -> TransformerConfig:
    """GLM-4.5-Air: 106 billion parameters, 12 billion of them active (Table 1 of the report)."""
    return TransformerConfig(
        vocab_size=151552,
        hidden_size=4096,
        num_layers=46,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=10944,
        rope_theta=1e6,
        norm_eps=1e-5,
        tie_embeddings=False,
        max_positions=131072,
        qkv_bias=True,
        rotary_fraction=0.5,
        experts=ExpertsConfig(count=128, chosen=8, width=1408, shared=1, dense_layers=1),
        mtp_layers=1,
    )
