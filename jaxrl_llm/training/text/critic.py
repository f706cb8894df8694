"""The critic: what each context is worth, trained beside the policy by its own loss and optimiser."""

import dataclasses
from typing import Any
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives.values import clipped_value_loss
from jaxrl_llm.objectives.values import explained_variance_sums
from jaxrl_llm.objectives.values import squared_value_loss
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.layout import by_sequence
from jaxrl_llm.training.text.layout import chosen_states
from jaxrl_llm.training.text.layout import through_layers
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount


@dataclasses.dataclass(frozen=True)
class CriticSettings:
    """The critic of signals that need values; others have none.

    Attributes:
        critic: "head" is a linear map of the policy's own states, whose gradient ends there; "model" is a transformer
            of its own that starts as the policy does.
        critic_learning_rate: of Adam on the critic; None takes 1e-3 for a head and 1e-4 for a model.
        value_clip: how far a value may move from the one before the update before its loss has no gradient; None does
            not clip. [units of reward]
    """

    critic: Literal["head", "model"] = "head"
    critic_learning_rate: float | None = None
    value_clip: float | None = None

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        for name in ("critic_learning_rate", "value_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite.")


class Critic:
    """What is static about a critic. Its linear map is float32 and starts at value 0; a transformer of its own has the
    dtypes of the policy's.
    """

    def __init__(self, settings: CriticSettings, model: Transformer) -> None:
        """Read the structure of the policy's model; its weights are copied by `initial`."""
        self.settings = settings
        self._width = model.config.hidden_size
        self._graphdef = nnx.graphdef(merge_lora(model)) if settings.critic == "model" else None
        rate = settings.critic_learning_rate or (1e-3 if settings.critic == "head" else 1e-4)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def initial(self, model: Transformer) -> tuple[PyTree, PyTree]:
        """Parameters and optimiser state before the first update."""
        params: dict[str, Any] = {"weight": jnp.zeros(self._width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
        if self._graphdef is not None:
            params["model"] = jax.tree.map(jnp.copy, nnx.state(merge_lora(model)))
        return params, jax.jit(self._optimizer.init)(params)

    def values(self, params: PyTree, hidden: Float[Array, "n K D"], rows: Rows) -> Float[Array, "n S R"]:
        """The value of the context of each chosen token.

        Args:
            params: of the critic.
            hidden: the policy's states that predict the chosen tokens; a critic of its own does not read them.
            rows: what the model reads.
        """
        if self._graphdef is not None:
            model = nnx.merge(self._graphdef, params["model"])
            x = through_layers(model, model.embed(rows.tokens), rows, start=0).x
            hidden = model.final_norm(chosen_states(x, rows))
        return by_sequence(hidden.astype(jnp.float32) @ params["weight"] + params["bias"], rows)

    def loss(self, params: PyTree, hidden: Float[Array, "n K D"], batch: Any) -> tuple[SumCount, dict[str, SumCount]]:
        """The value loss as (sum, count), and the sums of `critic/explained_variance`, on rows of an `UpdateBatch`."""
        values, clip = self.values(params, hidden, batch.rows), self.settings.value_clip

        def flat(array: Array) -> Array:
            return array.reshape(-1, array.shape[-1])

        arrays = (flat(values), flat(batch.value_targets), flat(batch.response_mask))
        if clip is None:
            loss = squared_value_loss(*arrays)
        else:
            loss = clipped_value_loss(*arrays, flat(batch.values_old), clip=clip)
        return loss, {f"value_{name}": pair for name, pair in explained_variance_sums(*arrays).items()}

    def apply(self, gradient: PyTree, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        """One optimiser step."""
        changes, opt_state = self._optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, changes), opt_state
