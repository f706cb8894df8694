"""One optimiser step on a minibatch of a rollout batch: jitted once, its state donated."""

import dataclasses
from typing import Any
from typing import cast

import jax
import jax.numpy as jnp
import optax

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics
from jaxrl_kernels import token_statistics
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.models.sharding import partition_specs
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import LossTerms
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.text.layout import PackedTokens
from jaxrl_llm.training.text.policy import Policy
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateBatch:
    """A rollout batch as the update reads it. Every array has the n packed rows in front; R response tokens per slot.

    Attributes:
        packed: the rows.
        targets: response tokens.
        response_mask: true at response tokens that were sampled.
        advantages: one per sequence.
        log_prob_behaviour: under the policy that sampled, as it recorded them.
        log_prob_old: under the policy at the start of the update; finite, also where that prunes the token.
        log_prob_ref: under the reference policy, where the recipe has one.
        trunk: output of the frozen layers, where there are any.
        hidden_old: states of the policy at the start of the update; with its head they give its whole distribution.
        hidden_ref: states of the reference policy, where the recipe asks for an exact divergence.
        hidden_behaviour: states of the policy that sampled, where it is another one than the old one (quantised
            weights, say); None where it is the old one but for rounding.
    """

    packed: PackedTokens
    targets: Int[Array, "n slots R"]
    response_mask: Bool[Array, "n slots R"]
    advantages: Float[Array, "n slots"]
    log_prob_behaviour: Float[Array, "n slots R"]
    log_prob_old: Float[Array, "n slots R"]
    hidden_old: Float[Array, "n slots R D"]
    trunk: Float[Array, "n W D"] | None = None
    log_prob_ref: Float[Array, "n slots R"] | None = None
    hidden_ref: Float[Array, "n slots R D"] | None = None
    hidden_behaviour: Float[Array, "n slots R D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of the old and of the reference policy; None where the head is frozen and the model's own is the same. And
    of the policy that sampled, where it has states of its own.
    """

    old: Float[Array, "_ _"] | None = None
    ref: Float[Array, "_ _"] | None = None
    behaviour: Float[Array, "_ _"] | None = None


def sampling_policy(batch: UpdateBatch, heads: Heads) -> tuple[Array, Array | None]:
    """States and head of the policy that sampled: its own, or those of the old policy, which it then is."""
    if batch.hidden_behaviour is None:
        return batch.hidden_old, heads.old
    return batch.hidden_behaviour, heads.behaviour


def needs_exact_kl(recipe: Recipe) -> bool:
    """Whether the recipe masks by the exact KL(behaviour || current) of each context."""
    return recipe.mask in ("maximum", "average", "both")


def needs_reference(recipe: Recipe) -> bool:
    """Whether the recipe has a term that pulls towards a reference policy."""
    return recipe.kl_estimator != "none" and recipe.kl_coefficient != 0


def statistics(
    model: Transformer,
    hidden: Float[Array, "n slots R D"],
    targets: Int[Array, "n slots R"],
    *,
    temperature: float,
    hidden_ref: Float[Array, "n slots R D"] | None = None,
    head_ref: Float[Array, "_ _"] | None = None,
    log_min_p: float | None = None,
    names: tuple[str, ...],
) -> TokenStatistics:
    """Per-token statistics of the model's head, shaped `[sequences, R]`; with `hidden_ref` also against a reference,
    with `log_min_p` those of the policy pruned to its safe set.
    """
    head, axis = model.head()
    reference = None
    if hidden_ref is not None:
        reference = Reference(hidden_ref.reshape(-1, hidden_ref.shape[-1]), head if head_ref is None else head_ref)
    flat = token_statistics(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        targets.reshape(-1),
        vocabulary_axis=axis,
        reference=reference,
        temperature=temperature,
        log_min_p=log_min_p,
        statistics=names,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, targets.shape[-1]), flat)


def micro_batch_loss(
    policy: Policy,
    recipe: Recipe,
    model: Transformer,
    batch: UpdateBatch,
    heads: Heads,
    *,
    temperature: float,
    remat: bool,
    fraction: Any,
) -> LossTerms:
    """The recipe's loss on some rows, as (sum, count), with the metrics of `policy_loss`."""
    hidden = policy.hidden(model, batch.packed, batch.trunk, remat=remat)

    def compare(other: Array | None, head: Array | None, *names: str) -> TokenStatistics:
        return statistics(
            model,
            hidden,
            batch.targets,
            temperature=temperature,
            hidden_ref=other,
            head_ref=head,
            log_min_p=recipe.log_min_p,
            names=names,
        )

    needed = ("log_prob", "entropy")
    exact_ref = needs_reference(recipe) and recipe.kl_estimator == "exact"
    stats = compare(*sampling_policy(batch, heads), "kl_reverse", *needed) if needs_exact_kl(recipe) else None
    to_ref = compare(batch.hidden_ref, heads.ref, "kl", *(() if stats else needed)) if exact_ref else None
    first = stats or to_ref or compare(None, None, *needed)

    def rows(array: Array) -> Array:
        return array.reshape(-1, array.shape[-1])

    assert first.log_prob is not None
    return policy_loss(
        recipe,
        log_prob=first.log_prob,
        advantages=batch.advantages.reshape(-1),
        response_mask=rows(batch.response_mask),
        log_prob_old=rows(batch.log_prob_old),
        log_prob_behaviour=rows(batch.log_prob_behaviour),
        log_prob_ref=None if batch.log_prob_ref is None else rows(batch.log_prob_ref),
        # KL(behaviour || current), the policy that sampled being in the arithmetic of the trainer.
        kl_t=None if stats is None else jax.lax.stop_gradient(stats.kl_reverse),
        kl_ref_t=None if to_ref is None else to_ref.kl,
        entropy=first.entropy,
        target_kept=first.target_kept,
        batch_fraction=fraction,
    )


def take_rows(batch: UpdateBatch, rows: Int[Array, " m"]) -> UpdateBatch:
    """Some rows of the batch; a row of -1 is padding: it has no response token, so it is in no sum and no count."""

    def take(leaf: Array) -> Array:
        return constrain(leaf[jnp.maximum(rows, 0)], ("batch", *("sequence",) * (leaf.ndim - 1)))

    taken = jax.tree.map(take, batch)
    return dataclasses.replace(taken, response_mask=taken.response_mask & (rows >= 0)[:, None, None])


def keep_layout(tree: PyTree) -> PyTree:
    """Lay parameters out by the sharding rules, if a mesh is set: each step must return what the next one takes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, cast(Any, mesh)))


class Update:
    """The jitted optimiser step. `traces` counts how often it was compiled: once per shape of its arguments.

    Calling it with (state, frozen, batch, heads, rows, micro_batches) gives (state, metrics). The given state is
    donated: its buffers are reused and it must not be touched afterwards. `rows` [micro-batches, rows] index the
        packed rows; -1 is
    padding. Only the first `micro_batches` micro-batches are computed. Loss and gradient are those of the whole
    minibatch: sums and counts are added over micro-batches and divided once. If either is not finite, parameters and
    optimiser state stay bit for bit as they were and the step counts as skipped.

    Metrics are (sum, count) pairs; those of a skipped step are (0, 0), except `skipped` and `grad_norm`.
    """

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        optimizer: optax.GradientTransformation,
        *,
        temperature: float = 1.0,
        remat: bool = False,
    ) -> None:
        """Fix what is static."""
        self.traces = 0
        self._policy, self._recipe, self._optimizer = policy, recipe, optimizer
        self._static = {"temperature": temperature, "remat": remat}
        self._jitted = jax.jit(self._step, donate_argnums=0)

    def __call__(
        self,
        state: TrainState,
        frozen: PyTree,
        batch: UpdateBatch,
        heads: Heads,
        rows: Int[Array, "A m"],
        micro_batches: int,
    ) -> tuple[TrainState, dict[str, SumCount]]:
        """Take one optimiser step."""
        return self._jitted(state, frozen, batch, heads, rows, jnp.asarray(micro_batches, jnp.int32))

    def gradient(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: UpdateBatch,
        heads: Heads,
        rows: Int[Array, "A m"],
        micro_batches: Any,
    ) -> tuple[PyTree, LossTerms]:
        """Gradient of the minibatch's loss, and the loss with its metrics as (sum, count)."""

        def loss_sum(params: PyTree, some: UpdateBatch) -> tuple[Array, LossTerms]:
            model = self._policy.model(params, frozen)
            terms = micro_batch_loss(
                self._policy, self._recipe, model, some, heads, fraction=1.0 / micro_batches, **self._static
            )
            return terms.loss[0], terms

        gradient = jax.grad(loss_sum, has_aux=True)
        if rows.shape[0] == 1:
            total, terms = gradient(params, take_rows(batch, rows[0]))
        else:
            # The number of micro-batches that hold something differs between minibatches; the program does not.
            # Jitted, so that the loop finds the trace that the shapes were read from.
            gradient = jax.jit(gradient)
            shapes = jax.eval_shape(gradient, params, take_rows(batch, rows[0]))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

            def add(index: Array, sums: Any) -> Any:
                return jax.tree.map(jnp.add, sums, gradient(params, take_rows(batch, rows[index])))

            total, terms = jax.lax.fori_loop(0, micro_batches, add, zeros)
        count = terms.loss[1]
        return jax.tree.map(lambda leaf: safe_divide(leaf, count.astype(leaf.dtype)), total), terms

    def _step(
        self, state: TrainState, frozen: PyTree, batch: UpdateBatch, heads: Heads, rows: Array, micro_batches: Array
    ) -> tuple[TrainState, dict[str, SumCount]]:
        self.traces += 1
        gradient, terms = self.gradient(state.params, frozen, batch, heads, rows, micro_batches)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(terms.loss[0]) & jnp.isfinite(norm)

        def apply(operands: Any) -> tuple[PyTree, PyTree]:
            gradient, opt_state, params = operands
            changes, opt_state = self._optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, changes), opt_state

        def leave(operands: Any) -> tuple[PyTree, PyTree]:
            return operands[2], operands[1]

        params, opt_state = jax.lax.cond(finite, apply, leave, (gradient, state.opt_state, state.params))
        params, opt_state = keep_layout((params, opt_state))
        skipped = jnp.where(finite, 0, 1)
        new_state = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            updates=state.updates + 1 - skipped,
            skipped=state.skipped + skipped,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        one = jnp.ones(())
        metrics = {"loss": terms.loss, **terms.metrics}
        metrics = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), metrics)
        metrics |= {"grad_norm": (norm, one), "skipped": (skipped.astype(jnp.float32), one)}
        return new_state, metrics
