"""One token for every row of a group-sampled batch, against a prompt cache that the group shares.

The trainer's modules compute a whole text at once. Here a step has B rows of one token, so its time goes into reading
weights and cache:

- `DecodeWeights` holds the model's own arrays where it can: adapters are merged and dtypes changed once per rollout,
  not once per step. (Joining the products that share an input would copy 279 MB of SmolLM2 per rollout; on a CPU it
  changed the time of a step by less than 2 %.)
- the keys and values of a prompt are kept once per prompt, not once per sample: the G samples of a prompt are G more
  rows of one product;
- keys lie as [.., head_dim, slots] and values as [.., slots, head_dim], so that both attention products read the cache
  as it lies;
- each layer's cache is its own array, written in place by the loop that carries it.

Products run in `DecodeWeights.dtype` and are summed in float32; the residual stream, norms, rotations and softmax are
float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import MASKED_SCORE
from jaxrl_llm.models.cache import KVCache
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.layers import Block
from jaxrl_llm.models.layers import Linear
from jaxrl_llm.models.layers import RMSNorm
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

ROW_AXES = ("batch", "activation")

SLOT_MULTIPLE = 16
"""Slots of the response cache come in multiples of this: one 512-bit register of float32."""


class Dense(NamedTuple):
    """A product with an optional bias."""

    kernel: Float[Array, "I O"]
    bias: Float[Array, " O"] | None

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        """x @ kernel + bias, summed and returned in float32 or wider."""
        y = product("bi,io->bo", _two_rows(x, self.kernel), self.kernel)[: x.shape[0]]
        return y if self.bias is None else y + self.bias


class DecodeLayer(NamedTuple):
    """One block's weights."""

    attention_norm: Float[Array, " D"]
    query: Dense
    key: Dense
    value: Dense
    query_norm: Float[Array, " hd"] | None
    key_norm: Float[Array, " hd"] | None
    output: Dense
    mlp_norm: Float[Array, " D"]
    gate: Dense
    up: Dense
    down: Dense


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWeights:
    """A view of a model's weights for decoding: the model's own arrays unless adapters or another dtype forbid it.

    Memory beyond the model's: the kernels that have adapters; in another dtype than the model's, all kernels and the
    head (269 MB for SmolLM2-135M in bfloat16).
    """

    embedding: Float[Array, "V D"]
    layers: tuple[DecodeLayer, ...]
    final_norm: Float[Array, " D"]
    head: Float[Array, "V D"] | Float[Array, "D V"]
    vocabulary_axis: int = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """Of the products and of the cache."""
        return self.head.dtype

    @classmethod
    def of(cls, model: Transformer, dtype: jnp.dtype | type | None = None) -> "DecodeWeights":
        """Merge and cast the weights of a model; `dtype` None keeps the model's compute dtype."""
        dtype = jnp.dtype(model.numerics.compute_dtype if dtype is None else dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        model = merge_lora(model)

        def scale(norm: RMSNorm) -> Array:
            return norm.scale[...].astype(wide)

        def dense(linear: Linear) -> Dense:
            return Dense(
                linear.kernel[...].astype(dtype), None if linear.bias is None else linear.bias[...].astype(wide)
            )

        def layer(block: Block) -> DecodeLayer:
            attention, mlp = block.attention, block.mlp
            return DecodeLayer(
                attention_norm=scale(block.attention_norm),
                query=dense(attention.query),
                key=dense(attention.key),
                value=dense(attention.value),
                query_norm=None if attention.query_norm is None else scale(attention.query_norm),
                key_norm=None if attention.key_norm is None else scale(attention.key_norm),
                output=dense(attention.output),
                mlp_norm=scale(block.mlp_norm),
                gate=dense(mlp.gate),
                up=dense(mlp.up),
                down=dense(mlp.down),
            )

        head, vocabulary_axis = model.head()
        layers = tuple(layer(block) for block in model.layers)
        return cls(model.embedding[...], layers, scale(model.final_norm), head.astype(dtype), vocabulary_axis)


class PromptCache(NamedTuple):
    """Keys and values of the prompts, once per prompt; only read."""

    keys: tuple[Float[Array, "N KV hd P"], ...]
    values: tuple[Float[Array, "N KV P hd"], ...]
    mask: Bool[Array, "N P"]

    @classmethod
    def of(cls, cache: KVCache, dtype: jnp.dtype) -> "PromptCache":
        """The cache that the model's prefill left, laid out for decoding."""
        return cls(
            keys=tuple(keys.astype(dtype).swapaxes(2, 3) for keys in cache.keys),
            values=tuple(values.astype(dtype) for values in cache.values),
            mask=cache.slot_mask,
        )


class ResponseCache(NamedTuple):
    """Keys and values of what each row sampled; slot t holds its token number t."""

    keys: tuple[Float[Array, "B KV hd R"], ...]
    values: tuple[Float[Array, "B KV R hd"], ...]

    @classmethod
    def empty(cls, config: TransformerConfig, rows: int, slots: int, dtype: jnp.dtype) -> "ResponseCache":
        """No tokens yet, and room for `slots` tokens or a few more: rows of whole vector registers are read faster."""
        heads, size, layers = config.num_kv_heads, config.head_dim, range(config.num_layers)
        slots = max(slots + -slots % SLOT_MULTIPLE, SLOT_MULTIPLE)
        return cls(
            keys=tuple(jnp.zeros((rows, heads, size, slots), dtype) for _ in layers),
            values=tuple(jnp.zeros((rows, heads, slots, size), dtype) for _ in layers),
        )


def decode_step(
    config: TransformerConfig,
    weights: DecodeWeights,
    tokens: Int[Array, " B"],
    slot: Int[Array, ""],
    prompt: PromptCache,
    response: ResponseCache,
    cache_rounding: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "B D"], ResponseCache]:
    """Read one token per row.

    Args:
        config: of the model.
        weights: of `DecodeWeights.of`.
        tokens: the tokens that were sampled last, row = prompt * G + sample.
        slot: their number in the response, the same for every row.
        prompt: cache of the N prompts, B = N * G.
        response: cache of the tokens before these.
        cache_rounding: acts on keys and values before anything attends to them, their own token included.

    Returns:
        The final hidden states, which predict the next tokens, and the cache with these tokens in it.
    """
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    group = tokens.shape[0] // prompt.mask.shape[0]
    length = jnp.repeat(jnp.sum(prompt.mask, axis=1, dtype=jnp.int32), group)
    rotation = Rotation.at((length + slot)[:, None], config)
    x = constrain(weights.embedding[tokens].astype(wide), ROW_AXES)
    keys, values = [], []
    for index, layer in enumerate(weights.layers):
        query, key, value = project(layer, norm(x, layer.attention_norm, config.norm_eps), rotation, config)
        if cache_rounding is not None:
            key, value = cache_rounding(key), cache_rounding(value)
        cached = (response.keys[index], response.values[index])
        mixed = _attend(query, (key, value), cached, slot, (prompt.keys[index], prompt.values[index], prompt.mask))
        # The write waits for the reads, which leave the lines it needs in the processor's cache.
        mixed, key, value = jax.lax.optimization_barrier((mixed, key, value))
        keys.append(_write(cached[0], key[..., None], (0, 0, 0, slot)))
        values.append(_write(cached[1], value[:, :, None], (0, 0, slot, 0)))
        x = x + layer.output(mixed)
        x = constrain(x + feed_forward(layer, norm(x, layer.mlp_norm, config.norm_eps)), ROW_AXES)
    hidden = norm(x, weights.final_norm, config.norm_eps)
    return hidden, ResponseCache(tuple(keys), tuple(values))


def decode_logits(weights: DecodeWeights, hidden: Float[Array, "B D"]) -> Float[Array, "V B"]:
    """Logits of the next tokens, in float32 or wider, vocabulary first.

    A tied head lies as [V, D]. As the left factor it is read along its rows, once; on a CPU that takes three quarters
    of the time of the product that makes [B, V].
    """
    formula = "bd,vd->vb" if weights.vocabulary_axis == 0 else "bd,dv->vb"
    return product(formula, _two_rows(hidden, weights.head), weights.head)[:, : hidden.shape[0]]


def _two_rows(x: Float[Array, "B I"], kernel: Array) -> Float[Array, "B' I"]:
    # XLA on a CPU makes the product of one narrow vector element by element, ten times slower than that of two.
    return jnp.repeat(x, 2, axis=0) if x.shape[0] == 1 and kernel.dtype.itemsize < 4 else x


def _write(cache: Array, entry: Array, origin: tuple) -> Array:
    return jax.lax.dynamic_update_slice(cache, entry.astype(cache.dtype), origin)


def product(formula: str, x: Array, y: Array) -> Array:
    """An einsum in the dtype of y, summed in float32 or wider."""
    narrow = y.dtype.itemsize < 4
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.einsum(formula, x.astype(y.dtype), y, precision=precision, preferred_element_type=wide)


def norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * scale."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def project(
    layer: DecodeLayer, x: Float[Array, "B D"], rotation: Rotation, config: TransformerConfig
) -> tuple[Float[Array, "B H hd"], Float[Array, "B KV hd"], Float[Array, "B KV hd"]]:
    """Query, key and value of each token, turned to its position."""
    query, key, value = (
        dense(x).reshape(x.shape[0], -1, config.head_dim) for dense in (layer.query, layer.key, layer.value)
    )
    if layer.query_norm is not None and layer.key_norm is not None:
        query = norm(query, layer.query_norm, config.norm_eps)
        key = norm(key, layer.key_norm, config.norm_eps)
    return rotation(query[:, None])[:, 0], rotation(key[:, None])[:, 0], value


def _attend(
    query: Float[Array, "B H hd"], own: tuple, response: tuple, slot: Int[Array, ""], prompt: tuple
) -> Float[Array, "B H*hd"]:
    """Attention of each row's new token to its prompt, to the response tokens before it, and to itself.

    Args:
        query: of the new tokens.
        own: their keys and values [B, KV, hd].
        response: keys [B, KV, hd, R] and values [B, KV, R, hd] of the response so far: slots below `slot`.
        slot: number of the new token.
        prompt: keys [N, KV, hd, P], values [N, KV, P, hd] and mask [N, P], once per prompt.
    """
    rows, heads, size = query.shape
    prompts, shared = prompt[0].shape[:2]
    per_key = heads // shared
    scaled = (query * size**-0.5).reshape(rows, shared, per_key, size)
    prompt_scores = product("nkmd,nkdp->nkmp", to_prompts(scaled, prompts), prompt[0])
    prompt_scores = to_rows(jnp.where(prompt[2][:, None, None], prompt_scores, MASKED_SCORE), rows)
    before = jnp.arange(response[0].shape[3]) < slot
    response_scores = jnp.where(before, product("bkgd,bkdr->bkgr", scaled, response[0]), MASKED_SCORE)
    own_score = jnp.sum(scaled * own[0][:, :, None], axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, response_scores, own_score], axis=-1), axis=-1)
    width = prompt[2].shape[1]
    mixed = to_rows(product("nkmp,nkpd->nkmd", to_prompts(weights[..., :width], prompts), prompt[1]), rows)
    mixed += product("bkgr,bkrd->bkgd", weights[..., width:-1], response[1])
    mixed += weights[..., -1:] * own[1][:, :, None]
    return mixed.reshape(rows, heads * size)


def to_prompts(x: Float[Array, "B KV m X"], prompts: int) -> Float[Array, "N KV Gm X"]:
    """The m vectors of each row as G m of its prompt: the samples of a prompt become rows of one product."""
    rows, shared, each, size = x.shape
    x = x.reshape(prompts, rows // prompts, shared, each, size).swapaxes(1, 2)
    return x.reshape(prompts, shared, rows // prompts * each, size)


def to_rows(x: Float[Array, "N KV Gm X"], rows: int) -> Float[Array, "B KV m X"]:
    """Undo `to_prompts`."""
    prompts, shared, together, size = x.shape
    group = rows // prompts
    x = x.reshape(prompts, shared, group, together // group, size).swapaxes(1, 2)
    return x.reshape(rows, shared, together // group, size)


def feed_forward(layer: DecodeLayer, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """down(silu(gate(x)) * up(x))."""
    return layer.down(jax.nn.silu(layer.gate(x)) * layer.up(x))
