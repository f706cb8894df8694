"""One token for every row of a group-sampled batch, against a prompt cache that the group shares.

A step has B rows of one token, so its time goes into reading weights and cache. The layers are those of the model; what
differs is what they attend to (`StepContext`) and how the weights lie:

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
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NamedTuple
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.attention import MASKED_SCORE
from jaxrl_llm.models.cache import KVCache
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.experts import Router
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.numerics import two_rows
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

SLOT_MULTIPLE = 16
"""Slots of the response cache come in multiples of this: one 512-bit register of float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWeights:
    """A model for decoding: its own arrays unless adapters or another dtype forbid it.

    Memory beyond the model's: the kernels that have adapters; in another dtype than the model's, all kernels and the
    head (269 MB for SmolLM2-135M in bfloat16).

    Attributes:
        state: its parameters.
        head: the matrix that makes logits, in the dtype of the products.
        vocabulary_axis: which of its axes is the vocabulary.
        graphdef: the rest of the model.
    """

    state: nnx.State
    head: Float[Array, "V D"] | Float[Array, "D V"]
    vocabulary_axis: int = field(metadata={"static": True})
    graphdef: nnx.GraphDef[Transformer] = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """Of the products and of the cache."""
        return self.head.dtype

    @property
    def model(self) -> Transformer:
        """The model."""
        return nnx.merge(self.graphdef, self.state)

    @classmethod
    def of(cls, model: Transformer, dtype: jnp.dtype | type | None = None, *, further: bool = False) -> Self:
        """Merge and cast the weights of a model; `dtype` None keeps the model's compute dtype.

        `further` says that layers for further tokens are used too, which then are cast with the others.
        """
        dtype = jnp.dtype(model.numerics.compute_dtype if dtype is None else dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        routers = {path for path, module in nnx.iter_modules(model) if isinstance(module, Router)}

        def cast(path: tuple, variable: nnx.Variable) -> nnx.Variable:
            value = variable.get_value()
            # The table is read row by row, a head is cast by itself, and routers are float32 in every sampler.
            if (
                path[0] in ("embedding", "unembedding")
                or path[:-1] in routers
                or (path[0] == "further" and not further)
            ):
                return variable
            return variable.replace(value.astype(wide if value.ndim < 2 else dtype))

        head, vocabulary_axis = model.head()
        numerics = model.numerics._replace(compute_dtype=dtype, stream_dtype=wide)
        graphdef, state = nnx.split(merge_lora(model).with_numerics(numerics, cast))
        return cls(state, head.astype(dtype), vocabulary_axis, graphdef)


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

    @classmethod
    def none(cls, config: TransformerConfig, rows: int, dtype: jnp.dtype) -> "PromptCache":
        """A prompt without tokens for each row: all that the rows read is in their response cache."""
        heads, size, layers = config.num_kv_heads, config.head_dim, range(config.num_layers)
        return cls(
            keys=tuple(jnp.zeros((rows, heads, size, 0), dtype) for _ in layers),
            values=tuple(jnp.zeros((rows, heads, 0, size), dtype) for _ in layers),
            mask=jnp.zeros((rows, 0), bool),
        )

    def layers(self) -> Iterator[tuple[Array, Array]]:
        """Keys and values of each layer."""
        return zip(self.keys, self.values, strict=True)


class ResponseCache(NamedTuple):
    """Keys and values of what each row sampled; slot t holds its token number t."""

    keys: tuple[Float[Array, "B KV hd R"], ...]
    values: tuple[Float[Array, "B KV R hd"], ...]

    @classmethod
    def empty(
        cls, config: TransformerConfig, rows: int, slots: int, dtype: jnp.dtype, *, layers: int | None = None
    ) -> "ResponseCache":
        """No tokens yet, and room for `slots` tokens or a few more: rows of whole vector registers are read faster.

        `layers` None is as many as the model has.
        """
        heads, size, count = config.num_kv_heads, config.head_dim, config.num_layers if layers is None else layers
        slots = max(slots + -slots % SLOT_MULTIPLE, SLOT_MULTIPLE)
        return cls(
            keys=tuple(jnp.zeros((rows, heads, size, slots), dtype) for _ in range(count)),
            values=tuple(jnp.zeros((rows, heads, slots, size), dtype) for _ in range(count)),
        )

    @classmethod
    def of(cls, contexts: Iterable[Any]) -> "ResponseCache":
        """What the layers' contexts hold."""
        keys, values = zip(*((context.keys, context.values) for context in contexts), strict=True)
        return cls(keys, values)

    def layers(self) -> Iterator[tuple[Array, Array]]:
        """Keys and values of each layer."""
        return zip(self.keys, self.values, strict=True)


class StepContext(NamedTuple):
    """What one new token of every row attends to in one layer: its prompt, the response before it, and itself.

    Attributes:
        prompt: keys [N, KV, hd, P], values [N, KV, P, hd] and mask [N, P], once per prompt.
        keys, values: of the response so far: slots below `slot`.
        slot: number of the new token.
        rounding: acts on keys and values before anything attends to them, their own token included.
    """

    prompt: tuple[Array, Array, Array]
    keys: Float[Array, "B KV hd R"]
    values: Float[Array, "B KV R hd"]
    slot: Int[Array, ""]
    rounding: Callable[[Array], Array] | None = None

    def attend(
        self,
        query: Float[Array, "B 1 H hd"],
        key: Float[Array, "B 1 KV hd"],
        value: Float[Array, "B 1 KV hd"],
        numerics: Numerics,
    ) -> tuple[Float[Array, "B H*hd"], Self]:
        """See `models.context.Context`."""
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.rounding is not None:
            key, value = self.rounding(key), self.rounding(value)
        mixed = _attend(query, (key, value), (self.keys, self.values), self.slot, self.prompt)
        # The write waits for the reads, which leave the lines it needs in the processor's cache.
        mixed, key, value = jax.lax.optimization_barrier((mixed, key, value))
        keys = _write(self.keys, key[..., None], (0, 0, 0, self.slot))
        values = _write(self.values, value[:, :, None], (0, 0, self.slot, 0))
        return mixed, self._replace(keys=keys, values=values)


def decode_step(
    weights: DecodeWeights,
    tokens: Int[Array, " B"],
    slot: Int[Array, ""],
    prompt: PromptCache,
    response: ResponseCache,
    cache_rounding: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "B D"], ResponseCache]:
    """`decode_routed` without the routes."""
    return decode_routed(weights, tokens, slot, prompt, response, cache_rounding)[:2]


