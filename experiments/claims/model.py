"""The small GLM: a dense layer, layers of experts behind sigmoid routers, and a layer for the token after the next."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.claims.settings import ClaimsSettings
from experiments.claims.text import PROMPT
from experiments.claims.text import VOCABULARY
from jaxrl_llm.models import Transformer
from jaxrl_llm.models import TransformerConfig
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.block import Block
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.transformer import positions_of
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PyTree


def glm_config(settings: ClaimsSettings) -> TransformerConfig:
    """GLM-4.5 (arXiv 2508.06471, table 1) with few and narrow parts: norms of queries and keys, biases, half of each
    head turns, one dense layer, two experts of each token and a shared one, one layer for the token after the next.
    """
    width = settings.width
    return TransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=settings.layers,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
        intermediate_size=3 * width,
        max_positions=max(settings.length, PROMPT + settings.longest),
        tie_embeddings=False,
        qkv_bias=True,
        qk_norm=True,
        rotary_fraction=0.5,
        experts=ExpertsConfig(count=settings.experts, chosen=2, width=width, shared=1, dense_layers=1),
        mtp_layers=1,
    )


@functools.partial(jax.jit, static_argnums=0)
def initialised(config: TransformerConfig, keys: Key[Array, " S"]) -> PyTree:
    """A model for each key: compiled once for pre-training and for reinforcement learning."""
    return jax.vmap(lambda key: nnx.state(Transformer(config, rngs=nnx.Rngs(key))))(keys)


def graph_of(config: TransformerConfig) -> nnx.GraphDef[Transformer]:
    """The structure of the model, without its numbers."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


class Passed(NamedTuple):
    """One pass over a text without padding.

    Attributes:
        logits: of the tokens from the second on.
        further: of the tokens from the third on, by the layer for the token after the next.
        sent: of each layer: the layer, where its router sent the tokens, and which tokens are real.
    """

    logits: Float[Array, "B T1 V"]
    further: Float[Array, "B T2 V"]
    sent: list[tuple[Block, Routes | None, Bool[Array, "B T"]]]


def pass_text(model: Transformer, tokens: Int[Array, "B T"]) -> Passed:
    """Predict every token of a text by the model and by its layer for the token after the next."""
    real = jnp.ones(tokens.shape, bool)
    positions, embedded = positions_of(real), model.embed(tokens)
    passed = model.rows(embedded, positions, Visibility(real))
    hidden = model.final_norm(passed.x)
    # The last pair of a token and the next one predicts a token behind the text.
    pairs = real[:, 2:]
    further, routes = model.further_rows(hidden[:, :-2], embedded[:, 1:-1], positions[:, :-2], Visibility(pairs))
    sent = [(block, route, real) for block, route in zip(model.layers, passed.routes, strict=True)]
    return Passed(model.logits(hidden[:, :-1]), model.logits(further), [*sent, (model.further[0].block, routes, pairs)])
