"""The parts of a decoder block: norm, rotary positions, grouped-query attention, SwiGLU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend
from jaxrl_llm.models.attention import grouped_query_attention
from jaxrl_llm.models.cache import LayerCache
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class Numerics(NamedTuple):
    """Dtype of the parameters and dtype of the products; norms, rotations and softmax are never below float32.

    `attention` names the implementation of `models.attention.attend`; None: the one that `choose` says.
    """

    param_dtype: jnp.dtype = jnp.dtype(jnp.float32)
    compute_dtype: jnp.dtype = jnp.dtype(jnp.float32)
    attention: str | None = None

    @property
    def precision(self) -> jax.lax.Precision:
        """Of products: in float32 the full one, by name, since accelerators default to less."""
        narrow = self.compute_dtype.itemsize < 4
        return jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""

    def __init__(self, size: int, eps: float, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((size,), numerics.param_dtype), logical_axes=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise; computed in float32, returned in the dtype of x."""
        wide = at_least_float32(x)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...].astype(wide.dtype)).astype(x.dtype)


class LowRank(nnx.Module):
    """The low-rank update scaling * x @ a @ b of a dense product; zero at the start because b is.

    LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1: a is normal, b zero, scaling = alpha / rank. Kept in float32.
    """

    def __init__(self, axes: tuple[str, str], sizes: tuple[int, int], rank: int, scaling: float, key: Array):
        inputs, outputs = sizes
        self.a = nnx.Param(
            inputs**-0.5 * jax.random.normal(key, (inputs, rank), jnp.float32), logical_axes=(axes[0], "rank")
        )
        self.b = nnx.Param(jnp.zeros((rank, outputs), jnp.float32), logical_axes=("rank", axes[1]))
        self.scaling = scaling

    def __call__(self, x: Float[Array, "*batch I"], precision: jax.lax.Precision) -> Float[Array, "*batch O"]:
        """Apply the update in the dtype of x."""
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return self.scaling * jnp.matmul(jnp.matmul(x, a, precision=precision), b, precision=precision)

    def dense(self) -> Float[Array, "I O"]:
        """The update as one matrix, in float32."""
        return self.scaling * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)


class Linear(nnx.Module):
    """x @ kernel + bias with the kernel as [in, out]; `low_rank` holds an adapter when there is one."""

    def __init__(
        self,
        sizes: tuple[int, int],
        axes: tuple[str, str],
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = False,
        gain: float = 1.0,
    ):
        kernel = gain * sizes[0] ** -0.5 * jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(numerics.param_dtype), logical_axes=axes)
        bias = nnx.Param(jnp.zeros(sizes[1:], numerics.param_dtype), logical_axes=axes[1:]) if use_bias else None
        self.bias = nnx.data(bias)
        self.low_rank: LowRank | None = nnx.data(None)
        self.numerics = numerics

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The product in the compute dtype."""
        dtype, precision = self.numerics.compute_dtype, self.numerics.precision
        y = jnp.matmul(x, self.kernel[...].astype(dtype), precision=precision)
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype)
        if self.low_rank is not None:
            y = y + self.low_rank(x, precision)
        return y


def rotary_frequencies(config: TransformerConfig) -> Float[Array, " half"]:
    """Angle per position of each pair [radian]: theta^(-2i / head_dim), stretched by `rope_scaling` if there is one."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * jnp.pi)
    width = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = jnp.clip((turns - scaling.low_frequency_factor) / width, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles; computed once and shared by all layers."""

    cosine: Float[Array, "B T 1 half"]
    sine: Float[Array, "B T 1 half"]

    @classmethod
    def at(cls, positions: Int[Array, "B T"], config: TransformerConfig) -> "Rotation":
        """The rotation of the given positions, in float32."""
        angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
        return cls(jnp.cos(angles), jnp.sin(angles))

    def __call__(self, x: Float[Array, "B T H hd"]) -> Float[Array, "B T H hd"]:
        """Turn the pairs (x_i, x_{i + head_dim/2}); float32 inside, the dtype of x outside."""
        first, second = jnp.split(at_least_float32(x), 2, axis=-1)
        cosine, sine = self
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, numerics: Numerics, rngs: nnx.Rngs):
        width, query = config.hidden_size, config.num_heads * config.head_dim
        memory = config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        self.query = Linear((width, query), ("hidden", "heads"), numerics, rngs, use_bias=bias)
        self.key = Linear((width, memory), ("hidden", "kv_heads"), numerics, rngs, use_bias=bias)
        self.value = Linear((width, memory), ("hidden", "kv_heads"), numerics, rngs, use_bias=bias)
        gain = (2 * config.num_layers) ** -0.5
        self.output = Linear((query, width), ("heads", "hidden"), numerics, rngs, gain=gain)
        norms = [RMSNorm(config.head_dim, config.norm_eps, numerics) if config.qk_norm else None for _ in range(2)]
        self.query_norm, self.key_norm = nnx.data(norms[0]), nnx.data(norms[1])
        self.head_dim = config.head_dim
        self.numerics = numerics

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        sight: Bool[Array, "B T S"] | Visibility,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attend to what is in sight of x itself, or, by a mask of slots, of the cache after x was written to it."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], -1, self.head_dim) for linear in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotation(query), rotation(key)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if cache is not None:
            cache = cache.write(key, value)
            key, value = cache.keys, cache.values
        precision = self.numerics.precision
        if isinstance(sight, Visibility):
            chosen = self.numerics.attention
            mixed = attend(query, key, value, sight, precision=precision, implementation=chosen)
        else:
            mixed = grouped_query_attention(query, key, value, sight, precision)
        return self.output(mixed.reshape(*x.shape[:2], -1)), cache


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, numerics: Numerics, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear((width, inner), ("hidden", "intermediate"), numerics, rngs)
        self.up = Linear((width, inner), ("hidden", "intermediate"), numerics, rngs)
        gain = (2 * config.num_layers) ** -0.5
        self.down = Linear((inner, width), ("intermediate", "hidden"), numerics, rngs, gain=gain)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Apply the gated feed-forward."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, numerics)
        self.attention = Attention(config, numerics, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, numerics)
        self.mlp = SwiGLU(config, numerics, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        sight: Bool[Array, "B T S"] | Visibility,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Apply the layer; with a cache, also return it with x written to it."""
        mixed, cache = self.attention(self.attention_norm(x), rotation, sight, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache
