"""The entries of a GGUF file as a configuration; an absent entry means what it means to llama.cpp."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl_llm.models.architectures import ARCHITECTURES
from jaxrl_llm.models.architectures import GLM4_MOE
from jaxrl_llm.models.architectures import QWEN3_MOE
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from

SUPPORTED = tuple(dict.fromkeys(architecture.gguf for architecture in ARCHITECTURES))
EMBEDDING = "token_embd.weight"
SOFTMAX, SIGMOID = 1, 2
"""What llama.cpp's `expert_gating_func` may be of those that are computed here."""

UNSCALED = (
    "attention.scale",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
"""Entries of other architectures that would change the mathematics; they are absent or 0 in those read here."""


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, source: str
) -> TransformerConfig:
    """The configuration that the entries of a GGUF file describe.

    Args:
        metadata: the entries.
        shapes: of the tensors.
        source: what error sentences call the file.

    Raises:
        ModelFileError: one part of several, another architecture, a variant that is not computed here, or sizes that
            are missing or impossible.
    """
    _refuse_parts(metadata, source)
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED:
        raise ModelFileError(
            f"{source} has the architecture {architecture!r:.80}; supported are {', '.join(SUPPORTED)}."
        )
    entries = _Entries(metadata, architecture, source)
    sparse = architecture in (QWEN3_MOE.gguf, GLM4_MOE.gguf)
    if entries.integer("expert_count", 0) and not sparse:
        raise ModelFileError(
            f"{source} is a mixture of {entries.integer('expert_count')} experts; of the architecture {architecture} "
            "dense models are supported."
        )
    _refuse_variants(entries)
    heads, width = entries.integer("attention.head_count"), entries.integer("embedding_length")
    if not 0 < heads <= width:
        raise ModelFileError(f"{source} has {heads} heads for {width} channels; expected at least one, and no more.")
    head_dim = entries.integer("attention.key_length", width // heads)
    rotated = entries.integer("rope.dimension_count", head_dim)
    values = entries.integer("attention.value_length", width // heads)
    if rotated != head_dim and architecture != GLM4_MOE.gguf:
        raise ModelFileError(f"{source} rotates {rotated} of {head_dim} elements; supported is all.")
    if values != head_dim:
        raise ModelFileError(f"{source} has values of {values} of {head_dim} elements; supported is all.")
    table = shapes.get(EMBEDDING)
    if table is None or len(table) != 2:
        raise ModelFileError(f"{source} has no tensor token_embd.weight with two axes.")
    if entries.integer("vocab_size", table[0]) != table[0]:
        raise ModelFileError(
            f"{source} says vocab_size is {entries.integer('vocab_size')}; token_embd.weight has {table[0]} rows."
        )
    with read_from(source):
        config = TransformerConfig(
            vocab_size=table[0],
            hidden_size=width,
            num_layers=entries.integer("block_count") - entries.integer("nextn_predict_layers", 0),
            num_heads=heads,
            num_kv_heads=entries.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=entries.integer("feed_forward_length"),
            rope_theta=_decimal(entries.number("rope.freq_base", 10_000.0)),
            norm_eps=_decimal(entries.number("attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in shapes,
            max_positions=entries.integer("context_length"),
            qkv_bias=architecture == "qwen2" or (sparse and "blk.0.attn_q.bias" in shapes),
            qk_norm=architecture == "qwen3" or (sparse and "blk.0.attn_q_norm.weight" in shapes),
            rotary_fraction=rotated / head_dim,
            experts=_experts(entries) if sparse else None,
            mtp_layers=entries.integer("nextn_predict_layers", 0),
        )
    if not any(one.gguf == architecture and one.describes(config) for one in ARCHITECTURES):
        raise ModelFileError(f"{source} has entries that no model of the architecture {architecture} has: {config}.")
    return config


def _experts(entries: "_Entries") -> ExpertsConfig:
    of_glm = entries.architecture == GLM4_MOE.gguf
    gating = entries.integer("expert_gating_func", SIGMOID if of_glm else SOFTMAX)
    if gating != (SIGMOID if of_glm else SOFTMAX):
        raise ModelFileError(f"{entries.source} says expert_gating_func is {gating}; supported is that of its family.")
    if entries.integer("expert_group_count", 1) > 1:
        raise ModelFileError(f"{entries.source} has groups of experts; supported is one group.")
    normalised = entries.get("expert_weights_norm", not of_glm)
    if not of_glm and not normalised:
        raise ModelFileError(f"{entries.source} says not to normalise weights, which llama.cpp does for this family.")
    shared = entries.integer("expert_shared_count", 0)
    return ExpertsConfig(
        count=entries.integer("expert_count"),
        chosen=entries.integer("expert_used_count"),
        width=entries.integer("expert_feed_forward_length"),
        shared=shared,
        dense_layers=entries.integer("leading_dense_block_count", 0),
        scores="sigmoid" if of_glm else "softmax",
        bias=of_glm,
        normalise=normalised is True,
        scale=_decimal(entries.number("expert_weights_scale", 1.0)),
    )


def expert_entries(config: TransformerConfig) -> dict[str, Any]:
    """The entries of a model's experts, and of its layers for further tokens.

    Raises:
        ValueError: routers that llama.cpp has not.
    """
    experts = config.experts
    if experts is None:
        return {}
    if experts.groups > 1:
        raise ValueError(f"experts in {experts.groups} groups cannot be written as GGUF; llama.cpp has no groups.")
    if experts.scores == "softmax" and not experts.normalise:
        raise ValueError("llama.cpp normalises the weights of Qwen3's experts; those of this model are not.")
    return {
        "expert_count": experts.count,
        "expert_used_count": experts.chosen,
        "expert_feed_forward_length": experts.width,
        "expert_shared_count": experts.shared,
        "leading_dense_block_count": experts.dense_layers,
        "expert_gating_func": SIGMOID if experts.scores == "sigmoid" else SOFTMAX,
        "expert_weights_norm": experts.normalise,
        "expert_weights_scale": float(experts.scale),
        "nextn_predict_layers": config.mtp_layers,
    }


class _Entries:
    """The entries of one architecture, by name and type."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
        self.metadata, self.architecture, self.source = metadata, architecture, source

    def get(self, name: str, default: Any = None) -> Any:
        """The entry or the default; an entry given per layer counts where all layers agree."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            raise ModelFileError(f"{self.source} lacks the entry {self.architecture}.{name}.")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._unexpected(name, value, "a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._unexpected(name, value, "a finite number")
        return float(value)

    def _unexpected(self, name: str, value: Any, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{self.source} says {self.architecture}.{name} is {value!r:.80}; expected {expected} for all layers."
        )


def _refuse_parts(metadata: Mapping[str, Any], source: str) -> None:
    """Raise for one file of several: the tensors of the others are not in it."""
    count = metadata.get("split.count", 0)
    if count not in (0, 1):
        number = metadata.get("split.no")
        part = number + 1 if isinstance(number, int) else "one"
        raise ModelFileError(
            f"{source} is part {part} of {count!r:.80}; join the parts (llama-gguf-split --merge) and load the whole."
        )


def _refuse_variants(entries: _Entries) -> None:
    """Raise for entries that change the mathematics in a way that is not computed here.

    A file that names no kind of scaling of rotary positions has, to llama.cpp, a linear one, by `rope.scaling.factor`
    or by the older `rope.scale_linear`; a factor of 0 or 1 is none.
    """
    kind = entries.get("rope.scaling.type", "linear")
    older = entries.number("rope.scale_linear", 0.0)
    factor = entries.number("rope.scaling.factor", older)
    if kind != "none" and (kind != "linear" or factor not in (0.0, 1.0)):
        given = "" if factor == 0.0 else f" by {factor:g}"
        raise ModelFileError(f"{entries.source} scales rotary positions ({kind!s:.40}){given}, which is not supported.")
    for name in UNSCALED:
        if entries.get(name, 0) not in (0, False):
            key = f"{entries.architecture}.{name}"
            raise ModelFileError(f"{entries.source} sets {key} to {entries.get(name)!r:.80}, which is not supported.")
    if entries.get("attention.causal", True) is not True:
        raise ModelFileError(f"{entries.source} attends to later tokens; supported is causal attention.")


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
