"""The parts of a decoder block: norm, rotary positions, grouped-query attention, SwiGLU.

Each part that holds parameters says which tensors hold them in checkpoints (`stored`): formats, sizes and costs are
derived from that (`models.blueprint`), so a block lists its parts once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.context import Context
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.numerics import at_least_float32
from jaxrl_llm.models.numerics import matrix_product
from jaxrl_llm.models.stored_parts import Stored
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""

    def __init__(self, size: int, eps: float, numerics: Numerics, *, name: str = ""):
        self.scale = nnx.Param(jnp.ones((size,), numerics.param_dtype), logical_axes=("norm",))
        self.eps, self.name = eps, name

    def stored(self) -> tuple[Stored, ...]:
        """Its scale."""
        return (Stored(self.scale, (f"{self.name}.weight",)),)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise; computed in float32, returned in the dtype of x."""
        wide = at_least_float32(x)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...].astype(wide.dtype)).astype(x.dtype)


class LowRank(nnx.Module):
    """The low-rank update scaling * x @ a @ b of a dense product; zero at the start because b is.

    LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1: a is normal, b zero, scaling = alpha / rank. Kept in float32.
    """

    def __init__(self, axes: tuple[str, ...], sizes: tuple[int, ...], rank: int, scaling: float, key: Array):
        *outer, inputs, outputs = sizes
        a = inputs**-0.5 * jax.random.normal(key, (*outer, inputs, rank), jnp.float32)
        self.a = nnx.Param(a, logical_axes=(*axes[:-1], "rank"))
        self.b = nnx.Param(jnp.zeros((*outer, rank, outputs), jnp.float32), logical_axes=(*axes[:-2], "rank", axes[-1]))
        self.scaling = scaling

    def __call__(self, x: Float[Array, "*batch I"], numerics: Numerics) -> Float[Array, "*batch O"]:
        """Apply the update."""
        return self.scaling * matrix_product(matrix_product(x, self.a[...], numerics), self.b[...], numerics)

    def dense(self) -> Float[Array, "*E I O"]:
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
        name: str = "",
    ):
        kernel = gain * sizes[0] ** -0.5 * jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(numerics.param_dtype), logical_axes=axes)
        bias = nnx.Param(jnp.zeros(sizes[1:], numerics.param_dtype), logical_axes=axes[1:]) if use_bias else None
        self.bias = nnx.data(bias)
        self.low_rank: LowRank | None = nnx.data(None)
        self.numerics, self.name = numerics, name

    def stored(self) -> tuple[Stored, ...]:
        """Kernel and bias."""
        bias = () if self.bias is None else (Stored(self.bias, (f"{self.name}.bias",)),)
        return (Stored(self.kernel, (f"{self.name}.weight",), transposed=True), *bias)

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The product in the compute dtype."""
        y = matrix_product(x, self.kernel[...], self.numerics)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.low_rank is not None:
            y = y + self.low_rank(x, self.numerics)
        return y


def rotary_frequencies(config: TransformerConfig) -> Float[Array, " half"]:
    """Angle per position of each pair [radian]: theta^(-2i / r) for the r elements of a head that turn, stretched by
    `rope_scaling` if there is one.
    """
    exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
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
        """Turn the pairs (x_i, x_{i + r/2}) of the first r elements; float32 inside, the dtype of x outside."""
        cosine, sine = self
        half = cosine.shape[-1]
        wide = at_least_float32(x)
        first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, numerics: Numerics, rngs: nnx.Rngs):
        width, query = config.hidden_size, config.num_heads * config.head_dim
        memory, bias = config.num_kv_heads * config.head_dim, config.qkv_bias

        def linear(size: int, axis: str, name: str) -> Linear:
            name = f"self_attn.{name}_proj"
            return Linear((width, size), ("hidden", axis), numerics, rngs, use_bias=bias, name=name)

        def norm(name: str) -> RMSNorm | None:
            return RMSNorm(config.head_dim, config.norm_eps, numerics, name=name) if config.qk_norm else None

        self.query = linear(query, "heads", "q")
        self.key, self.value = linear(memory, "kv_heads", "k"), linear(memory, "kv_heads", "v")
        gain = (2 * config.num_layers) ** -0.5
        self.output = Linear((query, width), ("heads", "hidden"), numerics, rngs, gain=gain, name="self_attn.o_proj")
        self.query_norm, self.key_norm = nnx.data(norm("self_attn.q_norm")), nnx.data(norm("self_attn.k_norm"))
        self.head_dim = config.head_dim
        self.numerics = numerics

    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, context: Context
    ) -> tuple[Float[Array, "B T D"], Context]:
        """Attend to what the context holds once x is in it."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], -1, self.head_dim) for linear in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed, context = context.attend(rotation(query), rotation(key), value, self.numerics)
        return self.output(mixed.reshape(*x.shape[:2], -1)), context


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, inner: int, numerics: Numerics, rngs: nnx.Rngs, *, name: str):
        width, gain = config.hidden_size, (2 * config.num_layers) ** -0.5
        inward, outward = ("hidden", "intermediate"), ("intermediate", "hidden")
        self.gate = Linear((width, inner), inward, numerics, rngs, name=f"{name}.gate_proj")
        self.up = Linear((width, inner), inward, numerics, rngs, name=f"{name}.up_proj")
        self.down = Linear((inner, width), outward, numerics, rngs, gain=gain, name=f"{name}.down_proj")

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Apply the gated feed-forward."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
