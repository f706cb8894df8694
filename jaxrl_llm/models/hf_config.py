"""config.json of a Hugging Face folder and the configuration of the transformer, both ways."""

import json
from typing import Any

from jaxrl_llm.models.architectures import ARCHITECTURES
from jaxrl_llm.models.architectures import Architecture
from jaxrl_llm.models.architectures import Entries
from jaxrl_llm.models.architectures.entries import Settings
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


LAYER_TYPES = ("full_attention", "sliding_attention")

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), (None,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "attention_chunk_size", "clip_qkv"), (None,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1.0, None)),
    **dict.fromkeys(("scale_emb", "rotary_pct", "rotary_emb_fraction"), (1.0, None)),
    **dict.fromkeys(("rope_interleave", "rope_interleaved", "alibi", "use_alibi"), (False, None)),
    **dict.fromkeys(("use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"), (False, None)),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "num_kv_shared_layers"), (None, 0, [])),
    **dict.fromkeys(("pruned_heads",), ({}, None)),
    **dict.fromkeys(("is_causal",), (True, None)),
    **dict.fromkeys(("hidden_activation",), ("silu", None)),
    **dict.fromkeys(("attention_bias", "mlp_bias"), (False, None)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (None, 0)),
}
"""Entries that change what a model of this family computes, in transformers or in the program that wrote them, with the
values under which they change nothing; an absent entry changes nothing either."""


def config_from_hf(settings: Settings, *, source: str = "config.json") -> TransformerConfig:
    """The configuration that a config.json describes; `source` names the file in error sentences.

    An absent entry means what it means to transformers for that model type (`Architecture.defaults`).

    Raises:
        ModelFileError: another architecture, a missing size, an entry of another type, a size that no model can have,
            or a variant (sliding window, quantisation, ...) that is not computed here.
    """
    entries = Entries(settings, source)
    architecture = _architecture(entries)
    missing = [name for name in REQUIRED if settings.get(name) is None]
    if missing:
        raise ModelFileError(f"{source} lacks {', '.join(missing)}.")
    default = architecture.defaults
    _refuse_variants(entries, architecture)
    rope, theta, fraction = _rope(entries, architecture)
    heads, width = entries.integer("num_attention_heads"), entries.integer("hidden_size")
    if not 0 < heads <= width:
        raise ModelFileError(f"{source} has {heads} heads for {width} channels; expected at least one, and no more.")
    per_head = default.head_dim if "head_dim" not in settings and default.head_dim else width // heads
    with read_from(source):
        return TransformerConfig(
            vocab_size=entries.integer("vocab_size"),
            hidden_size=width,
            num_layers=entries.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=entries.integer("num_key_value_heads", default.num_key_value_heads or heads, null=heads),
            head_dim=entries.integer("head_dim", per_head, null=width // heads),
            intermediate_size=entries.integer("intermediate_size"),
            rope_theta=theta,
            norm_eps=entries.number("rms_norm_eps", default.rms_norm_eps),
            tie_embeddings=entries.truth("tie_word_embeddings", False),
            max_positions=entries.integer("max_position_embeddings", default.max_position_embeddings),
            rope_scaling=rope,
            rotary_fraction=fraction,
            **architecture.reads(entries),
        )


def config_to_hf(config: TransformerConfig, *, dtype: str) -> dict[str, Any]:
    """The config.json of a model, readable by transformers 4 and 5.

    Args:
        config: the model's configuration.
        dtype: of the saved weights, such as "float32".

    Raises:
        ValueError: parts that no architecture has together.
    """
    architecture = architecture_of(config)
    rope: dict[str, Any] = {"rope_type": "default"}
    partial = {} if config.rotary_fraction == 1 else {"partial_rotary_factor": config.rotary_fraction}
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
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
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
        "rope_parameters": {"rope_theta": config.rope_theta, **rope, **partial},
        "attention_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        **architecture.says(config),
    }
    if config.rope_scaling is not None:
        settings["rope_scaling"] = rope
    return settings


def architecture_of(config: TransformerConfig) -> Architecture:
    """The architecture a configuration belongs to.

    Raises:
        ValueError: there is none that has these parts together.
    """
    for architecture in ARCHITECTURES:
        if architecture.describes(config):
            return architecture
    if config.experts is None and config.qkv_bias and config.qk_norm:
        raise ValueError("qkv_bias and qk_norm are both set; no architecture of Hugging Face or llama.cpp has both.")
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ValueError(f"the parts of this model go together in none of {names}; got {config}.")


