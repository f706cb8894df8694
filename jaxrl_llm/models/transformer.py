"""A Llama-family decoder that hands out hidden states; the head is applied where its statistics are needed."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Self
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import choose
from jaxrl_llm.models.block import Block
from jaxrl_llm.models.cache import KVCache
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.context import Context
from jaxrl_llm.models.context import RowContext
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.further_token import FurtherToken
from jaxrl_llm.models.layers import RMSNorm
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.scanned import Passed
from jaxrl_llm.models.scanned import scan_layers
from jaxrl_llm.models.sharding import ACTIVATION_AXES
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


def positions_of(token_mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token in its own text: the number of real tokens before it; 0 on left padding."""
    return jnp.maximum(jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - 1, 0)


class Transformer(nnx.Module):
    """Embedding, blocks and final norm, with the steps open to the caller.

    A forward pass is `final_norm(blocks(embed(tokens), positions, token_mask))`; log-probabilities come from
    `token_statistics(hidden, *head())`. Parameters are `[in, out]` and carry `logical_axes` for `models.sharding`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype | type = jnp.float32,
        compute_dtype: jnp.dtype | type = jnp.float32,
        attention: str | None = None,
    ):
        numerics = Numerics(jnp.dtype(param_dtype), jnp.dtype(compute_dtype), attention)
        self.config = config
        self.numerics = numerics
        table = 0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
        self.embedding = nnx.Param(table.astype(param_dtype), logical_axes=("vocabulary", "hidden"))
        blocks = [Block(config, numerics, rngs, sparse=config.is_sparse(layer)) for layer in range(config.num_layers)]
        self.layers = nnx.List(blocks)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, numerics, name="model.norm")
        self.further = nnx.List([FurtherToken(config, numerics, rngs) for _ in range(config.mtp_layers)])
        self.unembedding = nnx.data(None)
        if not config.tie_embeddings:
            head = config.hidden_size**-0.5 * jax.random.normal(rngs.params(), table.shape[::-1], jnp.float32)
            self.unembedding = nnx.Param(head.astype(param_dtype), logical_axes=("hidden", "vocabulary"))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table."""
        return constrain(self.embedding[...][tokens].astype(self.numerics.stream), ACTIVATION_AXES)

    def through(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        contexts: Sequence[Context],
        *,
        start: int = 0,
        remat: bool = False,
        selections: Sequence[Int[Array, "B T k"] | None] | None = None,
    ) -> Passed:
        """Apply a layer for each context, from layer `start` on: the one pass of rows, caches and decoding.

        Args:
            x: embeddings, or what the layers before `start` passed on.
            positions: position of each token in its text.
            contexts: what each layer's tokens attend to.
            start: first layer.
            remat: recompute each layer in the backward pass instead of keeping its activations; the contexts that come
                back are then those that were given.
            selections: experts of each token in each of these layers, where they were chosen before; None where the
                layer's own router chooses.

        Raises:
            ValueError: another number of selections than of layers.
        """
        if selections is not None and len(selections) != len(contexts):
            raise ValueError(
                f"selections has {len(selections)} entries; it must have one for each of {len(contexts)} layers"
            )
        rotation = Rotation.at(positions, self.config)
        given = [None] * len(contexts) if selections is None else selections
        after: list[Context] = []
        routes: list[Routes | None] = []
        for index, (context, selection) in enumerate(zip(contexts, given, strict=True), start):

            def apply(x, index=index, context=context, selection=selection):
                return self.layers[index](x, rotation, context, selection)

            if remat:
                x, sent = jax.checkpoint(lambda x, apply=apply: apply(x)[::2])(x)
            else:
                x, context, sent = apply(x)
            x = constrain(x, ACTIVATION_AXES)
            after.append(context)
            routes.append(sent)
        return Passed(x, tuple(after), tuple(routes))

    def blocks(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        token_mask: Bool[Array, "B T"],
        *,
        start: int = 0,
        stop: int | None = None,
        remat: bool = False,
        visibility: Visibility | None = None,
    ) -> Float[Array, "B T D"]:
        """x after layers start .. stop.

        Args:
            x: embeddings, or what the layers before `start` returned (a frozen trunk is computed once and kept).
            positions: position of each token in its text.
            token_mask: which tokens are real; the others are attended to by nobody and their outputs mean nothing.
            start: first layer.
            stop: one past the last layer; None for all.
            remat: recompute each layer in the backward pass instead of keeping its activations.
            visibility: who sees whom, for packed rows; None: every token the real ones up to itself.

        Raises:
            ValueError: for an impossible range of layers.
        """
        count = len(self.layers)
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop <= {count}, got {start} and {stop}")
        sight = Visibility(token_mask) if visibility is None else visibility
        return self.rows(x, positions, sight, start=start, stop=stop, remat=remat).x

    def rows(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        visibility: Visibility,
        *,
        start: int = 0,
        stop: int | None = None,
        remat: bool = False,
        scan: bool = False,
        selections: Sequence[Int[Array, "B T k"] | None] | None = None,
    ) -> Passed:
        """`through` layers start .. stop for rows of training tokens: with where the routers sent them. With `scan` as
        `models.scanned.scan_layers` does it.
        """
        layers, context = list(self.layers)[start:stop], RowContext(self._sight(visibility))
        if scan:
            given = [None] * len(layers) if selections is None else selections
            return scan_layers(layers, x, Rotation.at(positions, self.config), context, given, remat=remat)
        contexts = [context] * len(layers)
        return self.through(x, positions, contexts, start=start, remat=remat, selections=selections)

    def _sight(self, visibility: Visibility) -> Visibility | Bool[Array, "B T T"]:
        """The mask itself, made once for all layers, where attention is dense."""
        rows, length = visibility.real.shape
        shape = (rows, length, self.config.num_heads, self.config.head_dim)
        name = self.numerics.attention or choose(shape, self.numerics.compute_dtype)
        return visibility.dense() if name == "reference" else visibility

    def trunk(
        self, tokens: Int[Array, "B T"], token_mask: Bool[Array, "B T"] | None = None, *, stop: int, remat: bool = False
    ) -> Float[Array, "B T D"]:
        """Embedding and the first `stop` layers; where these are frozen, computed once per batch of texts."""
        token_mask = self._checked_mask(tokens, token_mask)
        return self.blocks(self.embed(tokens), positions_of(token_mask), token_mask, stop=stop, remat=remat)

    def from_trunk(
        self, x: Float[Array, "B T D"], token_mask: Bool[Array, "B T"], *, start: int, remat: bool = False
    ) -> Float[Array, "B T D"]:
        """Hidden states from what `trunk(..., stop=start)` returned: the other layers and the final norm."""
        return self.final_norm(self.blocks(x, positions_of(token_mask), token_mask, start=start, remat=remat))

    def __call__(
        self, tokens: Int[Array, "B T"], token_mask: Bool[Array, "B T"] | None = None, *, remat: bool = False
    ) -> Float[Array, "B T D"]:
        """Hidden states of a batch of left-padded texts; the one at t - 1 predicts token t.

        Args:
            tokens: token ids; at the padding any id of the vocabulary.
            token_mask: which tokens are real; None for all.
            remat: recompute each layer in the backward pass.
        """
        token_mask = self._checked_mask(tokens, token_mask)
        return self.from_trunk(self.embed(tokens), token_mask, start=0, remat=remat)

    def hidden_further(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        token_mask: Bool[Array, "B T"] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "B T1 D"]:
        """States that predict the token after the next one: the one at t predicts token t + 2.

        They depend on tokens up to t + 1. Of several layers for further tokens the first one is read. Whoever trains it
        without moving the rest of the model holds `hidden` and the tables still (`jax.lax.stop_gradient`).

        Args:
            hidden: of `__call__` for these texts.
            tokens: the texts.
            token_mask: which tokens are real; None for all.
            remat: recompute the layer in the backward pass.

        Raises:
            ValueError: the model has no layer for it, or a text has one token.
        """
        token_mask = self._checked_mask(tokens, token_mask)
        if tokens.shape[1] < 2:
            raise ValueError(f"tokens must have two columns or more, a token and the next one, got {tokens.shape}")
        # A pair is real where both of its tokens are: that of a text's first token with the padding before it is not.
        real = token_mask[:, 1:] & token_mask[:, :-1]
        embedded = self.embed(tokens[:, 1:])
        return self.further_rows(hidden[:, :-1], embedded, positions_of(real), Visibility(real), remat=remat)[0]

    def further_rows(
        self,
        before: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        visibility: Visibility,
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], Routes | None]:
        """`hidden_further` for rows of training tokens: of each token, with the state before it, the state that
        predicts the token after it; and where the layer's router sent them.

        Args:
            before: the state, after the model's last norm, that predicted each token.
            embedded: the tokens.
            positions: of each token in its text.
            visibility: who sees whom; a text's first token has nothing before it and must not be seen.
            remat: recompute the layer in the backward pass.

        Raises:
            ValueError: the model has no layer for it.
        """
        if not self.further:
            raise ValueError("the model has no layer that predicts further tokens; its mtp_layers is 0.")
        layer, context = self.further[0], RowContext(self._sight(visibility))
        rotation = Rotation.at(positions, self.config)

        def apply(before: Array, embedded: Array) -> tuple[Array, Routes | None]:
            x, _, routes = layer(before, embedded, rotation, context)
            return x, routes

        return (jax.checkpoint(apply) if remat else apply)(before, embedded)

    def extend(
        self, tokens: Int[Array, "B T"], cache: KVCache, token_mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of the next T tokens of every row, and the cache with them in it."""
        return self._extended(tokens, cache, token_mask)[:2]

    def _extended(
        self, tokens: Int[Array, "B T"], cache: KVCache, token_mask: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], KVCache, tuple[Routes | None, ...]]:
        token_mask = self._checked_mask(tokens, token_mask)
        if tokens.shape[0] != cache.batch:
            raise ValueError(f"tokens has {tokens.shape[0]} rows, the cache has {cache.batch}; they must be equal")
        positions = cache.next_positions(token_mask)
        cache = cache.advance(token_mask)
        passed = self.through(self.embed(tokens), positions, cache.contexts(tokens.shape[1]))
        return self.final_norm(passed.x), cache.written(cast(Any, passed.contexts)), passed.routes

    def prefill(
        self,
        tokens: Int[Array, "B P"],
        token_mask: Bool[Array, "B P"] | None = None,
        *,
        capacity: int | None = None,
        cache_rounding: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B P D"], KVCache]:
        """Hidden states of left-padded prompts and a cache of them with room for `capacity` slots (None: no more).

        `cache_rounding` acts on keys and values before anything attends to them, here and in what is appended later.
        """
        hidden, cache, _ = self.prefill_routed(tokens, token_mask, cache_rounding=cache_rounding)
        return hidden, cache if capacity is None else cache.grow(capacity)

    def prefill_routed(
        self,
        tokens: Int[Array, "B P"],
        token_mask: Bool[Array, "B P"] | None = None,
        *,
        cache_rounding: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B P D"], KVCache, tuple[Routes | None, ...]]:
        """`prefill`, and where the router of each layer sent the tokens; None of a dense layer."""
        batch, length = tokens.shape
        cache = KVCache.empty(self.config, batch, length, self.numerics.compute_dtype, cache_rounding)
        return self._extended(tokens, cache, token_mask)

    def head(self) -> tuple[Array, int]:
        """The matrix that makes logits, in the compute dtype, and which of its axes is the vocabulary.

        Tied embeddings are handed out as they lie, `[V, D]` with axis 0; a separate head is `[D, V]` with axis 1.
        """
        table, vocabulary_axis = (self.embedding, 0) if self.unembedding is None else (self.unembedding, 1)
        return table[...].astype(self.numerics.compute_dtype), vocabulary_axis

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits in float32 or wider, for samplers and tests; training uses `token_statistics(hidden, *head())`."""
        matrix, vocabulary_axis = self.head()
        contracted = (((hidden.ndim - 1,), (1 - vocabulary_axis,)), ((), ()))
        return jax.lax.dot_general(
            hidden,
            matrix,
            contracted,
            precision=self.numerics.precision,
            preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
        )

    def astype(
        self, *, param_dtype: jnp.dtype | type | None = None, compute_dtype: jnp.dtype | type | None = None
    ) -> Self:
        """The same model with its parameters, its products or both in another dtype; arrays that fit are shared."""
        present = self.numerics
        param_dtype, compute_dtype = param_dtype or present.param_dtype, compute_dtype or present.compute_dtype
        numerics = present._replace(param_dtype=jnp.dtype(param_dtype), compute_dtype=jnp.dtype(compute_dtype))

        def cast(path: tuple, variable: nnx.Variable) -> nnx.Variable:
            if isinstance(variable, RouterBias):  # its differences decide, and would be lost
                return variable
            return variable.replace(variable.get_value().astype(numerics.param_dtype))

        return self.with_numerics(numerics, cast)

    def with_numerics(self, numerics: Numerics, cast: Callable[[tuple, nnx.Variable], nnx.Variable]) -> Self:
        """The same model with other dtypes.

        Args:
            numerics: of all its parts.
            cast: makes each parameter from its path and what it was.
        """
        graphdef, state = nnx.split(self)
        model = nnx.merge(graphdef, nnx.map_state(cast, state))
        for _, module in nnx.iter_modules(model):
            if hasattr(module, "numerics"):
                setattr(module, "numerics", numerics)  # noqa: B010 - the kinds of modules that have it are not listed here
        return model

    def _checked_mask(self, tokens, token_mask):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers of shape [B, T], got {tokens.dtype} of shape {tokens.shape}")
        if tokens.shape[1] > self.config.max_positions:
            raise ValueError(
                f"tokens must have at most max_positions={self.config.max_positions} columns, got {tokens.shape[1]}"
            )
        if token_mask is None:
            return jnp.ones(tokens.shape, bool)
        if token_mask.shape != tokens.shape:
            raise ValueError(f"token_mask must have the shape of tokens, {tokens.shape}, got {token_mask.shape}")
        return token_mask.astype(bool)
