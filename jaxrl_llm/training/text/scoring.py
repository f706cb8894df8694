"""Forward passes over a whole batch of experience: the policy before the update, a reference, and how far the update
moved the policy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.rollouts.perturb import WeightPerturbation
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.policy import Policy
from jaxrl_llm.training.text.routers import own_choices
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
    """What a policy says about the chosen tokens, a log-prob of -inf where it prunes; rows as in `UpdateBatch`.

    collision, and choices, the experts that the routers of the layers that learn prefer, are None unless they were
    asked for.
    """

    trunk: Float[Array, "n W D"] | None
    hidden: Float[Array, "n K D"]
    log_prob: Float[Array, "n S R"]
    entropy: Float[Array, "n S R"]
    collision: Float[Array, "n S R"] | None = None
    choices: Int[Array, "n W K k"] | None = None


class Shift(NamedTuple):
    """The policy after the update (pi) against the one that sampled (mu), at every context in which a token was chosen;
    `[n, S, R]`, padding included. Where the sampler has no weights of its own, mu is the policy before the update, as
    the trainer has it. Both are whole: neither pruned nor truncated.

    log_ratio: log pi(y_t|c_t) - log mu(y_t|c_t) of the sampled token [nats].
    kl: KL(mu || pi) [nats]. kl_reverse: KL(pi || mu) [nats]. total_variation: [prob].
    """

    log_ratio: Float[Array, "n S R"]
    kl: Float[Array, "n S R"]
    kl_reverse: Float[Array, "n S R"]
    total_variation: Float[Array, "n S R"]


class Scorer:
    """The jitted passes; `rows` rows at a time (0: all at once), which bounds their memory."""

    def __init__(
        self,
        policy: Policy,
        *,
        temperature: float = 1.0,
        rows: int = 0,
        log_min_p: float | None = None,
        collision: bool = False,
        choices: bool = False,
    ) -> None:
        """Fix what is static.

        Args:
            policy: what is static of the policy that is asked.
            temperature: of it.
            rows: scored at a time.
            log_min_p: prunes the policy that `score` scores, not those that `shift` compares.
            collision: whether `score` gives the collision probabilities too.
            choices: whether it gives the choices of routers.
        """
        self._policy, self._temperature, self._rows, self._log_min_p = policy, temperature, rows, log_min_p
        self._choices = choices
        self._names = ("log_prob", "entropy", *(("collision",) if collision else ()))
        self._score = jax.jit(self._score_batch)
        self._divergence = jax.jit(self._divergence_batch)
        self._shift = jax.jit(self._shift_batch)
        self._behaviour = jax.jit(self._behaviour_batch, static_argnums=0)

    def score(self, params: PyTree, frozen: PyTree, rows: Rows, trunk: Float[Array, "n W D"] | None = None) -> Scores:
        """Score the chosen tokens, from a `trunk` that was computed before where one is given."""
        return self._score(params, frozen, rows, trunk)

    def divergence(
        self,
        params: PyTree,
        frozen: PyTree,
        rows: Rows,
        hidden: Float[Array, "n K D"],
        hidden_ref: Float[Array, "n K E"],
        head_ref: Float[Array, "_ _"] | None,
    ) -> Float[Array, "n S R"]:
        """Exact KL(pi || ref) in the context of each chosen token, from states that exist [nats]."""
        return self._divergence(params, frozen, rows, hidden, hidden_ref, head_ref)

    def behaviour(
        self, weights: WeightPerturbation, params: PyTree, frozen: PyTree, rows: Rows
    ) -> tuple[Float[Array, "n K D"], Float[Array, "_ _"]]:
        """States and head of a sampler whose weights are perturbed, on the sampled texts."""
        return self._behaviour(weights, params, frozen, rows)

    def shift(self, params: PyTree, frozen: PyTree, batch: UpdateBatch, heads: Heads) -> Shift:
        """Compare the policy with these parameters to the one that sampled, whose states `batch` and `heads` hold."""
        return self._shift(params, frozen, batch, heads)

    def in_chunks(self, values: Callable[[PyTree, Array, Rows], Array]) -> Callable[[PyTree, Array, Rows], Array]:
        """(parameters, states, rows) -> numbers of the chosen tokens: compiled, a few rows at a time as in scoring."""
        return jax.jit(lambda params, hidden, rows: self._in_chunks(lambda some: values(params, *some), (hidden, rows)))

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

    def _score_batch(self, params: PyTree, frozen: PyTree, rows: Rows, trunk: Any) -> Scores:
        model = self._policy.model(params, frozen)

        def score(some: tuple[Rows, Any]) -> Scores:
            rows, trunk = some
            trunk = self._policy.trunk(model, rows) if trunk is None else trunk
            hidden, _, routes = self._policy.forward(model, rows, trunk)
            stats = statistics(
                model, hidden, rows, temperature=self._temperature, log_min_p=self._log_min_p, names=self._names
            )
            choices = own_choices(self._policy.blocks(model), routes) if self._choices else None
            assert stats.log_prob is not None
            assert stats.entropy is not None
            return Scores(trunk, hidden, stats.log_prob, stats.entropy, stats.collision, choices)

        return self._in_chunks(score, (rows, trunk))

    def _divergence_batch(
        self, params: PyTree, frozen: PyTree, rows: Rows, hidden: Array, hidden_ref: Array, head_ref: Any
    ) -> Array:
        model = self._policy.model(params, frozen)

        def divergence(some: tuple[Rows, Array, Array]) -> Array:
            rows, hidden, hidden_ref = some
            found = statistics(
                model,
                hidden,
                rows,
                temperature=self._temperature,
                hidden_ref=hidden_ref,
                head_ref=head_ref,
                names=("kl",),
            ).kl
            assert found is not None
            return found

        return self._in_chunks(divergence, (rows, hidden, hidden_ref))

    def _behaviour_batch(
        self, weights: WeightPerturbation, params: PyTree, frozen: PyTree, rows: Rows
    ) -> tuple[Array, Array]:
        graphdef, state = nnx.split(merge_lora(self._policy.model(params, frozen)))
        model = nnx.merge(graphdef, weights(state))

        def hidden(some: Rows) -> Array:
            return self._policy.hidden(model, some, self._policy.trunk(model, some))

        return self._in_chunks(hidden, rows), model.head()[0]

    def _shift_batch(self, params: PyTree, frozen: PyTree, batch: UpdateBatch, heads: Heads) -> Shift:
        model = self._policy.model(params, frozen)

        def shift(some: UpdateBatch) -> Shift:
            hidden = self._policy.hidden(model, some.rows, some.trunk)
            hidden_mu, head_mu = sampling_policy(some, heads)
            log_prob_mu = some.log_prob_old if some.hidden_behaviour is None else some.log_prob_behaviour
            stats = statistics(
                model,
                hidden,
                some.rows,
                temperature=self._temperature,
                hidden_ref=hidden_mu,
                head_ref=head_mu,
                names=("log_prob", "kl", "kl_reverse", "total_variation"),
            )
            found = (stats.log_prob, stats.kl_reverse, stats.kl, stats.total_variation)
            first, *rest = (leaf for leaf in found if leaf is not None)
            assert log_prob_mu is not None
            return Shift(first - log_prob_mu, *rest)

        return self._in_chunks(shift, batch)
