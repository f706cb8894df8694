"""Attention in blocks of queries and keys: O(T) memory, any platform.

The pairs (block of queries i, block of keys j <= i) are visited one after another in one `lax.scan`; those with j > i
lie wholly after their queries and are never made. With scores s_ij = q_i k_j^T / sqrt(hd) of a pair, the running
maximum m, sum l and result o of a block of queries follow

    m' = max(m, max_j s_ij),  l' = e^(m - m') l + sum_j e^(s_ij - m'),  o' = e^(m - m') o + e^(s_ij - m') v_j,

and o / l after the last pair is the result (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). The backward pass keeps q, k, v, the result and lse = m + log l, makes every pair's weights
p_ij = e^(s_ij - lse_i) again, and adds up, with g the cotangent of the result and delta_i = sum_d g_id o_id,

    dv_j += p_ij^T g_i,   ds_ij = p_ij (g_i v_j^T - delta_i) / sqrt(hd),   dq_i += ds_ij k_j,   dk_j += ds_ij^T q_i.

Scores, sums and accumulated gradients are float32 or wider; weights are rounded to the dtype of the values before they
meet them, as in the dense implementation; so are ds and the result that delta is made of, which leaves gradients of
bfloat16 arrays two to three times as far from the exact ones as the dense implementation's. A query that sees nothing
gives zero and passes no gradient on.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.attention.dense import MASKED_SCORE
from jaxrl_llm.models.attention.visibility import Visibility
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float

BLOCK_BYTES = 32 * 2**20
"""Most float32 scores that one pair of blocks may have, unless the smallest block has more. [bytes]"""

BLOCK_SIZES = (512, 256, 128, 64)
"""Tokens of a block, the largest first."""


def block_size(batch: int, heads: int, length: int) -> int:
    """Tokens of a block: the largest of `BLOCK_SIZES` whose B H block^2 float32 scores fit `BLOCK_BYTES`, at most T."""
    fitting = [size for size in BLOCK_SIZES if 4 * batch * heads * size**2 <= BLOCK_BYTES]
    return min(fitting[0] if fitting else BLOCK_SIZES[-1], length)


class Tiles(NamedTuple):
    """Arrays cut along the tokens into n blocks of b, blocks first; G query heads share a key-value head."""

    query: Float[Array, "n B KV bG hd"]
    keys: Float[Array, "n B KV b hd"]
    values: Float[Array, "n B KV b hd"]
    sight: Visibility  # of [n, B, b]


class Kept(NamedTuple):
    """What the forward pass leaves: results, and the log of the sum of exponentials of every query's scores."""

    mixed: Float[Array, "n B KV bG hd"]
    lse: Float[Array, "n B KV bG"]


def _cut(x: Array, size: int, axis: int) -> Array:
    """Blocks of `size` along an axis, in front; zeros fill the last one."""
    x = jnp.moveaxis(x, axis, 0)
    missing = -x.shape[0] % size
    x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
    return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, axis + 1)


