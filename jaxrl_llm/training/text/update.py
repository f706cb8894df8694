"""One optimiser step on a minibatch of experience: jitted once per shape, its state donated."""

import dataclasses
from collections.abc import Callable
from typing import Any
from typing import NamedTuple
from typing import cast

import jax
import jax.numpy as jnp
import optax

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.models.sharding import partition_specs
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import LossTerms
from jaxrl_llm.rollouts import score_hidden
from jaxrl_llm.testing import Batch
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.text.critic import Critic
from jaxrl_llm.training.text.further import further_loss
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.layout import by_sequence
from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.training.text.objective import NEVER_MADE
from jaxrl_llm.training.text.objective import Extras
from jaxrl_llm.training.text.objective import Objective
from jaxrl_llm.training.text.policy import Forward
from jaxrl_llm.training.text.policy import Policy
from jaxrl_llm.training.text.routers import divided
from jaxrl_llm.training.text.routers import gradient_norm
from jaxrl_llm.training.text.routers import load_metrics
from jaxrl_llm.training.text.routers import router_terms
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateBatch:
    """A batch of experience as the update reads it: n rows of S sequences, R chosen tokens of each, K of a row.

    Attributes:
        rows: what the model reads.
        response_mask: true at chosen tokens that count.
        group_ids: equal for sequences that are compared with each other; unique where there is no sequence.
        step_ids: step of each chosen token.
        rewards: what each sequence earned.
        advantages: of each chosen token, the signal's weights included.
        log_prob_behaviour: under the policy that sampled, as it recorded them; None where nobody did.
        log_prob_old: under the policy at the start of the update; finite, also where that prunes the token.
        hidden_old: states of the policy at the start of the update, where its whole distribution is read, which they
            give with its head.
        trunk: output of the frozen layers, where there are any.
        log_prob_ref: under the reference policy, where the objective reads it.
        hidden_ref: states of the reference policy, where the objective asks for an exact divergence.
        hidden_behaviour: states of the policy that sampled, where it is another one than the old one (quantised
            weights, say); None where it is the old one but for rounding.
        values_old: of the critic at the start of the update, where there is one.
        value_targets: what the critic is trained towards.
    """

    rows: Rows
    response_mask: Bool[Array, "n S R"]
    group_ids: Int[Array, "n S"]
    step_ids: Int[Array, "n S R"]
    rewards: Float[Array, "n S"]
    advantages: Float[Array, "n S R"]
    log_prob_old: Float[Array, "n S R"]
    hidden_old: Float[Array, "n K D"] | None = None
    log_prob_behaviour: Float[Array, "n S R"] | None = None
    trunk: Float[Array, "n W D"] | None = None
    log_prob_ref: Float[Array, "n S R"] | None = None
    hidden_ref: Float[Array, "n K D"] | None = None
    hidden_behaviour: Float[Array, "n K D"] | None = None
    values_old: Float[Array, "n S R"] | None = None
    value_targets: Float[Array, "n S R"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of the old and of the reference policy; None where the head is frozen and the model's own is the same, or
    where nobody reads it. And of the policy that sampled, where it has states of its own.
    """

    old: Float[Array, "_ _"] | None = None
    ref: Float[Array, "_ _"] | None = None
    behaviour: Float[Array, "_ _"] | None = None


class Sums(NamedTuple):
    """What the micro-batches of a minibatch add up to: the loss with its metrics, and the critic's, as (sum, count)."""

    terms: LossTerms
    value: SumCount | None


def sampling_policy(batch: UpdateBatch, heads: Heads) -> tuple[Array, Array | None]:
    """States and head of the policy that sampled: its own, or those of the old policy, which it then is."""
    if batch.hidden_behaviour is None:
        assert batch.hidden_old is not None
        return batch.hidden_old, heads.old
    return batch.hidden_behaviour, heads.behaviour


def statistics(
    model: Transformer,
    hidden: Float[Array, "n K D"],
    rows: Rows,
    *,
    temperature: float,
    hidden_ref: Float[Array, "n K E"] | None = None,
    head_ref: Float[Array, "_ _"] | None = None,
    log_min_p: float | None = None,
    names: tuple[str, ...],
) -> TokenStatistics:
    """Statistics of the model's head at the chosen tokens, each `[n, S, R]`; with `hidden_ref` also against a
    reference, with `log_min_p` those of the policy pruned to its safe set.
    """
    head, axis = model.head()
    reference = None if hidden_ref is None else Reference(hidden_ref, head if head_ref is None else head_ref)
    found = score_hidden(
        hidden,
        head,
        rows.targets,
        vocabulary_axis=axis,
        reference=reference,
        temperature=temperature,
        log_min_p=log_min_p,
        statistics=names,
    )
    return jax.tree.map(lambda leaf: by_sequence(leaf, rows), found)


def micro_batch_loss(
    policy: Policy,
    objective: Objective,
    model: Transformer,
    batch: UpdateBatch,
    heads: Heads,
    *,
    temperature: float,
    remat: bool,
    fraction: Any,
) -> tuple[LossTerms, Forward]:
    """The objective's loss on some rows, as (sum, count), with its metrics; and the forward pass."""
    forward = policy.forward(model, batch.rows, batch.trunk, remat=remat)

    def compare(other: Array | None, head: Array | None, *names: str) -> TokenStatistics:
        return statistics(
            model,
            forward.hidden,
            batch.rows,
            temperature=temperature,
            hidden_ref=other,
            head_ref=head,
            log_min_p=objective.log_min_p,
            names=names,
        )

    needed = ("log_prob", "entropy")
    # KL(behaviour || current), the policy that sampled being in the arithmetic of the trainer.
    to_mu = compare(*sampling_policy(batch, heads), "kl_reverse", *needed) if "kl_t" in objective.needs else None
    exact = {"kl_ref_t": "kl", "kl_from_ref_t": "kl_reverse"}
    wanted = tuple(statistic for name, statistic in exact.items() if name in objective.needs)
    to_ref = compare(batch.hidden_ref, heads.ref, *wanted, *(() if to_mu else needed)) if wanted else None
    first = to_mu or to_ref or compare(None, None, *needed)

    def flat(array: Array | None) -> Array | None:
        # One row per sequence.
        return None if array is None else array.reshape(-1, *array.shape[2:])

    # What nobody reads is None, whatever the types say.
    fields: dict[str, Any] = {
        "tokens": flat(by_sequence(batch.rows.targets, batch.rows)),
        "response_mask": flat(batch.response_mask),
        "group_ids": flat(batch.group_ids),
        "rewards": flat(batch.rewards),
        # The first chosen token has the advantage of its sequence, where sequences have one.
        "advantages": flat(batch.advantages[..., 0] if objective.per_sequence else batch.advantages),
        **dict.fromkeys(NEVER_MADE),
        "log_prob": flat(first.log_prob),
        "log_prob_old": flat(batch.log_prob_old),
        "log_prob_behaviour": flat(batch.log_prob_behaviour),
        "log_prob_ref": flat(batch.log_prob_ref),
        "entropy": flat(first.entropy),
        "kl_t": None if to_mu is None else flat(to_mu.kl_reverse),
        "kl_ref_t": None if to_ref is None else flat(to_ref.kl),
        "kl_from_ref_t": None if to_ref is None else flat(to_ref.kl_reverse),
        "step_ids": flat(batch.step_ids),
    }
    return objective.loss(Batch(**fields), Extras(fraction, flat(first.target_kept))), forward


def take_rows(batch: UpdateBatch, rows: Int[Array, " m"]) -> UpdateBatch:
    """Some rows of the batch; a row of -1 is padding: it has no chosen token and no group, so it is in no sum and no
    count, and compared with nothing.
    """

    def take(leaf: Array) -> Array:
        return constrain(leaf[jnp.maximum(rows, 0)], ("batch", *("sequence",) * (leaf.ndim - 1)))

    taken = jax.tree.map(take, batch)
    real = rows >= 0
    alone = -1 - jnp.arange(taken.group_ids.size, dtype=taken.group_ids.dtype).reshape(taken.group_ids.shape)
    return dataclasses.replace(
        taken,
        rows=dataclasses.replace(taken.rows, token_mask=taken.rows.token_mask & real[:, None]),
        response_mask=taken.response_mask & real[:, None, None],
        group_ids=jnp.where(real[:, None], taken.group_ids, alone + jnp.iinfo(jnp.int32).min // 2),
    )


def keep_layout(tree: PyTree) -> PyTree:
    """Lay parameters out by the sharding rules, if a mesh is set: each step must return what the next one takes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, cast(Any, mesh)))


class Update:
    """The jitted optimiser step. `traces` counts how often it was compiled: once per shape of its arguments.

    Calling it with (state, frozen, batch, heads, rows, micro_batches) gives (state, metrics). The given state is
    donated: its buffers are reused and it must not be touched afterwards. `rows` [micro-batches, rows] index the rows
    of the batch; -1 is padding. Only the first `micro_batches` micro-batches are computed. Loss and gradient are those
    of the whole minibatch: sums and counts are added over micro-batches and divided once. A critic is trained in the
    same step, by its own loss and optimiser. If a loss or a gradient is not finite, parameters and optimiser states
    stay bit for bit as they were and the step counts as skipped.

    Metrics are (sum, count) pairs; those of a skipped step are (0, 0), except `skipped` and `grad_norm`.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        critic: Critic | None = None,
        temperature: float = 1.0,
        settings: UpdateSettings | None = None,
    ) -> None:
        """Fix what is static; `settings` are the default ones where none are given."""
        settings = UpdateSettings() if settings is None else settings
        self.traces, self._settings = 0, settings
        weights = {"router_balance_loss": settings.router_balance, "mtp_loss": settings.mtp_weight}
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._policy, self._objective, self._optimizer, self._critic = policy, objective, optimizer, critic
        self._static: Any = {"temperature": temperature, "remat": settings.remat}
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
        (gradient, _), sums = self._gradients((params, ()), frozen, batch, heads, rows, micro_batches)
        return gradient, sums.terms

    def _gradients(
        self, trained: tuple[PyTree, PyTree], frozen: PyTree, batch: UpdateBatch, heads: Heads, rows: Any, count: Any
    ) -> tuple[tuple[PyTree, PyTree], Sums]:
        # Gradients of the policy's loss and of the critic's, each divided by its own count.
        def pieces(trained: tuple[PyTree, PyTree], some: UpdateBatch) -> Any:
            model = self._policy.model(trained[0], frozen)
            terms, forward = micro_batch_loss(
                self._policy, self._objective, model, some, heads, fraction=1.0 / count, **self._static
            )
            layers = zip(self._policy.blocks(model), forward.routes, strict=True)
            losses, sent = {}, [(*layer, some.rows.token_mask) for layer in layers]
            if "mtp_loss" in self._weights:
                detached = self._settings.mtp_detached
                further = further_loss(
                    model, forward.x, some.rows, some.response_mask, detached=detached, **self._static
                )
                losses["mtp_loss"] = further.loss
                sent.append((model.further[0].block, further.routes, further.token_mask))
            named, even = router_terms(sent)
            losses |= {} if even is None else {"router_balance_loss": even}
            return terms, forward.hidden, named, losses

        def over_micro_batches(function: Callable[[UpdateBatch], Any]) -> Any:
            if rows.shape[0] == 1:
                return function(take_rows(batch, rows[0]))
            # The number of micro-batches that hold something differs between minibatches; the program does not.
            # Jitted, so that the loop finds the trace that the shapes were read from.
            function = jax.jit(function)
            shapes = jax.eval_shape(function, take_rows(batch, rows[0]))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

            def add(index: Array, sums: Any) -> Any:
                return jax.tree.map(jnp.add, sums, function(take_rows(batch, rows[index])))

            return jax.lax.fori_loop(0, count, add, zeros)

        def counts(some: UpdateBatch) -> tuple[Array, dict[str, Array]]:
            terms, _, _, losses = pieces(trained, some)
            return terms.loss[1], {name: losses[name][1] for name in self._weights}

        # The other losses have counts of their own: times this, their sums can be divided by that of the objective.
        scale = {}
        if self._weights:
            of_objective, own = over_micro_batches(counts)
            scale = {name: weight * safe_divide(of_objective, own[name]) for name, weight in self._weights.items()}

        def loss_sum(trained: tuple[PyTree, PyTree], some: UpdateBatch) -> tuple[Array, Sums]:
            terms, hidden, named, losses = pieces(trained, some)
            added = named + sum(factor * losses[name][0] for name, factor in scale.items())
            terms = LossTerms((terms.loss[0] + added, terms.loss[1]), terms.metrics | losses)
            if self._critic is None or not jax.tree.leaves(trained[1]):
                return terms.loss[0], Sums(terms, None)
            # The critic's gradient ends at the states, so one backward pass serves both.
            value, explained = self._critic.loss(trained[1], jax.lax.stop_gradient(hidden), some)
            terms = terms._replace(metrics=terms.metrics | explained)
            return terms.loss[0] + value[0], Sums(terms, value)

        gradient = jax.grad(loss_sum, has_aux=True)
        total, sums = over_micro_batches(lambda some: gradient(trained, some))
        critic = total[1] if sums.value is None else divided(total[1], sums.value[1])
        return (divided(total[0], sums.terms.loss[1]), critic), sums

    def _step(
        self, state: TrainState, frozen: PyTree, batch: UpdateBatch, heads: Heads, rows: Array, micro_batches: Array
    ) -> tuple[TrainState, dict[str, SumCount]]:
        self.traces += 1
        trained = (state.params, state.critic)
        gradients, sums = self._gradients(trained, frozen, batch, heads, rows, micro_batches)
        norm = gradient_norm(gradients[0])
        finite = jnp.isfinite(sums.terms.loss[0]) & jnp.isfinite(norm)
        if sums.value is not None:
            finite = finite & jnp.isfinite(sums.value[0]) & jnp.isfinite(optax.tree.norm(gradients[1]))
        before = (state.params, state.opt_state, state.critic, state.critic_opt_state)

        def apply(operands: Any) -> Any:
            gradients, (params, opt_state, critic, critic_opt_state) = operands
            changes, opt_state = self._optimizer.update(gradients[0], opt_state, params)
            params = optax.apply_updates(params, changes)
            if self._critic is not None:
                critic, critic_opt_state = self._critic.apply(gradients[1], critic, critic_opt_state)
            return params, opt_state, critic, critic_opt_state

        def leave(operands: Any) -> Any:
            return operands[1]

        after = jax.lax.cond(finite, apply, leave, (gradients, before))
        params, opt_state, critic, critic_opt_state = keep_layout(after)
        skipped = jnp.where(finite, 0, 1)
        new_state = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            critic=critic,
            critic_opt_state=critic_opt_state,
            updates=state.updates + 1 - skipped,
            skipped=state.skipped + skipped,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        one = jnp.ones(())
        metrics = {"loss": sums.terms.loss, **sums.terms.metrics, **load_metrics(gradients[0])}
        metrics |= {} if sums.value is None else {"value_loss": sums.value}
        metrics = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), metrics)
        metrics |= {"grad_norm": (norm, one), "skipped": (skipped.astype(jnp.float32), one)}
        return new_state, metrics
