"""A mixture of experts in place of a feed-forward: a router, the experts it chooses from, and a shared one."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_kernels import combine_rows
from jaxrl_kernels import gather_rows
from jaxrl_kernels import group_rows
from jaxrl_kernels import grouped_matmul
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.expert_parallel import mix_over_devices
from jaxrl_llm.models.layers import LowRank
from jaxrl_llm.models.layers import SwiGLU
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.sharding import automatic_mesh
from jaxrl_llm.models.stored_parts import Stored
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

SMALLEST_SUM = 1e-20
"""Added to the sum of the chosen scores, as transformers does: it is nothing unless all of them underflow."""


class Routes(NamedTuple):
    """Where a router sent its tokens.

    Attributes:
        selection: the k experts of each token, no expert twice.
        scores: of every expert, float32: sigmoid or softmax of the router's logits, without the correction bias.
    """

    selection: Int[Array, "*batch k"]
    scores: Float[Array, "*batch E"]


class RouterBias(nnx.Variable):
    """What is added to an expert's score where experts are chosen; float32 always, and no gradient reaches it."""


def choose_experts(
    scores: Float[Array, "*batch E"], bias: Float[Array, " E"] | None, settings: ExpertsConfig
) -> Int[Array, "*batch k"]:
    """The k experts of the largest scores + bias, within the groups whose two best add up to most.

    DeepSeek-V3 (arXiv:2412.19437), section 2.1.2; GLM-4.5 (arXiv:2508.06471) has one group.
    """
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if settings.groups > 1:
        by_group = ranked.reshape(*ranked.shape[:-1], settings.groups, -1)
        best = jnp.sum(jax.lax.top_k(by_group, 2)[0], axis=-1)
        kept = jax.lax.top_k(best, settings.chosen_groups)[1]
        open_groups = jnp.any(kept[..., None] == jnp.arange(settings.groups), axis=-2)
        ranked = jnp.where(open_groups[..., None], by_group, -jnp.inf).reshape(ranked.shape)
    return jax.lax.top_k(ranked, settings.chosen)[1]


def expert_weights(
    scores: Float[Array, "*batch E"], selection: Int[Array, "*batch k"], settings: ExpertsConfig
) -> Float[Array, "*batch k"]:
    """w_j = scale s_j / sum_i s_i over the chosen experts, of the scores without the bias; s_j where not normalised."""
    chosen = jnp.take_along_axis(scores, selection, axis=-1)
    if settings.normalise:
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + SMALLEST_SUM)
    return settings.scale * chosen


def given_selections(
    config: TransformerConfig, selections: Int[Array, "B T L k"] | None
) -> list[Int[Array, "B T k"] | None]:
    """For `Transformer.through`: of each layer, the experts that were recorded; None of a dense one, and of every layer
    where nothing was recorded.

    Args:
        config: of the model.
        selections: of its L layers that have experts.
    """
    if selections is None:
        return [None] * config.num_layers
    sparse = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]

    def of(layer: int) -> Int[Array, "B T k"]:
        return selections[:, :, sparse.index(layer)].astype(jnp.int32)

    return [of(layer) if layer in sparse else None for layer in range(config.num_layers)]


def stacked_selections(routes: Sequence[Routes | None]) -> Int[Array, "B T L k"]:
    """The selections of the layers that have experts, which `given_selections` takes apart again."""
    return jnp.stack([layer.selection for layer in routes if layer is not None], axis=2)


def as_small(selections: Int[Array, "*batch k"], experts: int) -> Int[Array, "*batch k"]:
    """Selections in as few bytes as hold the number of an expert."""
    return selections.astype(jnp.uint8 if experts <= 2**8 else jnp.uint16)


