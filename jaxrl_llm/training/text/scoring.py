"""Forward passes over a whole rollout batch: the policy before the update, and how far the update moved it."""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.rollouts.perturb import WeightPerturbation
from jaxrl_llm.training.text.layout import PackedTokens
from jaxrl_llm.training.text.policy import Policy
from jaxrl_llm.training.text.update import Heads
from jaxrl_llm.training.text.update import UpdateBatch
from jaxrl_llm.training.text.update import sampling_policy
from jaxrl_llm.training.text.update import statistics
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What a policy says about the sampled tokens, a log-prob of -inf where it prunes; rows as in `UpdateBatch`."""

    trunk: Float[Array, "n W D"] | None
    hidden: Float[Array, "n slots R D"]
    log_prob: Float[Array, "n slots R"]
    entropy: Float[Array, "n slots R"]


class Shift(NamedTuple):
    """The policy after the update (pi) against the one that sampled (mu), at every sampled context; `[B, R]`, padding
    included. Where the sampler has no weights of its own, mu is the policy before the update, as the trainer has it.
    Both are whole: neither pruned nor truncated.

    log_ratio: log pi(y_t|c_t) - log mu(y_t|c_t) of the sampled token [nats].
    kl: KL(mu || pi) [nats]. kl_reverse: KL(pi || mu) [nats]. total_variation: [prob].
    """

    log_ratio: Float[Array, "B R"]
    kl: Float[Array, "B R"]
    kl_reverse: Float[Array, "B R"]
    total_variation: Float[Array, "B R"]


class Scorer:
    """The jitted passes; `rows` packed rows at a time (0: all at once), which bounds their memory."""

    def __init__(
        self, policy: Policy, *, temperature: float = 1.0, rows: int = 0, log_min_p: float | None = None
    ) -> None:
        """Fix what is static; `log_min_p` prunes the policy that `score` scores, not those that `shift` compares."""
        self._policy, self._temperature, self._rows, self._log_min_p = policy, temperature, rows, log_min_p
        self._score = jax.jit(self._score_batch)
        self._shift = jax.jit(self._shift_batch)
        self._behaviour = jax.jit(self._behaviour_batch, static_argnums=0)

    def score(
        self,
        params: PyTree,
        frozen: PyTree,
        packed: PackedTokens,
        targets: Int[Array, "n slots R"],
        trunk: Float[Array, "n W D"] | None = None,
    ) -> Scores:
        """Score the sampled tokens, from a `trunk` that was computed before where one is given."""
        return self._score(params, frozen, packed, targets, trunk)

    def behaviour(
        self, weights: WeightPerturbation, params: PyTree, frozen: PyTree, packed: PackedTokens
    ) -> tuple[Float[Array, "n slots R D"], Float[Array, "_ _"]]:
        """States and head of a sampler whose weights are perturbed, on the sampled texts."""
        return self._behaviour(weights, params, frozen, packed)

    def shift(self, params: PyTree, frozen: PyTree, batch: UpdateBatch, heads: Heads) -> Shift:
        """Compare the policy with these parameters to the one that sampled, whose states `batch` and `heads` hold."""
        return self._shift(params, frozen, batch, heads)

    def _in_chunks(self, function: Any, arguments: Any) -> Any:
        count = jax.tree.leaves(arguments)[0].shape[0]
        if not 0 < self._rows < count:
            return function(arguments)
        chunks = -(-count // self._rows)
        # The last chunk is filled up with the first row, whose results are cut off again.
        index = jnp.arange(chunks * self._rows)
        index = jnp.where(index < count, index, 0).reshape(chunks, self._rows)
        results = jax.lax.map(lambda rows: function(jax.tree.map(lambda leaf: leaf[rows], arguments)), index)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], results)

    def _score_batch(self, params: PyTree, frozen: PyTree, packed: PackedTokens, targets: Array, trunk: Any) -> Scores:
        model = self._policy.model(params, frozen)

        def score(some: tuple[PackedTokens, Array, Any]) -> Scores:
            packed, targets, trunk = some
            trunk = self._policy.trunk(model, packed) if trunk is None else trunk
            hidden = self._policy.hidden(model, packed, trunk)
            stats = statistics(
                model,
                hidden,
                targets,
                temperature=self._temperature,
                log_min_p=self._log_min_p,
                names=("log_prob", "entropy"),
            )
            assert stats.log_prob is not None
            assert stats.entropy is not None
            return Scores(trunk, hidden, stats.log_prob.reshape(targets.shape), stats.entropy.reshape(targets.shape))

        return self._in_chunks(score, (packed, targets, trunk))

    def _behaviour_batch(
        self, weights: WeightPerturbation, params: PyTree, frozen: PyTree, packed: PackedTokens
    ) -> tuple[Array, Array]:
        graphdef, state = nnx.split(merge_lora(self._policy.model(params, frozen)))
        model = nnx.merge(graphdef, weights(state))

        def hidden(some: PackedTokens) -> Array:
            return self._policy.hidden(model, some, self._policy.trunk(model, some))

        return self._in_chunks(hidden, packed), model.head()[0]

    def _shift_batch(self, params: PyTree, frozen: PyTree, batch: UpdateBatch, heads: Heads) -> Shift:
        model = self._policy.model(params, frozen)

        def shift(some: UpdateBatch) -> Shift:
            hidden = self._policy.hidden(model, some.packed, some.trunk)
            hidden_mu, head_mu = sampling_policy(some, heads)
            log_prob_mu = some.log_prob_old if some.hidden_behaviour is None else some.log_prob_behaviour
            stats = statistics(
                model,
                hidden,
                some.targets,
                temperature=self._temperature,
                hidden_ref=hidden_mu,
                head_ref=head_mu,
                names=("log_prob", "kl", "kl_reverse", "total_variation"),
            )
            shape = some.targets.shape
            rows = [
                leaf.reshape(shape)
                for leaf in (stats.log_prob, stats.kl_reverse, stats.kl, stats.total_variation)
                if leaf is not None
            ]
            return Shift(rows[0] - log_prob_mu, *rows[1:])

        rows = self._in_chunks(shift, batch)
        return Shift(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in rows))
