"""Low-rank adapters on chosen projections (LoRA, Hu et al. 2021, arXiv:2106.09685): added, used, merged away."""

from dataclasses import dataclass

from flax import nnx

from jaxrl_llm.models.block import Block
from jaxrl_llm.models.experts import ExpertsLinear
from jaxrl_llm.models.layers import Linear
from jaxrl_llm.models.layers import LowRank
from jaxrl_llm.models.transformer import Transformer

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
"""Products of a layer; the last three are those of the feed-forward, of the experts and of the shared expert."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """W becomes W + (alpha / rank) a b on the named projections of the layers that have adapters.

    Raises:
        ValueError: for a rank below 1, an alpha that is not positive, or a projection that no layer has.
    """

    rank: int = 8
    alpha: float = 16.0
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        unknown = [name for name in self.projections if name not in PROJECTIONS]
        if unknown or not self.projections:
            raise ValueError(f"projections must be some of {', '.join(PROJECTIONS)}, got {self.projections!r}")


def _projections(block: Block) -> dict[str, Linear | ExpertsLinear]:
    """Every product of a layer that may have an adapter, by its path."""
    found = {".".join(map(str, path)): part for path, part in nnx.iter_modules(block)}
    return {path: part for path, part in found.items() if isinstance(part, Linear | ExpertsLinear)}


def add_lora(model: Transformer, settings: LoraSettings, *, rngs: nnx.Rngs, first_layer: int = 0) -> Transformer:
    """The model with fresh adapters on layers first_layer and up; its outputs are unchanged, its arrays are shared.

    Raises:
        ValueError: for a rank above the sides of a projection, a layer that is not there, or adapters already present.
    """
    count = len(model.layers)
    if not 0 <= first_layer < count:
        raise ValueError(f"first_layer must be one of the {count} layers, got {first_layer}")
    model = nnx.merge(*nnx.split(model))
    for layer in range(first_layer, count):
        found = [(path.rpartition(".")[2], linear) for path, linear in _projections(model.layers[layer]).items()]
        chosen = [pair for name in settings.projections for pair in found if pair[0] == name]
        for name, linear in chosen:
            if linear.low_rank is not None:
                raise ValueError(f"{name} of layer {layer} has an adapter already; merge it first with merge_lora")
            sizes = linear.kernel.shape
            if settings.rank > min(sizes[-2:]):
                raise ValueError(f"rank must be at most {min(sizes[-2:])} for {name}, got {settings.rank}")
            axes = linear.kernel.get_metadata("logical_axes")
            linear.low_rank = LowRank(axes, sizes, settings.rank, settings.alpha / settings.rank, rngs.params())
    return model


def merge_lora(model: Transformer) -> Transformer:
    """The plain model with every adapter added into its kernel, for decoding and saving; works under jit.

    The sum is made in float32 and rounded to the dtype of the kernel.
    """
    # split and merge alone hand back the same variables: the sum would be written into the model that was given.
    model = nnx.clone(model)
    for block in model.layers:
        for linear in _projections(block).values():
            if linear.low_rank is not None:
                kernel, update = linear.kernel[...], linear.low_rank.dense()
                linear.kernel[...] = (kernel.astype(update.dtype) + update).astype(kernel.dtype)
                linear.low_rank = None
    return model
