"""Policies that never learn and are compared with: the policy before training, or a teacher."""

from typing import Any
from typing import Protocol

import jax
from jax.sharding import Mesh

from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.sharding import shard
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.policy import Policy
from jaxrl_llm.training.text.policy import require_positions
from jaxrl_llm.training.text.policy import whole_policy
from jaxrl_llm.training.text.scoring import Scorer
from jaxrl_llm.training.text.scoring import Scores
from jaxrl_llm.training.text.settings import TrainSettings
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PyTree


class FrozenPolicy(Protocol):
    """Scores batches, and stays as it is."""

    params: PyTree

    def score(self, rows: Rows, trunk: Float[Array, "n W D"] | None) -> tuple[Scores, Float[Array, "_ _"] | None]:
        """What it says about the chosen tokens, and its head, laid out as that of the policy; None where the policy's
        own is the same and never changes. `trunk` is the output of the policy's frozen layers.
        """
        ...


class InitialPolicy:
    """The policy before training: it shares the layers that are frozen."""

    def __init__(self, params: PyTree, frozen: PyTree, policy: Policy, scorer: Scorer) -> None:
        """Keep the parameters, which must not be those that the update takes over."""
        self.params = params
        self._frozen, self._policy, self._scorer = frozen, policy, scorer

    def score(self, rows: Rows, trunk: Any) -> tuple[Scores, Array | None]:
        """See `FrozenPolicy.score`."""
        scores = self._scorer.score(self.params, self._frozen, rows, trunk)
        # Never donated, so its own head can be used as it lies.
        head = self._policy.model(self.params, self._frozen).head()[0] if self._policy.trains_head else None
        return scores, head


class Teacher:
    """Another model with the policy's vocabulary."""

    def __init__(
        self, teacher: Transformer, student: Transformer, settings: TrainSettings, width: int, mesh: Mesh | None = None
    ) -> None:
        """Take the model as it is, adapters merged, and lay it out on the mesh as the policy is, where there is one;
        rows have up to `width` tokens.

        Raises:
            ValueError: its vocabulary has another size.
        """
        sizes = teacher.config.vocab_size, student.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the teacher has a vocabulary of {sizes[0]} tokens and the policy one of {sizes[1]}; a divergence "
                "between them needs the same tokens."
            )
        require_positions(teacher, width, "teacher")
        policy, params = whole_policy(merge_lora(teacher))
        self.params = params if mesh is None else shard(params, mesh)
        head, axis = policy.model(self.params).head()
        self._head = head if axis == student.head()[1] else head.T
        self._scorer = Scorer(policy, temperature=settings.sampling.temperature, rows=settings.update.score_rows)

    def score(self, rows: Rows, trunk: Any) -> tuple[Scores, Array | None]:
        """See `FrozenPolicy.score`."""
        del trunk  # of other layers
        return self._scorer.score(self.params, None, rows), jax.numpy.asarray(self._head)
