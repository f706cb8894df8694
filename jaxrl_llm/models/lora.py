"""Low-rank adapters on chosen projections (LoRA, Hu et al. 2021, arXiv:2106.09685): added, used, merged away."""

from dataclasses import dataclass

from flax import nnx

from jaxrl_llm.models.layers import Linear
from jaxrl_llm.models.layers import LowRank
from jaxrl_llm.models.transformer import Transformer

ATTENTION_PROJECTIONS = ("query", "key", "value", "output")
MLP_PROJECTIONS = ("gate", "up", "down")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS


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


def _projections(model: Transformer, layer: int) -> dict[str, Linear]:
    block = model.layers[layer]
    parts = {name: getattr(block.attention, name) for name in ATTENTION_PROJECTIONS}
    return parts | {name: getattr(block.mlp, name) for name in MLP_PROJECTIONS}


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
        linears = _projections(model, layer)
        for name in settings.projections:
            linear = linears[name]
            if linear.low_rank is not None:
                raise ValueError(f"{name} of layer {layer} has an adapter already; merge it first with merge_lora")
            inputs, outputs = linear.kernel.shape
            if settings.rank > min(inputs, outputs):
                raise ValueError(f"rank must be at most {min(inputs, outputs)} for {name}, got {settings.rank}")
            axes = linear.kernel.get_metadata("logical_axes")
            scaling = settings.alpha / settings.rank
            linear.low_rank = LowRank(axes, (inputs, outputs), settings.rank, scaling, rngs.params())
    return model


def merge_lora(model: Transformer) -> Transformer:
    """The plain model with every adapter added into its kernel, for decoding and saving; works under jit.

    The sum is made in float32 and rounded to the dtype of the kernel.
    """
    # split and merge alone hand back the same variables: the sum would be written into the model that was given.
    model = nnx.clone(model)
    for layer in range(len(model.layers)):
        for linear in _projections(model, layer).values():
            if linear.low_rank is not None:
                kernel, update = linear.kernel[...], linear.low_rank.dense()
                linear.kernel[...] = (kernel.astype(update.dtype) + update).astype(kernel.dtype)
                linear.low_rank = None
    return model
