"""A BERT encoder that turns texts into vectors: embeddings, post-norm blocks, mean over real tokens, unit length."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.attention import grouped_query_attention
from jaxrl_llm.models.layers import Linear
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.numerics import at_least_float32
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

SMALLEST_NORM = 1e-12
"""Vectors shorter than this are divided by it instead of by their length, as sentence-transformers does."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and constants of a BERT encoder (Devlin et al. 2018, arXiv:1810.04805).

    Raises:
        ValueError: for sizes that no encoder can have, naming the field.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        for name in (*sizes, "token_types"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} for {self.num_heads} heads"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")


def minilm_l6() -> EncoderConfig:
    """MiniLM-L6-H384, the encoder of all-MiniLM-L6-v2: 22,565,376 parameters without its unused pooler."""
    return EncoderConfig(vocab_size=30522, hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536)


def tiny_encoder(*, vocab_size: int = 64) -> EncoderConfig:
    """An encoder that compiles in a second, for tests."""
    return EncoderConfig(
        vocab_size=vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=64
    )


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis."""

    def __init__(self, size: int, eps: float, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((size,), numerics.param_dtype), logical_axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((size,), numerics.param_dtype), logical_axes=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise; computed in float32, returned in the dtype of x."""
        wide = at_least_float32(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = centred * inverse * self.scale[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)
        return scaled.astype(x.dtype)


class EncoderBlock(nnx.Module):
    """norm(x + attention(x)), then norm(x + down(gelu(up(x)))): every token attends to every real one."""

    def __init__(self, config: EncoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        square, axes = (width, width), ("hidden", "heads")
        self.query = Linear(square, axes, numerics, rngs, use_bias=True)
        self.key = Linear(square, axes, numerics, rngs, use_bias=True)
        self.value = Linear(square, axes, numerics, rngs, use_bias=True)
        self.output = Linear(square, ("heads", "hidden"), numerics, rngs, use_bias=True)
        self.attention_norm = LayerNorm(width, config.norm_eps, numerics)
        self.up = Linear((width, inner), ("hidden", "intermediate"), numerics, rngs, use_bias=True)
        self.down = Linear((inner, width), ("intermediate", "hidden"), numerics, rngs, use_bias=True)
        self.mlp_norm = LayerNorm(width, config.norm_eps, numerics)
        self.num_heads = config.num_heads
        self.numerics = numerics

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T T"]) -> Float[Array, "B T D"]:
        """Apply the layer; mask[b, t, s]: token t may attend to token s."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.num_heads, -1) for linear in (self.query, self.key, self.value)
        )
        mixed = grouped_query_attention(
            query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, self.numerics.precision
        ).reshape(x.shape)
        x = self.attention_norm(x + self.output(mixed))
        # The exact Gaussian error linear unit, not its approximation by tanh.
        return self.mlp_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """Token, position and type embeddings, their norm, and the blocks.

    Parameters are `[in, out]`, as in `Transformer`; `models.sentences` reads them from a checkpoint.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype | type = jnp.float32,
        compute_dtype: jnp.dtype | type = jnp.float32,
    ):
        numerics = Numerics(jnp.dtype(param_dtype), jnp.dtype(compute_dtype))

        def table(rows: int) -> nnx.Param:
            values = 0.02 * jax.random.normal(rngs.params(), (rows, config.hidden_size), jnp.float32)
            return nnx.Param(values.astype(param_dtype), logical_axes=("vocabulary", "hidden"))

        self.config = config
        self.numerics = numerics
        self.embedding = table(config.vocab_size)
        self.positions = table(config.max_positions)
        self.types = table(config.token_types)
        self.embedding_norm = LayerNorm(config.hidden_size, config.norm_eps, numerics)
        self.layers = nnx.List([EncoderBlock(config, numerics, rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens: Int[Array, "B T"], token_mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Hidden states of a batch of right-padded texts; those of padding mean nothing.

        Args:
            tokens: token ids, all of the first type (one sentence).
            token_mask: which tokens are real.

        Raises:
            ValueError: more columns than there are positions, or a mask of another shape.
        """
        length = tokens.shape[-1]
        if length > self.config.max_positions:
            raise ValueError(f"tokens must have at most {self.config.max_positions} columns, got {length}")
        if token_mask.shape != tokens.shape:
            raise ValueError(f"token_mask must have the shape of tokens, {tokens.shape}, got {token_mask.shape}")
        x = self.embedding[...][tokens] + self.positions[...][None, :length] + self.types[...][None, :1]
        x = self.embedding_norm(x.astype(self.numerics.compute_dtype))
        mask = jnp.broadcast_to(token_mask[:, None, :], (tokens.shape[0], length, length))
        for layer in self.layers:
            x = layer(x, mask)
        return x


def mean_pooled(hidden: Float[Array, "B T D"], token_mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """v / |v| with v the mean of the hidden states of real tokens, in float32: one unit vector per text.

    As sentence-transformers' pooling by mean followed by normalisation (Reimers and Gurevych 2019, arXiv:1908.10084). A
    row without real tokens gives 0.
    """
    wide, weights = at_least_float32(hidden), token_mask[..., None]
    count = jnp.maximum(jnp.sum(weights, axis=1), 1)
    mean = jnp.sum(jnp.where(weights, wide, 0.0), axis=1) / count
    norm = jnp.sqrt(jnp.sum(jnp.square(mean), axis=-1, keepdims=True))
    return mean / jnp.maximum(norm, SMALLEST_NORM)
