"""Sample a group of responses to every prompt of a batch, in one compiled program."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.perturb.logits import LogitPerturbation
from jaxrl_llm.rollouts.perturb.rounding import Rounding
from jaxrl_llm.rollouts.responses import DecodePlan
from jaxrl_llm.rollouts.responses import Progress
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.responses import as_rollout
from jaxrl_llm.rollouts.responses import read_last
from jaxrl_llm.rollouts.responses import read_prompts
from jaxrl_llm.rollouts.responses import ready
from jaxrl_llm.rollouts.responses import record_draw
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.texts import check_left_padded
from jaxrl_llm.rollouts.texts import check_mask
from jaxrl_llm.rollouts.texts import check_tokens
from jaxrl_llm.rollouts.texts import require_arrays
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey


class Generate(Protocol):
    """What `make_generate` returns."""

    def __call__(
        self,
        state: nnx.State,
        prompt_tokens: Int[Array, "N P"],
        prompt_mask: Bool[Array, "N P"],
        key: PRNGKey,
        step: Int[Array, ""] | int,
        prompt_index: Int[Array, " N"],
        sample_index: Int[Array, " G"] | None = None,
        noise_key: PRNGKey | None = None,
    ) -> Rollout:
        """Sample the responses; `sample_index` None is 0 .. G - 1, `noise_key` None is key 0."""
        ...


def make_generate(
    graphdef: nnx.GraphDef[Transformer],
    *,
    max_new_tokens: int,
    group_size: int,
    sampling: SamplingSettings,
    eos_id: int | Sequence[int],
    pad_id: int,
    decode_dtype: jnp.dtype | type | None = None,
    perturb_logits: LogitPerturbation | None = None,
    cache_rounding: Rounding | None = None,
    record_selections: bool = False,
) -> Generate:
    """A compiled sampler for models of one structure.

    Each prompt is read once, whatever the group size; then one token of every row is made per step until all rows have
    ended. Sample s of prompt n draws with fold_in(fold_in(fold_in(key, step), prompt_index[n]), sample_index[s]), then
    fold_in of the token's number, whatever else is in the batch. So one rollout is regenerated alone by a sampler with
    group_size=1 that is given its prompt, its prompt_index and its sample_index. (Two batch sizes may round a product
    differently; a draw that falls within that rounding of the edge between two tokens can then differ.)

    Args:
        graphdef: first half of `nnx.split(model)`.
        max_new_tokens: R, the width of the responses.
        group_size: G, responses per prompt.
        sampling: temperature and truncation.
        eos_id: token that ends a response, or several; with an empty sequence every response has full width.
        pad_id: token written after the end.
        decode_dtype: of the decode loop's products and cache; None for the model's compute dtype. The prompts are
            always read in the model's own precision.
        perturb_logits: makes the sampler another policy than the model (`rollouts.perturb`); the recorded log-probs are
            those of the policy that sampled. Perturbed weights are given as the state.
        cache_rounding: acts on keys and values of prompts and responses before anything attends to them.
        record_selections: keep which experts each token was sent to, so that a trainer can send it there too.

    Returns:
        A function of (state, prompt_tokens [N, P], prompt_mask [N, P], key, step, prompt_index [N],
        sample_index [G] = 0 .. G - 1, noise_key = key 0) that returns a Rollout; `noise_key` is the root of the noise
        that `perturb_logits` draws.

    Raises:
        TypeError: from the returned function, for prompts that are no arrays.
        ValueError: for sizes or tokens that cannot be; from the returned function, before it computes anything, for
            arguments that do not fit, prompts that are not left-padded or empty, and prompt tokens that are none of the
            vocabulary (these two are values: not seen inside another jit).
    """
    plan = DecodePlan.of(
        max_new_tokens=max_new_tokens,
        group_size=group_size,
        sampling=sampling,
        eos_id=eos_id,
        pad_id=pad_id,
        decode_dtype=decode_dtype,
    )
    changed = {"perturb_logits": perturb_logits, "cache_rounding": cache_rounding}
    return compiled_sampler(graphdef, plan._replace(**changed, record_selections=record_selections), _generate)


def compiled_sampler(graphdef: nnx.GraphDef, plan: DecodePlan, draw: Callable[..., Rollout]) -> Generate:
    """The sampler that draws so, compiled; what it is given is looked at first.

    Args:
        graphdef: of what `draw` reads; its `config` is that of the model.
        plan: what is fixed.
        draw: (merged graphdef, plan, prompt_tokens, prompt_mask, keys [B], noise_key) -> Rollout.

    Returns:
        see `make_generate`, what it raises too.
    """

    @jax.jit
    def compiled(state, prompt_tokens, prompt_mask, key, step, prompt_index, sample_index=None, noise_key=None):
        model = nnx.merge(graphdef, state)
        given = ready(model.config, plan, prompt_tokens, prompt_mask, key, step, prompt_index, sample_index)
        return draw(model, plan, *given, noise_key)

    sizes: list[int] = []  # of the vocabulary, once a state was seen

    def generate(state, prompt_tokens, prompt_mask, *arguments, **options):
        if not sizes:
            sizes.append(nnx.merge(graphdef, state).config.vocab_size)
        check_prompts(prompt_tokens, prompt_mask, vocabulary=sizes[0])
        return compiled(state, prompt_tokens, prompt_mask, *arguments, **options)

    return generate


def _generate(
    model: Transformer,
    plan: DecodePlan,
    prompt_tokens: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    keys: Key[Array, " B"],
    noise_key: PRNGKey | None,
) -> Rollout:
    begun, logits, progress = read_prompts(model, plan, prompt_tokens, prompt_mask, keys, noise_key)

    def unfinished(progress: Progress):
        return (progress.count < plan.max_new_tokens) & ~jnp.all(progress.ended)

    def advance(progress: Progress) -> Progress:
        return record_draw(plan, keys, *read_last(plan, begun, progress))

    progress = jax.lax.while_loop(unfinished, advance, record_draw(plan, keys, logits, progress))
    return as_rollout(plan, prompt_tokens, prompt_mask, progress)


def check_prompts(prompt_tokens: Int[Array, "N P"], prompt_mask: Bool[Array, "N P"], *, vocabulary: int) -> None:
    """What can be said of prompts before anything is computed; see `make_generate`.

    Raises:
        TypeError: they are no arrays.
        ValueError: they are not left-padded or empty, or hold tokens that are none of the vocabulary.
    """
    require_arrays(prompt_tokens=prompt_tokens, prompt_mask=prompt_mask)
    if prompt_tokens.ndim == 2 and prompt_mask.shape == prompt_tokens.shape and prompt_tokens.size:
        check_mask("prompt_mask", prompt_mask)
        check_tokens("prompt_tokens", prompt_tokens, prompt_mask, vocabulary=vocabulary)
        check_left_padded("prompt_mask", prompt_mask)
