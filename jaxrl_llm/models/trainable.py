"""Which parameters learn: all, those of the top layers, or low-rank adapters; and the split of a state into both parts.

    choice = top_layers(8)
    model = choice.prepare(model, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    learned, frozen = choice.partition(state)
    model = nnx.merge(graphdef, learned, frozen)

Gradients and the optimiser see `learned` alone; the correction biases of routers are in it, and move by a rule. Layers
below `first_trained_layer(learned, L)` are a frozen trunk: its outputs can be computed once per batch and used in every
step (`Transformer.trunk`, `Transformer.from_trunk`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from flax import nnx

from jaxrl_llm.checks import LATER
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.models.lora import PROJECTIONS
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.transformer import Transformer

Path = tuple[Any, ...]
Filter = Callable[[Path, Any], bool]


@dataclass(frozen=True)
class Trainable:
    """A choice of parameters: the layers from the top that take part, and their adapters if only those learn.

    Attributes:
        top: how many layers; None means every layer, the embeddings and the final norm.
        adapters: they learn in the place of the layers' own parameters.
        further: the layer that predicts the token after the next one learns too; it has a loss of its own
            (`UpdateSettings.mtp_weight`).
    """

    top: int | None = None
    adapters: LoraSettings | None = None
    further: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise ValueError(f"the number of top layers must be at least 1, got {self.top}")

    def first_layer(self, num_layers: int) -> int:
        """The lowest layer that takes part."""
        if self.top is None:
            return 0
        if self.top > num_layers:
            raise ValueError(f"the number of top layers must be at most {num_layers}, all there are, got {self.top}")
        return num_layers - self.top

    def prepare(self, model: Transformer, *, rngs: nnx.Rngs) -> Transformer:
        """The model with the adapters that this choice trains; the model itself where it trains none."""
        first = self.first_layer(len(model.layers))
        return model if self.adapters is None else add_lora(model, self.adapters, rngs=rngs, first_layer=first)

    def filter(self, num_layers: int) -> Filter:
        """The choice as a flax filter over paths."""
        first = self.first_layer(num_layers)

        def learns(path: Path, value: Any) -> bool:
            if path[0] == "further":
                # Of several such layers the first one is read, and so learns.
                return self.further and path[1] == 0 and isinstance(value, nnx.Param | RouterBias)
            if self.adapters is not None:
                return "low_rank" in path
            if not isinstance(value, nnx.Param | RouterBias):
                return False
            if self.top is None:
                return True
            return path[0] == "final_norm" or (path[0] == "layers" and int(path[1]) >= first)

        return learns

    def partition(self, state: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Split a state into (learned, frozen); no array is copied.

        Raises:
            ValueError: when nothing would learn: the adapters were never added.
        """
        learned, frozen = nnx.split_state(state, self.filter(len(state["layers"])), ...)
        if not learned:
            raise ValueError("the state has no low-rank adapters to train; make them with prepare(model, rngs=...)")
        return learned, frozen


def full(*, further: bool = False) -> Trainable:
    """Every parameter learns; those of a layer that predicts a further token where `further` says so."""
    return Trainable(further=further)


def top_layers(count: int) -> Trainable:
    """The last `count` layers and the final norm learn; the embeddings, and with them a tied head, stay."""
    return Trainable(top=count)


def lora(
    rank: int = 8, *, alpha: float = 16.0, projections: tuple[str, ...] = PROJECTIONS, top: int | None = None
) -> Trainable:
    """Low-rank adapters learn, on the named projections of the `top` layers (None: of all)."""
    return Trainable(top=top, adapters=LoraSettings(rank=rank, alpha=alpha, projections=projections))


def combine(learned: nnx.State, frozen: nnx.State) -> nnx.State:
    """The state that was partitioned, with `learned` as it is now."""
    return nnx.merge_state(learned, frozen)


def first_trained_layer(learned: nnx.State, num_layers: int) -> int:
    """The lowest layer that needs a gradient, so that the embedding and the layers before it can be computed once.

    0 where the embedding learns (nothing can be kept); num_layers where only the final norm or the head does.
    """
    if "embedding" in learned:
        return 0
    return min(map(int, learned.get("layers", {})), default=num_layers)
