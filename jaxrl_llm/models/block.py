"""One decoder layer."""

from flax import nnx

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.context import Context
from jaxrl_llm.models.experts import Experts
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.layers import Attention
from jaxrl_llm.models.layers import RMSNorm
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.layers import SwiGLU
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where the second part is dense or made of experts."""

    def __init__(self, config: TransformerConfig, numerics: Numerics, rngs: nnx.Rngs, *, sparse: bool = False):
        """A layer of experts where it is `sparse`."""
        width, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(width, eps, numerics, name="input_layernorm")
        self.attention = Attention(config, numerics, rngs)
        self.mlp_norm = RMSNorm(width, eps, numerics, name="post_attention_layernorm")
        self.mlp: SwiGLU | Experts
        if sparse:
            assert config.experts is not None
            self.mlp = Experts(config, config.experts, numerics, rngs)
        else:
            self.mlp = SwiGLU(config, config.intermediate_size, numerics, rngs, name="mlp")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        context: Context,
        selection: Int[Array, "B T k"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Context, Routes | None]:
        """Apply the layer.

        Args:
            x: what the layer before passed on.
            rotation: of the tokens' positions.
            context: what the tokens attend to.
            selection: experts of each token, where they were chosen before.

        Returns:
            what is passed on, the context with the tokens in it, and where a router sent them.
        """
        mixed, context = self.attention(self.attention_norm(x), rotation, context)
        x = x + mixed
        if isinstance(self.mlp, SwiGLU):
            return x + self.mlp(self.mlp_norm(x)), context, None
        out, routes = self.mlp(self.mlp_norm(x), selection)
        return x + out, context, routes
