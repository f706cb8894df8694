"""A transformer cut into what is trained and what is frozen, and the two halves of its forward pass."""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.block import Block
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.models.trainable import first_trained_layer
from jaxrl_llm.models.transformer import ACTIVATION_AXES
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.run.checkpoints import flatten_settings
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.layout import chosen_states
from jaxrl_llm.training.text.layout import through_layers
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PyTree


class Forward(NamedTuple):
    """What a forward pass gives.

    Attributes:
        hidden: states that predict the chosen tokens.
        x: what the last layer passed on, at every token.
        routes: where the router of each trained layer sent the tokens; None of a dense layer.
    """

    hidden: Float[Array, "n K D"]
    x: Float[Array, "n W D"]
    routes: tuple[Routes | None, ...]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is static about a policy: its structure, and which part of it is trained.

    Attributes:
        graphdef: structure of the model, for `nnx.merge(graphdef, params, frozen)`.
        first_layer: layers below this one, and the embedding they read, are frozen: their output is computed once per
            rollout batch and kept. 0 where nothing can be kept.
        trains_head: whether the matrix that makes the logits is trained (always so for trained tied embeddings).
    """

    graphdef: nnx.GraphDef
    first_layer: int
    trains_head: bool

    def model(self, params: PyTree, frozen: PyTree = None) -> Transformer:
        """The model with these parameters; None where none are frozen."""
        return nnx.merge(self.graphdef, params) if frozen is None else nnx.merge(self.graphdef, params, frozen)

    def trunk(self, model: Transformer, rows: Rows) -> Float[Array, "n W D"] | None:
        """Output of the frozen layers; None where there are none."""
        if not self.first_layer:
            return None
        return through_layers(model, model.embed(rows.tokens), rows, start=0, stop=self.first_layer).x

    def hidden(self, model: Transformer, rows: Rows, trunk: Float[Array, "n W D"] | None) -> Float[Array, "n K D"]:
        """States that predict the chosen tokens, through the layers that are trained."""
        return self.forward(model, rows, trunk).hidden

    def blocks(self, model: Transformer) -> list[Block]:
        """The layers that are trained."""
        return list(model.layers)[self.first_layer :]

    def forward(
        self, model: Transformer, rows: Rows, trunk: Float[Array, "n W D"] | None, *, remat: bool = False
    ) -> Forward:
        """Through the layers that are trained."""
        x = model.embed(rows.tokens) if trunk is None else constrain(trunk, ACTIVATION_AXES)
        passed = through_layers(model, x, rows, start=self.first_layer, remat=remat)
        # The norm acts on each state alone: it is applied to those that predict something only.
        return Forward(model.final_norm(chosen_states(passed.x, rows)), passed.x, passed.routes)


def describe_model(model: Transformer, trainable: Trainable) -> dict[str, Any]:
    """What a model is besides its parameters, as flat JSON values: two models of the same arrays may still differ in
    it, in the base of rotary positions or the scale of adapters for example.

    Args:
        model: prepared by `trainable` or not.
        trainable: which parameters learn.
    """
    numerics = {"param_dtype": model.numerics.param_dtype.name, "compute_dtype": model.numerics.compute_dtype.name}
    return flatten_settings({"config": model.config, **numerics, "trainable": trainable})


def require_positions(model: Transformer, width: int, name: str) -> None:
    """A model must read rows of `width` tokens.

    Raises:
        ValueError: it reads fewer; `name` says whose it is.
    """
    if model.config.max_positions < width:
        raise ValueError(
            f"the {name} reads {model.config.max_positions} positions and a row has up to {width}; make the rows "
            "shorter, or take another model."
        )


def require_vocabulary(tokenizer: Tokenizer, model: Transformer) -> None:
    """A model must know every token of its tokenizer.

    Raises:
        ValueError: it has fewer.
    """
    sizes = tokenizer.vocab_size, model.config.vocab_size
    if sizes[0] > sizes[1]:
        raise ValueError(
            f"the tokenizer has {sizes[0]} tokens and the model {sizes[1]}; give the tokenizer that belongs to it."
        )


def whole_policy(model: Transformer) -> tuple[Policy, nnx.State]:
    """A model that never learns, such as a teacher, as a policy of which nothing is frozen; and its parameters."""
    graphdef, state = nnx.split(model)
    return Policy(graphdef, 0, True), state


def split_policy(model: Transformer, trainable: Trainable) -> tuple[Policy, nnx.State, nnx.State]:
    """Cut a model into what learns and what does not; adapters must be there already (`trainable.prepare`).

    Returns:
        (policy, trained parameters, frozen parameters); no array is copied.

    Raises:
        ValueError: nothing would learn.
    """
    graphdef, state = nnx.split(model)
    params, frozen = trainable.partition(state)
    head = "embedding" if model.unembedding is None else "unembedding"
    return Policy(graphdef, first_trained_layer(params, len(model.layers)), head in params), params, frozen


def head_copy(policy: Policy, model: Transformer) -> Float[Array, "_ _"] | None:
    """The head as it is now, in a buffer of its own; None where it is frozen and the model's own will do."""
    return jnp.copy(model.head()[0]) if policy.trains_head else None


def parameter_count(tree: PyTree) -> int:
    """Number of entries in all arrays of the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
