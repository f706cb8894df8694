"""What distinguishes one architecture of Hugging Face from another in its files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.architectures.entries import Entries
from jaxrl_llm.models.config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What transformers takes where a config.json says nothing; None for what follows from the other entries."""

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-6
    partial_rotary_factor: float = 1.0


def plain(config: TransformerConfig) -> bool:
    """No experts, heads that turn whole, no layer for further tokens."""
    return config.experts is None and config.rotary_fraction == 1 and not config.mtp_layers


def _nothing(entries: Entries) -> dict[str, Any]:
    return {}


def _nothing_to_say(config: TransformerConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Another architecture over the same layers is one of these, in a file of its own.

    Attributes:
        name: of the class in transformers.
        model_type: in config.json.
        describes: whether a configuration is of this architecture.
        gguf: its name in GGUF files.
        defaults: of absent entries.
        own: entries that it alone reads, refused in others where they change anything.
        reads: fields of the configuration beyond those that all architectures have.
        says: entries of config.json for these fields.
        windows: whether a sliding window counts only where `use_sliding_window` says so.
    """

    name: str
    model_type: str
    describes: Callable[[TransformerConfig], bool]
    gguf: str
    defaults: Defaults = Defaults()
    own: tuple[str, ...] = ()
    reads: Callable[[Entries], dict[str, Any]] = _nothing
    says: Callable[[TransformerConfig], dict[str, Any]] = _nothing_to_say
    windows: bool = False
