"""What an inference engine is here: it samples groups of responses and says under which log-probability, it scores
tokens that it is given, and it takes new weights. Prompts and responses are token ids on both sides, never text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Protocol
from typing import Self
from typing import runtime_checkable

import numpy as np

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class EngineError(RuntimeError):
    """An engine did not do what was asked of it; the sentence says which one, what happened and what helps."""


class IncompleteRolloutsError(EngineError):
    """Some rollouts of a batch could not be had.

    Attributes:
        completed: rollouts that are complete; the engine keeps them for the next call with the same arguments, or until
            weights are pushed.
        wanted: rollouts of the batch.
    """

    def __init__(self, completed: int, wanted: int, reason: str) -> None:
        self.completed, self.wanted = completed, wanted
        super().__init__(
            f"{completed} of {wanted} rollouts are complete and kept; call generate again with the same arguments to "
            f"ask for the other {wanted - completed} only. What went wrong: {reason}"
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What every engine has to know about the responses.

    Attributes:
        max_new_tokens: R, the width of the responses.
        group_size: G, responses per prompt.
        eos_ids: tokens that end a response; a tuple whatever was given.
        pad_id: token written after the end.
        sampling: temperature and truncation.

    Raises:
        ValueError: a size below 1.
    """

    max_new_tokens: int
    group_size: int
    eos_ids: Sequence[int]
    pad_id: int
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))  # so that settings can be hashed


class Engine(Protocol):
    """An inference engine; as a context manager it is stopped at the end."""

    settings: EngineSettings

    def generate(
        self,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int = 0,
        prompt_index: Int[np.ndarray, " N"] | None = None,
    ) -> Rollout:
        """G responses to every prompt, with the log-probability that each token was drawn with.

        Args:
            prompt_tokens: left-padded prompts.
            prompt_mask: true at real tokens.
            key, step, prompt_index: what the random numbers of a rollout are made of, together with the number of the
                sample in its group; prompt_index None is 0 .. N - 1.

        Returns:
            the rollout, row = prompt * G + sample.

        Raises:
            ValueError: the prompts do not fit. EngineError: the engine failed.
        """
        ...

    def score(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R"]:
        """Log-probability of every response token under the engine's whole softmax, at temperature 1 [nats].

        Args:
            tokens: left-padded prompts followed by responses.
            token_mask: which tokens are real.
            response_width: R, the last columns, which hold the responses.

        Returns:
            one number per response token, 0 at padding.

        Raises:
            ValueError: the shapes do not fit. EngineError: the engine failed.
        """
        ...

    def push_weights(self, model: Transformer) -> None:
        """From now on, sample with the weights of this model (adapters merged).

        Raises:
            ValueError: the model does not fit the engine.
        """
        ...

    def stop(self) -> None:
        """Free what the engine holds; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable
class DistributionEngine(Engine, Protocol):
    """An engine that gives whole next-token distributions."""

    def distributions(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R V"]:
        """Log-probabilities of the whole vocabulary in the context of every response token, at temperature 1 [nats].

        Args, Raises as `Engine.score`. What stands at padding means nothing.
        """
        ...


class Stoppable:
    """The context manager that every engine is."""

    def stop(self) -> None:
        """Free what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
