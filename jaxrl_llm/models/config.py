"""What distinguishes one Llama-family decoder from another, as data."""

from dataclasses import dataclass
from dataclasses import field
from typing import Literal

from jaxrl_llm.checks import LATER

LARGEST_SIZE = 2**31 - 1
"""Of anything that is counted: positions and token ids are 32-bit integers."""
LARGEST_FACTOR = 1e6
"""By which rotary wavelengths are stretched."""
LARGEST_NUMBER = 1e30
"""Of a constant; in float32 it leaves room for a product."""


def _check_size(name: str, size: object) -> None:
    """Raise a ValueError unless `size` is a whole number that can count something."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r:.80}")
    if size > LARGEST_SIZE:
        raise ValueError(f"{name} must be at most {LARGEST_SIZE}, got {size:.3g}")


def _check_number(name: str, value: object, *, largest: float) -> None:
    """Raise a ValueError unless `value` is a number above 0 and at most `largest`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r:.80}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:g}, got {value!r:.80}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the rotary wavelengths to a longer context.

    Wavelengths above `original_max_positions / low_frequency_factor` grow by `factor`, those below
    `original_max_positions / high_frequency_factor` stay, and those between are interpolated linearly in frequency.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _check_size("original_max_positions", self.original_max_positions)
        _check_number("factor", self.factor, largest=LARGEST_FACTOR)
        if self.factor < 1:
            raise ValueError(f"factor stretches the wavelengths and must be at least 1, got {self.factor}")
        _check_number("high_frequency_factor", self.high_frequency_factor, largest=LARGEST_FACTOR)
        if not isinstance(self.low_frequency_factor, int | float):
            raise ValueError(f"low_frequency_factor must be a number, got {self.low_frequency_factor!r:.80}")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "low_frequency_factor must be positive and below high_frequency_factor, got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The experts of the layers that have some.

    Attributes:
        count: E, experts of a layer.
        chosen: k, experts of each token.
        width: of the inner layer of an expert.
        shared: experts that every token goes through beside those; they lie as one of `shared` times the width.
        dense_layers: layers from the bottom that have none.
        scores: what the router makes of its logits.
        bias: whether a bias is added to the scores where experts are chosen.
        normalise: whether the weights of a token's experts are divided by their sum.
        scale: by which the weights are multiplied.
        groups: neighbouring experts in groups of E / groups, of which some are left out before experts are chosen.
        chosen_groups: groups that are not left out.

    Raises:
        ValueError: for numbers that do not go together, naming the field.
    """

    count: int
    chosen: int
    width: int
    shared: int = 0
    dense_layers: int = 0
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    bias: bool = True
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("count", "chosen", "width", "groups", "chosen_groups"):
            _check_size(f"experts.{name}", vars(self)[name])
        for name in ("shared", "dense_layers"):
            if vars(self)[name] != 0:
                _check_size(f"experts.{name}", vars(self)[name])
        if self.scores not in ("sigmoid", "softmax"):
            raise ValueError(f"experts.scores must be 'sigmoid' or 'softmax', got {self.scores!r:.80}")
        _check_number("experts.scale", self.scale, largest=LARGEST_NUMBER)
        if self.count % self.groups or (self.groups > 1 and self.count // self.groups < 2):
            raise ValueError(
                f"experts.groups must divide experts.count into groups of two or more, got {self.groups} groups of "
                f"{self.count} experts"
            )
        if self.chosen_groups > self.groups:
            raise ValueError(
                f"experts.chosen_groups must be at most experts.groups, got {self.chosen_groups} of {self.groups}"
            )
        there = self.count // self.groups * self.chosen_groups
        if self.chosen > there:
            raise ValueError(f"experts.chosen must be at most the {there} to choose from, got {self.chosen}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and constants of a decoder with rotary positions, grouped-query attention and a SwiGLU feed-forward.

    `qkv_bias` adds the biases of Qwen2, `qk_norm` the per-head norms of Qwen3. Queries of `num_heads / num_kv_heads`
    neighbouring heads share one key-value head. The first `rotary_fraction` of a head's elements turn with the
    position. With `experts`, the layers from `experts.dense_layers` on have experts in place of the feed-forward of
    `intermediate_size`. `mtp_layers` more layers behind the last one predict the tokens after the next one.

    Raises:
        ValueError: for sizes that no decoder can have, naming the field.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 2048
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = field(default=1.0, metadata=LATER)
    experts: ExpertsConfig | None = field(default=None, metadata=LATER)
    mtp_layers: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_positions",
        )
        for name in sizes:
            _check_size(name, vars(self)[name])
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} query heads "
                f"for {self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even because rotary positions turn pairs, got {self.head_dim}")
        for name in ("rope_theta", "norm_eps"):
            _check_number(name, vars(self)[name], largest=LARGEST_NUMBER)
        _check_number("rotary_fraction", self.rotary_fraction, largest=1.0)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction must leave an even number of elements that turn, got {self.rotary_fraction:g} of "
                f"{self.head_dim}"
            )
        if self.mtp_layers != 0:
            _check_size("mtp_layers", self.mtp_layers)
        if self.experts is not None and self.experts.dense_layers >= self.num_layers:
            raise ValueError(
                f"experts.dense_layers must be below num_layers, got {self.experts.dense_layers} of {self.num_layers}"
            )

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that turn with the position."""
        return round(self.head_dim * self.rotary_fraction)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer >= self.experts.dense_layers


def smollm2_135m() -> TransformerConfig:
    """SmolLM2-135M: 134,515,008 parameters."""
    return TransformerConfig(
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
    )


def tiny(
    *,
    vocab_size: int = 64,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    intermediate_size: int = 64,
    max_positions: int = 256,
    tie_embeddings: bool = True,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    rotary_fraction: float = 1.0,
    experts: ExpertsConfig | None = None,
) -> TransformerConfig:
    """A decoder that compiles in a second, for tests and quick looks."""
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_positions=max_positions,
        tie_embeddings=tie_embeddings,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rotary_fraction=rotary_fraction,
        experts=experts,
    )