class Router(nnx.Module):
    """Scores of the experts; in float32 whatever the model's dtypes, or near ties would choose other experts."""

    def __init__(self, config: TransformerConfig, settings: ExpertsConfig, numerics: Numerics, rngs: nnx.Rngs):
        sizes = (config.hidden_size, settings.count)
        kernel = config.hidden_size**-0.5 * jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(numerics.param_dtype), logical_axes=("hidden", "experts"))
        bias = RouterBias(jnp.zeros(settings.count, jnp.float32), logical_axes=("experts",)) if settings.bias else None
        self.bias = nnx.data(bias)
        self.settings = settings
        # What an engine does to its products, simulated (`rollouts.perturb`); along the axis that is summed over.
        self.rounding: Callable[[Array], Array] | None = None

    def stored(self) -> tuple[Stored, ...]:
        """Kernel and correction bias."""
        bias = () if self.bias is None else (Stored(self.bias, ("mlp.gate.e_score_correction_bias",)),)
        return (Stored(self.kernel, ("mlp.gate.weight",), transposed=True), *bias)

    def __call__(
        self, x: Float[Array, "*batch D"], selection: Int[Array, "*batch k"] | None
    ) -> tuple[Routes, Float[Array, "*batch k"]]:
        """Choose experts, or take those that are given; and the weights of their outputs."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, kernel = x.astype(wide), self.kernel[...].astype(wide)
        if self.rounding is not None:
            x, kernel = self.rounding(x), self.rounding(kernel.T).T
        logits = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        if self.rounding is not None:
            logits = self.rounding(logits)
        scores = jax.nn.sigmoid(logits) if self.settings.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        if selection is None:
            selection = choose_experts(scores, None if self.bias is None else self.bias[...], self.settings)
        return Routes(selection, scores), expert_weights(scores, selection, self.settings)


class ExpertsLinear(nnx.Module):
    """y_i = x_i W_e for rows sorted by their expert e; kernels as [experts, in, out]."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        axes: tuple[str, str, str],
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        name: str,
        gain: float = 1.0,
    ):
        kernel = gain * sizes[1] ** -0.5 * jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(numerics.param_dtype), logical_axes=axes)
        self.low_rank: LowRank | None = nnx.data(None)
        self.numerics, self.name = numerics, name

    def stored(self) -> tuple[Stored, ...]:
        """A kernel for each expert."""
        names = [f"mlp.experts.{expert}.{self.name}.weight" for expert in range(self.kernel.shape[0])]
        return (Stored(self.kernel, tuple(names), transposed=True, stacked=True),)

    def __call__(self, x: Float[Array, "M I"], sizes: Int[Array, " E"]) -> Float[Array, "M O"]:
        """The products.

        Args:
            x: rows, sorted by expert.
            sizes: rows of each expert.
        """
        y = self._product(x, self.kernel[...], sizes)
        if self.low_rank is None:
            return y
        inner = self._product(x, self.low_rank.a[...], sizes)
        return y + self.low_rank.scaling * self._product(inner, self.low_rank.b[...], sizes)

    # Summed in float32 or wider, and rounded to the dtype of the products before it is passed on.
    def _product(self, x: Array, kernel: Array, sizes: Array) -> Array:
        dtype = self.numerics.compute_dtype
        y = grouped_matmul(x.astype(dtype), kernel.astype(dtype), sizes)
        return y.astype(self.numerics.stream)


def mix(
    parts: tuple[ExpertsLinear, ExpertsLinear, ExpertsLinear],
    rows: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    weights: Float[Array, "N k"],
) -> Float[Array, "N D"]:
    """sum_j w_j down_j(silu(gate_j(x)) * up_j(x)) over the chosen experts, of those that are there; 0 of the others.

    Args:
        parts: gate, up and down.
        rows: one for each token.
        chosen: experts of each token; an id behind the last expert is nobody's.
        weights: of their outputs.
    """
    gate, up, down = parts
    groups = group_rows(chosen, gate.kernel.shape[0])
    sent, sizes = gather_rows(rows, groups), groups.group_sizes
    out = down(jax.nn.silu(gate(sent, sizes)) * up(sent, sizes), sizes)
    return combine_rows(out, groups, weights)


class Experts(nnx.Module):
    """sum_j w_j Expert_j(x) over the chosen experts, + Shared(x); every expert is a SwiGLU. No token is dropped."""

    def __init__(self, config: TransformerConfig, settings: ExpertsConfig, numerics: Numerics, rngs: nnx.Rngs):
        width, inner, count = config.hidden_size, settings.width, settings.count
        gain = (2 * config.num_layers) ** -0.5
        self.router = Router(config, settings, numerics, rngs)

        def linear(name: Literal["gate", "up", "down"]) -> ExpertsLinear:
            outward = name == "down"
            sizes = (count, inner, width) if outward else (count, width, inner)
            axes = ("experts", "intermediate", "hidden") if outward else ("experts", "hidden", "intermediate")
            return ExpertsLinear(sizes, axes, numerics, rngs, name=f"{name}_proj", gain=gain if outward else 1.0)

        self.gate, self.up, self.down = linear("gate"), linear("up"), linear("down")
        shared = settings.shared * inner
        self.shared = nnx.data(SwiGLU(config, shared, numerics, rngs, name="mlp.shared_experts") if shared else None)

    def __call__(
        self, x: Float[Array, "B T D"], selection: Int[Array, "B T k"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routes]:
        """Apply the layer; `selection` names the experts of each token where another router has chosen them."""
        routes, weights = self.router(x, selection)
        rows, pairs = x.reshape(-1, x.shape[-1]), (math.prod(x.shape[:-1]), self.router.settings.chosen)
        arrays = rows, routes.selection.reshape(pairs), weights.reshape(pairs)
        parts, mesh = (self.gate, self.up, self.down), automatic_mesh()
        if mesh is not None and mesh.shape.get("expert", 1) > 1:
            mixed = mix_over_devices(mesh, mix, parts, *arrays).reshape(x.shape)
        else:
            mixed = mix(parts, *arrays).reshape(x.shape)
        return mixed if self.shared is None else mixed + self.shared(x), routes
