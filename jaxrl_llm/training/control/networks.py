"""Actor-critics: a torso for boards, pictures or vectors, an LSTM where asked for, and heads for actions and value.

A convolution is written as patches times a matrix: XLA's own takes six times as long on a CPU (104 us a sample against
17; two cores of an Intel Xeon, jax 0.11.2) where it stands inside a loop of a compiled program, as every update does.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float

TORSOS = ("minatar", "nature", "small", "mlp")
"""Of `ActorCritic`: for boards of squares, for pictures of 84 x 84, of half of that, for vectors."""
Memory = tuple[Float[Array, "B M"], ...]
"""What an LSTM carries: cell and output; () where there is none."""


def _linear(inputs: int, outputs: int, scale: float, rngs: nnx.Rngs) -> nnx.Linear:
    """A layer whose matrix is orthogonal times a scale, and whose bias is 0."""
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs)


class Convolution(nnx.Module):
    """y[i, j] = relu( sum over a window of side `size` at (i, j) * stride of x W + b ), without padding."""

    def __init__(
        self, channels: int, features: int, *, size: int, stride: int = 1, by_index: bool = False, rngs: nnx.Rngs
    ) -> None:
        """Weights for windows of `size` x `size` x `channels`.

        Args:
            channels: of what goes in.
            features: of what comes out.
            size: side of a window.
            stride: steps between windows.
            by_index: windows are gathered by their indices: a tenth faster for small boards, and slow where a gradient
                with respect to the input is asked for.
            rngs: of the weights.
        """
        self.size, self.stride, self.by_index = size, stride, by_index
        self.linear = _linear(size * size * channels, features, np.sqrt(2), rngs)

    def side(self, side: int) -> int:
        """Of what comes out, from that of what goes in."""
        return (side - self.size) // self.stride + 1

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """The layer."""
        rows, columns = self.side(x.shape[1]), self.side(x.shape[2])
        if self.by_index:
            i, j, u, v, c = np.indices((rows, columns, self.size, self.size, x.shape[3]))
            index = ((i * self.stride + u) * x.shape[2] + j * self.stride + v) * x.shape[3] + c
            windows = x.reshape(x.shape[0], -1)[:, index.reshape(rows, columns, -1)]
            return jax.nn.relu(self.linear(windows))
        last = [self.stride * (count - 1) + 1 for count in (rows, columns)]
        windows = [
            x[:, i : i + last[0] : self.stride, j : j + last[1] : self.stride]
            for i in range(self.size)
            for j in range(self.size)
        ]
        return jax.nn.relu(self.linear(jnp.concatenate(windows, axis=-1)))


class Torso(nnx.Module):
    """From what a game shows to a vector of `width` numbers.

    minatar: one convolution of 16 features (Young and Tian 2019); nature: three, of 32, 64 and 64 (Mnih et al. 2015),
    which leave one place of pictures of 42 x 42; small: three of 32, which leave 7 x 7 of them; followed by a layer.
    mlp: two layers.
    """

    def __init__(self, kind: str, shape: Sequence[int], width: int, *, rngs: nnx.Rngs) -> None:
        """A torso of one of the kinds.

        Raises:
            ValueError: there is no such kind, or what is shown does not have its shape.
        """
        if kind not in TORSOS:
            raise ValueError(f"torso is {kind!r}; it must be one of {', '.join(TORSOS)}.")
        if len(shape) != (1 if kind == "mlp" else 3):
            wanted = "one axis" if kind == "mlp" else "height, width and channels"
            raise ValueError(f"the torso {kind!r} reads arrays with {wanted}; the game shows {tuple(shape)}.")
        plan = {
            "minatar": [(16, 3, 1)],
            "nature": [(32, 8, 4), (64, 4, 2), (64, 3, 1)],
            "small": [(32, 3, 2), (32, 3, 2), (32, 3, 1)],
            "mlp": [],
        }[kind]
        sides, channels, layers = list(shape[:2]), shape[-1], []
        for features, size, stride in plan:
            board = kind == "minatar"
            layers.append(Convolution(channels, features, size=size, stride=stride, by_index=board, rngs=rngs))
            sides, channels = [layers[-1].side(side) for side in sides], features
            if min(sides) < 1:
                raise ValueError(f"the torso {kind!r} needs larger pictures than {shape[0]} x {shape[1]}.")
        self.convolutions = nnx.List(layers)
        numbers = channels if kind == "mlp" else sides[0] * sides[1] * channels
        widths = [numbers, width, width] if kind == "mlp" else [numbers, width]
        self.layers = nnx.List(
            [_linear(before, after, np.sqrt(2), rngs) for before, after in itertools.pairwise(widths)]
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "B W"]:
        """The vector of each."""
        for convolution in self.convolutions:
            x = convolution(x)
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


class ActorCritic(nnx.Module):
    """Logits of the actions and the value of what is seen, over T steps of B games."""

    def __init__(
        self,
        shape: Sequence[int],
        actions: int,
        *,
        torso: str = "minatar",
        width: int = 128,
        memory: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        """A network with random weights.

        Args:
            shape: of what a game shows.
            actions: how many there are.
            torso: one of `TORSOS`.
            width: of the torso's last layer.
            memory: width of the LSTM; 0 for none.
            rngs: of the weights.

        Raises:
            ValueError: there is no such torso, or it does not fit the shape.
        """
        self.torso = Torso(torso, shape, width, rngs=rngs)
        self.memory = memory
        self.cell = nnx.OptimizedLSTMCell(width, memory, rngs=rngs) if memory else None
        self.policy = _linear(memory or width, actions, 0.01, rngs)
        self.value = _linear(memory or width, 1, 1.0, rngs)

    def start(self, games: int) -> Memory:
        """What is remembered before a game."""
        return (jnp.zeros((games, self.memory)), jnp.zeros((games, self.memory))) if self.memory else ()

    def __call__(
        self, shown: Any, began: Bool[Array, "B T"], memory: Memory
    ) -> tuple[Float[Array, "B T A"], Float[Array, "B T"], Memory]:
        """Logits and values.

        Args:
            shown: [B, T, *shape] what the games show: bool, bytes of a picture (read as 0 to 1), or floating.
            began: true where a game begins: nothing is remembered of what was before.
            memory: from before the first step.
        """
        batch, steps = shown.shape[:2]
        shown = shown.reshape(batch * steps, *shown.shape[2:])
        x = shown.astype(jnp.float32) / 255 if shown.dtype == jnp.uint8 else shown.astype(jnp.float32)
        x = self.torso(x).reshape(batch, steps, -1)
        if self.cell is not None:
            x, memory = self._remember(x, began, memory)
        return self.policy(x), self.value(x)[..., 0], memory

    def _remember(self, x: Array, began: Array, memory: Memory) -> tuple[Array, Memory]:
        def step(carry, column):
            features, begins = column
            carry = jax.tree.map(lambda leaf: jnp.where(begins[:, None], 0, leaf), carry)
            return self.cell(carry, features)  # pyright: ignore[reportOptionalCall]

        memory, x = jax.lax.scan(step, memory, (jnp.swapaxes(x, 0, 1), began.T))
        return jnp.swapaxes(x, 0, 1), memory