def decode_routed(
    weights: DecodeWeights,
    tokens: Int[Array, " B"],
    slot: Int[Array, ""],
    prompt: PromptCache,
    response: ResponseCache,
    cache_rounding: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "B D"], ResponseCache, tuple[Routes | None, ...]]:
    """Read one token per row.

    Args:
        weights: of `DecodeWeights.of`.
        tokens: the tokens that were sampled last, row = prompt * G + sample.
        slot: their number in the response, the same for every row.
        prompt: cache of the N prompts, B = N * G.
        response: cache of the tokens before these.
        cache_rounding: acts on keys and values before anything attends to them, their own token included.

    Returns:
        The final hidden states, which predict the next tokens; the cache with these tokens in it; and where the router
        of each layer sent them, None of a dense layer.
    """
    model = weights.model
    length = jnp.repeat(jnp.sum(prompt.mask, axis=1, dtype=jnp.int32), tokens.shape[0] // prompt.mask.shape[0])
    contexts = [
        StepContext((*shared, prompt.mask), *own, slot, cache_rounding)
        for shared, own in zip(prompt.layers(), response.layers(), strict=True)
    ]
    passed = model.through(model.embed(tokens[:, None]), (length + slot)[:, None], contexts)
    return model.final_norm(passed.x)[:, 0], ResponseCache.of(passed.contexts), passed.routes


def decode_logits(weights: DecodeWeights, hidden: Float[Array, "B D"]) -> Float[Array, "V B"]:
    """Logits of the next tokens, in float32 or wider, vocabulary first.

    A tied head lies as [V, D]. As the left factor it is read along its rows, once; on a CPU that takes three quarters
    of the time of the product that makes [B, V].
    """
    formula = "bd,vd->vb" if weights.vocabulary_axis == 0 else "bd,dv->vb"
    return product(formula, two_rows(hidden.astype(weights.dtype)), weights.head)[:, : hidden.shape[0]]


def _write(cache: Array, entry: Array, origin: tuple) -> Array:
    return jax.lax.dynamic_update_slice(cache, entry.astype(cache.dtype), origin)


def product(formula: str, x: Array, y: Array) -> Array:
    """An einsum in the dtype of y, summed in float32 or wider."""
    narrow = y.dtype.itemsize < 4
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.einsum(formula, x.astype(y.dtype), y, precision=precision, preferred_element_type=wide)


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
