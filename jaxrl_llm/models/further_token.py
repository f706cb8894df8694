"""A layer that predicts the token after the next one: multi-token prediction."""

import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.block import Block
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.context import Context
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.layers import Linear
from jaxrl_llm.models.layers import RMSNorm
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class FurtherToken(nnx.Module):
    """From h_t, which predicts token t + 1, and that token's embedding e_{t+1} to a state that predicts token t + 2:

        norm( block( [norm(e_{t+1}), norm(h_t)] W ) )

    DeepSeek-V3 (arXiv:2412.19437), section 2.2, in the order of GLM-4.5's checkpoints: the embedding's half comes
    first, h_t is the state after the model's last norm, and embedding and head are the model's own.
    """

    def __init__(self, config: TransformerConfig, numerics: Numerics, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.norm_eps
        self.embedding_norm = RMSNorm(width, eps, numerics, name="enorm")
        self.hidden_norm = RMSNorm(width, eps, numerics, name="hnorm")
        self.join = Linear((2 * width, width), ("joined", "hidden"), numerics, rngs, name="eh_proj")
        self.block = Block(config, numerics, rngs, sparse=config.experts is not None)
        self.final_norm = RMSNorm(width, eps, numerics, name="shared_head.norm")

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        rotation: Rotation,
        context: Context,
        selection: Int[Array, "B T k"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Context, Routes | None]:
        """The state, the context with the tokens in it, and where the router sent them; arguments as of `Block`.

        Args:
            hidden: h_t.
            embedded: e_{t+1}.
            rotation: of the positions t; a shift of all of them changes nothing.
            context: what the tokens attend to.
            selection: experts of each token, where they were chosen before.
        """
        joined = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x, context, routes = self.block(self.join(joined), rotation, context, selection)
        return self.final_norm(x), context, routes
