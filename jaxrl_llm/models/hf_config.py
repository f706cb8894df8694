"""config.json of a Hugging Face folder and the configuration of the transformer, both ways."""

from collections.abc import Mapping
from typing import Any

from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig

Settings = Mapping[str, Any]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures that are read, with their `model_type`."""

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_hf(settings: Settings, *, source: str = "config.json") -> TransformerConfig:
    """The configuration that a config.json describes; `source` names the file in error sentences.

    Raises:
        ValueError: another architecture, a missing size, or a variant (sliding window, quantisation, ...) that is not
            computed here.
    """
    model_type = _model_type(settings, source)
    missing = [name for name in REQUIRED if settings.get(name) is None]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}.")
    _refuse_variants(settings, model_type, source)
    rope, theta = _rope(settings, source)
    heads = settings["num_attention_heads"]
    return TransformerConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        intermediate_size=settings["intermediate_size"],
        rope_theta=theta,
        norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        max_positions=settings.get("max_position_embeddings", 2048),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        rope_scaling=rope,
    )


def config_to_hf(config: TransformerConfig, *, dtype: str) -> dict[str, Any]:
    """The config.json of a model, readable by transformers 4 and 5.

    Args:
        config: the model's configuration.
        dtype: of the saved weights, such as "float32".

    Raises:
        ValueError: biases together with query-key norms, which none of the architectures has.
    """
    architecture = architecture_of(config)
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    settings = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "attention_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.rope_scaling is not None:
        settings["rope_scaling"] = rope
    return settings


def architecture_of(config: TransformerConfig) -> str:
    """The architecture a configuration belongs to.

    Raises:
        ValueError: biases together with query-key norms.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("qkv_bias and qk_norm are both set; no architecture of Hugging Face or llama.cpp has both.")
    if config.qkv_bias:
        return "Qwen2ForCausalLM"
    return "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"


def _model_type(settings: Settings, source: str) -> str:
    """The `model_type` of a supported architecture."""
    named = settings.get("architectures") or []
    known = [ARCHITECTURES[name] for name in named if name in ARCHITECTURES]
    if not named and settings.get("model_type") in ARCHITECTURES.values():
        known = [settings["model_type"]]
    if not known:
        found = ", ".join(named) or settings.get("model_type") or "no architecture"
        raise ValueError(f"{source} names {found}; supported are {', '.join(ARCHITECTURES)}.")
    return known[0]


def _refuse_variants(settings: Settings, model_type: str, source: str) -> None:
    """Raise for settings that change the mathematics in a way that is not computed here."""
    if settings.get("quantization_config") is not None:
        method = settings["quantization_config"].get("quant_method", "unnamed")
        raise ValueError(f"{source} describes weights quantised by {method}; expected float weights.")
    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name):
            raise ValueError(f"{source} sets {name}; biases are supported for Qwen2's queries, keys and values only.")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{source} says hidden_act is {settings['hidden_act']}; supported is silu.")
    window = settings.get("sliding_window")
    if model_type in ("qwen2", "qwen3") and not settings.get("use_sliding_window", False):
        window = None
    if window is not None and window < settings.get("max_position_embeddings", 2048):
        raise ValueError(
            f"{source} sets a sliding_window of {window} positions; supported is attention to all of them."
        )


def _rope(settings: Settings, source: str) -> tuple[RopeScaling | None, float]:
    """Scaling and base of the rotary positions, from the entries of transformers 5 or of transformers 4."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor")) or 1.0
    if part != 1.0:
        raise ValueError(f"{source} rotates the fraction {part} of each head; supported is 1.")
    if kind == "default":
        return None, theta
    if kind != "llama3":
        raise ValueError(f"{source} scales rotary positions by {kind!r}; supported are 'default' and 'llama3'.")
    scaling = RopeScaling(
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
    )
    return scaling, theta
