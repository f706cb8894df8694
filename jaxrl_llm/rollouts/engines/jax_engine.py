"""The built-in engine: the compiled sampler and scorer behind the engine's interface."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.constrained import TokenMasker
from jaxrl_llm.rollouts.constrained import make_constrained_generate
from jaxrl_llm.rollouts.engines.protocol import EngineSettings
from jaxrl_llm.rollouts.engines.protocol import Stoppable
from jaxrl_llm.rollouts.generate import make_generate
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.scoring import predicting
from jaxrl_llm.rollouts.scoring import response_columns
from jaxrl_llm.rollouts.scoring import score
from jaxrl_llm.rollouts.texts import check_texts
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class JaxEngine(Stoppable):
    """`make_generate` and `score` with a model of their own.

    Args:
        model: what samples; `push_weights` replaces its parameters.
        settings: of the responses.
        decode_dtype: see `make_generate`.
        masker: of the model's tokenizer, for responses in a grammar; it ends at the same tokens as the settings.

    Raises:
        ValueError: the masker has other tokens that end a response.
    """

    def __init__(
        self,
        model: Transformer,
        settings: EngineSettings,
        *,
        decode_dtype: jnp.dtype | type | None = None,
        masker: TokenMasker | None = None,
    ) -> None:
        if masker is not None and set(masker.end_ids) != set(settings.eos_ids):
            raise ValueError(f"masker ends at the tokens {masker.end_ids} and settings at {settings.eos_ids}.")
        self.settings = settings
        self._vocabulary = model.config.vocab_size
        self._graphdef, self._state = nnx.split(model)
        options = {
            "max_new_tokens": settings.max_new_tokens,
            "group_size": settings.group_size,
            "sampling": settings.sampling,
            "pad_id": settings.pad_id,
            "decode_dtype": decode_dtype,
        }
        self._generate = make_generate(self._graphdef, eos_id=tuple(settings.eos_ids), **options)
        self._constrained = None if masker is None else make_constrained_generate(self._graphdef, masker, **options)
        self._score = jax.jit(self._log_probs, static_argnames="response_width")
        self._distributions = jax.jit(self._all_log_probs, static_argnames="response_width")

    def generate(
        self,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int = 0,
        prompt_index: Int[np.ndarray, " N"] | None = None,
        *,
        grammars: Sequence[Grammar | None] | None = None,
    ) -> Rollout:
        """See `Engine.generate`; with `grammars`, one per prompt, see `make_constrained_generate`.

        Raises:
            ValueError: also for grammars without a masker.
        """
        index = jnp.arange(len(prompt_tokens)) if prompt_index is None else jnp.asarray(prompt_index)
        prompts = (jnp.asarray(prompt_tokens), jnp.asarray(prompt_mask))
        if grammars is None:
            return jax.device_get(self._generate(self._state, *prompts, key, step, index))
        if self._constrained is None:
            raise ValueError("grammars were given to an engine without a masker; JaxEngine(.., masker=) takes one.")
        return jax.device_get(self._constrained(self._state, *prompts, key, step, index, grammars=grammars))

    def score(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R"]:
        """See `Engine.score`."""
        check_texts(tokens, token_mask, response_width=response_width, vocabulary=self._vocabulary)
        values = self._score(self._state, jnp.asarray(tokens), jnp.asarray(token_mask), response_width=response_width)
        return np.where(response_columns(np.asarray(token_mask), response_width), np.asarray(values), 0)

    def distributions(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R V"]:
        """See `DistributionEngine.distributions`."""
        check_texts(tokens, token_mask, response_width=response_width, vocabulary=self._vocabulary)
        arrays = (jnp.asarray(tokens), jnp.asarray(token_mask))
        return np.asarray(self._distributions(self._state, *arrays, response_width=response_width))

    def push_weights(self, model: Transformer) -> None:
        """See `Engine.push_weights`; the arrays are copied, since training takes those that it was given over.

        Raises:
            ValueError: a model of another structure.
        """
        _, state = nnx.split(model)
        shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, self._state)]
        if model.config != nnx.merge(self._graphdef, self._state).config or shapes[0] != shapes[1]:
            raise ValueError(
                f"model has the configuration {model.config}, or adapters, that this engine was not built for"
            )
        self._state = jax.tree.map(jnp.copy, state)

    def _log_probs(self, state: nnx.State, tokens: Array, mask: Array, *, response_width: int) -> Array:
        model = nnx.merge(self._graphdef, state)
        found = score(model, tokens, mask, response_width=response_width, statistics=("log_prob",)).log_prob
        assert found is not None
        return found

    def _all_log_probs(self, state: nnx.State, tokens: Array, mask: Array, *, response_width: int) -> Array:
        model = nnx.merge(self._graphdef, state)
        return categorical.log_probs(model.logits(predicting(model(tokens, mask), response_width)))