def _architecture(entries: Entries) -> Architecture:
    """The supported architecture; where `architectures` and `model_type` are both there they must agree, as
    transformers goes by the first and we cannot know which is meant.
    """
    settings, named = entries.settings, entries.settings.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise entries.unexpected("architectures", "a list of names", named)
    own = settings.get("model_type")
    known = [one for one in ARCHITECTURES if not named or one.name in named]
    if own is not None or not named:
        known = [one for one in known if one.model_type == own]
    if not known:
        given = [*named, *([f"model_type {own!s:.80}"] if named and own is not None else [])]
        found = ", ".join(given) or own or "no architecture"
        names = ", ".join(one.name for one in ARCHITECTURES)
        raise ModelFileError(f"{entries.source} names {found!s:.200}; supported are {names}.")
    return known[0]


def _refuse_variants(entries: Entries, architecture: Architecture) -> None:
    """Raise for settings that change the mathematics in a way that is not computed here."""
    settings, source = entries.settings, entries.source
    if settings.get("quantization_config") is not None:
        quantised = entries.part("quantization_config")
        method = "unnamed" if quantised is None else quantised.settings.get("quant_method", "unnamed")
        raise ModelFileError(f"{source} describes weights quantised by {method!s:.80}; expected float weights.")
    for name, neutral in NEUTRAL.items():
        if name in settings and name not in architecture.own and settings[name] not in neutral:
            raise ModelFileError(
                f"{source} sets {name} to {settings[name]!r:.80}, which is not computed here; supported is "
                f"{' or '.join(json.dumps(value) for value in neutral)}."
            )
    kinds = settings.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise entries.unexpected("layer_types", "a list", kinds)
    unknown = next((kind for kind in kinds or () if kind not in LAYER_TYPES), None)
    if unknown is not None:
        raise ModelFileError(f"{source} has a layer of type {unknown!s:.80}; supported are {', '.join(LAYER_TYPES)}.")
    if settings.get("hidden_act", "silu") != "silu":
        raise ModelFileError(f"{source} says hidden_act is {settings['hidden_act']!s:.80}; supported is silu.")
    if settings.get("sliding_window", architecture.defaults.sliding_window) is not None:
        _refuse_window(entries, architecture)


def _refuse_window(entries: Entries, architecture: Architecture) -> None:
    """Raise for a window that some layer looks through and that is shorter than the longest text."""
    default = architecture.defaults
    window = entries.integer("sliding_window", default.sliding_window)
    kinds = entries.settings.get("layer_types")
    sliding = entries.truth("use_sliding_window", False) if architecture.windows else True
    if architecture.windows and kinds is not None:
        sliding = any(kind != "full_attention" for kind in kinds)
    if sliding and window < entries.integer("max_position_embeddings", default.max_position_embeddings):
        raise ModelFileError(
            f"{entries.source} sets a sliding_window of {window} positions; supported is attention to all of them."
        )


def _rope(entries: Entries, architecture: Architecture) -> tuple[RopeScaling | None, float, float]:
    """Scaling and base of the rotary positions and the share of a head that turns, as transformers 5 or 4 say it."""
    source = entries.source
    rope = entries.part("rope_parameters") or entries.part("rope_scaling") or Entries({}, source)
    theta = rope.number("rope_theta", entries.settings.get("rope_theta", 10_000.0))
    usual = architecture.defaults.partial_rotary_factor
    given = rope.settings.get("partial_rotary_factor", entries.settings.get("partial_rotary_factor"))
    fraction = (
        usual if given is None else Entries({"partial_rotary_factor": given}, source).number("partial_rotary_factor")
    )
    if fraction != 1.0 and "partial_rotary_factor" not in architecture.own:
        raise ModelFileError(f"{source} rotates the fraction {given!s:.80} of each head; supported is 1.")
    kind = rope.settings.get("rope_type", rope.settings.get("type"))
    if kind is None and set(rope.settings) - {"rope_theta", "partial_rotary_factor"}:
        raise ModelFileError(f"{source} scales rotary positions without saying how (rope_type).")
    if kind in (None, "default"):
        return None, theta, fraction
    if kind != "llama3":
        raise ModelFileError(f"{source} scales rotary positions by {kind!r:.80}; supported are 'default' and 'llama3'.")
    with read_from(source):
        scaling = RopeScaling(
            factor=rope.number("factor"),
            low_frequency_factor=rope.number("low_freq_factor"),
            high_frequency_factor=rope.number("high_freq_factor"),
            original_max_positions=rope.integer("original_max_position_embeddings"),
        )
    return scaling, theta, fraction