def _queries_to_tiles(x: Float[Array, "B T H hd"], shared: int, size: int) -> Float[Array, "n B KV bG hd"]:
    batch, length, heads, width = x.shape
    grouped = x.reshape(batch, length, shared, heads // shared, width).swapaxes(1, 2)
    tiles = _cut(grouped, size, 2)
    return tiles.reshape(*tiles.shape[:3], -1, width)


def _tiles_to_queries(tiles: Float[Array, "n B KV bG hd"], shape: tuple[int, ...], size: int) -> Array:
    batch, length, heads, width = shape
    count, _, shared = tiles.shape[:3]
    x = tiles.reshape(count, batch, shared, size, heads // shared, width)
    x = x.transpose(1, 0, 3, 2, 4, 5).reshape(batch, count * size, heads, width)
    return x[:, :length]


def _tiles_to_keys(tiles: Float[Array, "n B KV b hd"], length: int) -> Float[Array, "B KV T hd"]:
    x = jnp.moveaxis(tiles, 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :length]


def to_tiles(query: Array, keys: Array, values: Array, visibility: Visibility, size: int) -> Tiles:
    """Cut everything into blocks; the tokens that fill the last one are not real."""
    sight = jax.tree.map(lambda x: _cut(x, size, 1), visibility)
    return Tiles(_queries_to_tiles(query, keys.shape[1], size), _cut(keys, size, 2), _cut(values, size, 2), sight)


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (i, j) with j <= i, all j of one i together, ascending."""
    return np.tril_indices(count)


def _visible(sight: Visibility, i: Array, j: Array, group: int) -> Bool[Array, "B 1 bG b"]:
    """Which queries of block i see which keys of block j; the G query heads of a token see alike."""
    size = sight.real.shape[2]
    places = jnp.arange(size)
    mask = sight.real[j].astype(bool)[:, None, :] & ((i > j) | (places[:, None] >= places[None, :]))
    if sight.segments is not None:
        of_key = sight.segments[j][:, None, :]
        related = of_key == sight.segments[i][:, :, None]
        if sight.prefixes is not None:
            related |= of_key == sight.prefixes[i][:, :, None]
        mask &= related
    return jnp.repeat(mask, group, axis=1)[:, None]


def _scores(tiles: Tiles, i: Array, j: Array, precision, scale: float) -> Float[Array, "B KV bG b"]:
    """scale q_i k_j^T in float32 or wider."""
    wide = jnp.promote_types(tiles.query.dtype, jnp.float32)
    product = jnp.matmul(
        tiles.query[i], tiles.keys[j].swapaxes(-1, -2), precision=precision, preferred_element_type=wide
    )
    return product * scale


def forward(tiles: Tiles, precision: jax.lax.Precision | None, scale: float) -> Kept:
    """Results and log-sums of all queries."""
    query, values = tiles.query, tiles.values
    count, size = tiles.keys.shape[0], tiles.keys.shape[3]
    group = query.shape[3] // size
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def step(carry, pair):
        (largest, total, mixed), kept = carry
        i, j = pair
        first = j == 0
        largest = jnp.where(first, MASKED_SCORE, largest)
        total, mixed = jnp.where(first, 0.0, total), jnp.where(first, 0.0, mixed)
        visible = _visible(tiles.sight, i, j, group)
        scores = jnp.where(visible, _scores(tiles, i, j, precision, scale), MASKED_SCORE)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
        shrink = jnp.exp(largest - new)
        total = shrink * total + jnp.sum(weights, axis=-1)
        product = jnp.matmul(weights.astype(values.dtype), values[j], precision=precision, preferred_element_type=wide)
        mixed = shrink[..., None] * mixed + product
        # Every pair writes what it has so far; the last one of a block of queries writes the result.
        safe = jnp.where(total > 0, total, 1.0)
        kept = Kept(
            kept.mixed.at[i].set((mixed / safe[..., None]).astype(query.dtype)), kept.lse.at[i].set(new + jnp.log(safe))
        )
        return ((new, total, mixed), kept), None

    rows = query.shape[1:4]
    running = (jnp.full(rows, MASKED_SCORE, wide), jnp.zeros(rows, wide), jnp.zeros(query.shape[1:], wide))
    kept = Kept(jnp.zeros_like(query), jnp.zeros(query.shape[:4], wide))
    (_, kept), _ = jax.lax.scan(step, (running, kept), _pairs(count))
    return kept


def backward(
    tiles: Tiles, kept: Kept, cotangent: Float[Array, "n B KV bG hd"], precision, scale: float
) -> tuple[Array, Array, Array]:
    """Cotangents of the tiles of queries, keys and values."""
    query, keys, values = tiles.query, tiles.keys, tiles.values
    count, size = keys.shape[0], keys.shape[3]
    group = query.shape[3] // size
    wide = jnp.promote_types(query.dtype, jnp.float32)
    delta = jnp.sum(cotangent.astype(wide) * kept.mixed.astype(wide), axis=-1)
    product = partial(jnp.matmul, precision=precision, preferred_element_type=wide)

    def step(carry, pair):
        d_query, d_keys, d_values = carry
        i, j = pair
        visible = _visible(tiles.sight, i, j, group)
        scores = jnp.where(visible, _scores(tiles, i, j, precision, scale), MASKED_SCORE)
        weights = jnp.where(visible, jnp.exp(scores - kept.lse[i][..., None]), 0.0)
        pulled = product(cotangent[i], values[j].swapaxes(-1, -2))
        d_scores = (weights * (pulled - delta[i][..., None]) * scale).astype(query.dtype)
        d_query = d_query.at[i].add(product(d_scores, keys[j]))
        d_keys = d_keys.at[j].add(product(d_scores.swapaxes(-1, -2), query[i]))
        d_values = d_values.at[j].add(product(weights.astype(values.dtype).swapaxes(-1, -2), cotangent[i]))
        return (d_query, d_keys, d_values), None

    zeros = tuple(jnp.zeros(x.shape, wide) for x in (query, keys, values))
    (d_query, d_keys, d_values), _ = jax.lax.scan(step, zeros, _pairs(count))
    return d_query, d_keys, d_values


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blocked_attention(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
    precision: jax.lax.Precision | None = None,
    size: int = BLOCK_SIZES[-1],
) -> Float[Array, "B T H hd"]:
    """Attention in blocks of `size` tokens; reverse mode only."""
    return _forward(query, keys, values, visibility, precision, size)[0]


def _forward(query, keys, values, visibility, precision, size):
    kept = forward(to_tiles(query, keys, values, visibility, size), precision, query.shape[-1] ** -0.5)
    mixed = _tiles_to_queries(kept.mixed, query.shape, size)
    lse = _tiles_to_queries(kept.lse[..., None], (*query.shape[:3], 1), size)
    return mixed, (query, keys, values, visibility, mixed, lse[..., 0].swapaxes(1, 2))


def _backward(precision, size, residuals, cotangent):
    query, keys, values, visibility, mixed, lse = residuals
    how = {"precision": precision, "size": size, "scale": query.shape[-1] ** -0.5}
    return (*pull(query, keys, values, visibility, mixed, lse, cotangent, **how), None)


def pull(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
    mixed: Float[Array, "B T H hd"],
    lse: Float[Array, "B H T"],
    cotangent: Float[Array, "B T H hd"],
    *,
    precision: jax.lax.Precision | None,
    size: int,
    scale: float,
) -> tuple[Float[Array, "B T H hd"], Float[Array, "B KV T hd"], Float[Array, "B KV T hd"]]:
    """Cotangents of queries, keys and values from the result, its log-sums and its cotangent, whoever made them.

    Args:
        query, keys, values, visibility: what attention was given.
        mixed, lse: its result, and the log of the sum of exponentials of every query's scores.
        cotangent: of the result.
        precision: of the products.
        size: tokens of a block.
        scale: what products of queries and keys were multiplied with.
    """
    shared, length = keys.shape[1:3]
    log_sums = _queries_to_tiles(lse.swapaxes(1, 2)[..., None], shared, size)[..., 0]
    kept = Kept(_queries_to_tiles(mixed, shared, size), log_sums)
    tiles = to_tiles(query, keys, values, visibility, size)
    d_query, d_keys, d_values = backward(tiles, kept, _queries_to_tiles(cotangent, shared, size), precision, scale)
    return (
        _tiles_to_queries(d_query, query.shape, size).astype(query.dtype),
        _tiles_to_keys(d_keys, length).astype(keys.dtype),
        _tiles_to_keys(d_values, length).astype(values.dtype),
    )


blocked_attention.defvjp(_forward, _backward)
