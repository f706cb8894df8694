"""Train an arm under a controlled mismatch: all seeds at once, all steps in one loop, one program for all arms.

What differs between arms is data to that program: the number of its loss, and the threshold of its pruning. Losses,
weights, advantages and bounds are those of training (`jaxrl_llm.training.text`); here are the mismatch and what is
measured of it.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lab.world import Exact
from experiments.lab.world import Sampled
from experiments.lab.world import World
from experiments.lab.world import covers
from jaxrl_llm import categorical
from jaxrl_llm.bounds import bound_inputs_from_tokens
from jaxrl_llm.bounds import sampled_surrogate_error
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.bounds.sampled import LOG_RATIO_LIMIT
from jaxrl_llm.bounds.sampled import Estimate
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.objectives import policy_weights
from jaxrl_llm.rollouts.perturb import LogitPerturbation
from jaxrl_llm.rollouts.perturb import push
from jaxrl_llm.rollouts.perturb import stale_weights
from jaxrl_llm.rollouts.perturb import start_history
from jaxrl_llm.testing import Batch
from jaxrl_llm.training.text.objective import Extras
from jaxrl_llm.training.text.objective import recipe_objective
from jaxrl_llm.training.text.step_metrics import unified_bounds
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

NO_PRUNING = -jnp.inf
"""The threshold at which the safe set is the whole vocabulary."""


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """How the sampler differs from the trained policy.

    Attributes:
        logits: what it does to the logits, with noise of its own at every step.
        lag: steps that its weights are old.
    """

    logits: LogitPerturbation
    lag: int


class OnTokens(NamedTuple):
    """The trained policy (pi) and the one that sampled (mu) at the sampled tokens, both pruned where the arm prunes.

    kl is KL(mu || pi) of this pair, infinite where mu can draw a token that pi has pruned, and tv its TV; covered says
    where mu can draw what pi can. kl_whole and entropy are those of the distributions before pruning, so that TRM's
    tests can be passed.
    """

    log_prob: Float[Array, "B T"]
    log_prob_mu: Float[Array, "B T"]
    kept: Bool[Array, "B T"]
    kept_mass: Float[Array, "B T"]
    kl: Float[Array, "B T"]
    tv: Float[Array, "B T"]
    covered: Bool[Array, "B T"]
    kl_whole: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


def pruned(logits: Float[Array, "N V"], log_min_p: Array) -> Float[Array, "N V"]:
    """The logits on their own safe set."""
    return categorical.restrict(logits, categorical.safe_set(logits, log_min_p=log_min_p))


def on_tokens(
    logits: Float[Array, "N V"], logits_mu: Float[Array, "N V"], sampled: Sampled, log_min_p: Array
) -> OnTokens:
    """Both policies at the sampled tokens; every quantity is computed once per row, then looked up."""
    keep = categorical.safe_set(logits, log_min_p=log_min_p)
    fixed, entries = jax.lax.stop_gradient(logits), (sampled.row, sampled.tokens)
    kept = keep[entries]
    log_prob = categorical.log_probs(categorical.restrict(logits, keep))[entries]
    pi, mu = categorical.restrict(fixed, keep), pruned(logits_mu, log_min_p)
    return OnTokens(
        log_prob=jnp.where(kept, log_prob, 0.0),
        log_prob_mu=categorical.log_probs(mu)[entries],
        kept=kept,
        kept_mass=categorical.kept_mass(fixed, keep)[sampled.row],
        kl=categorical.kl(mu, pi)[sampled.row],
        tv=categorical.total_variation(mu, pi)[sampled.row],
        covered=covers(mu, pi)[sampled.row],
        kl_whole=categorical.kl(logits_mu, fixed)[sampled.row],
        entropy=categorical.entropy(fixed)[sampled.row],
    )


def log_ratio_of(both: OnTokens) -> Float[Array, "B T"]:
    """log pi - log mu of the sampled tokens [nats]; a token that pi prunes has ratio 0 (to the clamp), not 1."""
    return jnp.where(both.kept, both.log_prob - both.log_prob_mu, -LOG_RATIO_LIMIT)


def sampled_error(both: OnTokens, sampled: Sampled) -> Estimate:
    """Error of the surrogate from these responses, its standard error clustered by what was drawn together."""
    log_ratio = log_ratio_of(both)
    return sampled_surrogate_error(log_ratio, sampled.mask, sampled.rewards, group_ids=sampled.clusters, baseline=0.5)


def signal_inputs(sampled: Sampled) -> SignalInputs:
    """The responses as signals read them: one step of one actor each, rewarded at its last token."""
    mask = sampled.mask
    last = mask & (jnp.cumsum(mask, axis=1) == jnp.sum(mask, axis=1, keepdims=True))
    ids = jnp.where(mask, 0, -1)
    return SignalInputs(
        response_mask=mask,
        rewards=sampled.rewards,
        rewards_t=jnp.where(last, sampled.rewards[:, None], 0.0),
        group_ids=sampled.group_ids,
        step_ids=ids,
        actor_ids=ids,
        ended=jnp.ones(mask.shape[0], bool),
    )


def batch_of(both: OnTokens, signal: SignalInputs, sampled: Sampled, advantages: Array) -> Batch:
    """The responses as objectives read them; there is one update per batch, so pi is the policy at its start."""
    fields: dict[str, Any] = dict.fromkeys(Batch._fields) | {
        "tokens": sampled.tokens,
        "response_mask": sampled.mask,
        "group_ids": sampled.group_ids,
        "rewards": sampled.rewards,
        "advantages": advantages,
        "log_prob": both.log_prob,
        "log_prob_old": jax.lax.stop_gradient(both.log_prob),
        "log_prob_behaviour": both.log_prob_mu,
        "kl_t": both.kl_whole,
        "step_ids": signal.step_ids,
    }
    return Batch(**fields)


def _loss_of(recipe: Recipe) -> Callable[[OnTokens, Sampled], tuple[Array, dict[str, Array]]]:
    """The recipe's loss, which share of sequences has a weight in the update, and which share of tokens has none."""
    objective = recipe_objective(recipe)

    def loss(both: OnTokens, sampled: Sampled) -> tuple[Array, dict[str, Array]]:
        signal = signal_inputs(sampled)
        batch = batch_of(both, signal, sampled, advantages_of(recipe, signal))
        terms = objective.loss(batch, Extras(1.0, both.kept))
        weights, _ = policy_weights(
            recipe,
            log_prob=batch.log_prob,
            response_mask=batch.response_mask,
            log_prob_old=batch.log_prob_old,
            log_prob_behaviour=batch.log_prob_behaviour,
            kl_t=batch.kl_t,
            target_kept=both.kept,
        )
        # By a test, a correction that rejects, or pruning: sampled and scored, and then without weight.
        used = (weights != 0) & sampled.mask
        shares = {
            "acceptance": masked_mean(jnp.any(used, axis=1).astype(jnp.float32), jnp.any(sampled.mask, axis=1)),
            "wasted": 1 - masked_mean(used.astype(jnp.float32), sampled.mask),
        }
        return safe_divide(*terms.loss), shares

    return loss


def _metrics(world: World, sampled: Sampled, both: OnTokens, exact: Exact) -> dict[str, Array]:
    """Numbers of one step, before its update."""
    mask = sampled.mask & both.kept
    gap = jnp.where(mask, both.log_prob - both.log_prob_mu, 0.0)
    error = sampled_error(both, sampled)
    visited = bound_inputs_from_tokens(both.kl, both.tv, sampled.mask, horizon=world.horizon)
    inputs = visited if exact.inputs is None else exact.inputs
    covered = jnp.all(both.covered | ~sampled.mask) if exact.covered is None else exact.covered
    bounds = surrogate_error_bounds(
        inputs, mean_reward=exact.reward_mu, surrogate_gain=exact.surrogate_gain, mu_covers_pi=covered
    )
    return {
        "reward": exact.reward_pi,
        "reward_sampler": exact.reward_mu,
        "surrogate_gain": exact.surrogate_gain,
        "error": exact.reward_pi - exact.reward_mu - exact.surrogate_gain,
        "error_sampled": error.value,
        "error_sampled_se": error.standard_error,
        **unified_bounds(bounds),
        "covered": covered,
        "sequence_kl": inputs.sequence_kl,
        "log_ppl_abs_diff": jnp.mean(jnp.abs(masked_mean(gap, mask, axis=1))),
        "kl_mean": masked_mean(both.kl_whole, sampled.mask),
        "kl_max": jnp.maximum(masked_max(both.kl_whole, sampled.mask), 0.0),
        "tv_mean": masked_mean(both.tv, sampled.mask),
        "entropy": masked_mean(both.entropy, sampled.mask),
        # E sum_t (1 - Z_t), the bound on what pruning costs (bounds.pruning.sampled_bias_bound), on sampled contexts.
        "pruned_mass": jnp.mean(masked_sum(1 - both.kept_mass, sampled.mask, axis=1)),
    }


class ArmScan:
    """One world, one mismatch, several recipes: compiled once, whichever recipe is trained.

    This is not the loop for language models (`jaxrl_llm.training.text`), which samples, scores and updates in programs
    of their own and writes everything down between them. Here a policy is so small that all of it costs less than one
    such call: seeds are a vmapped axis, steps one scan, and every step also enumerates what a real run can only
    estimate. So whole curves with their exact errors come out of one program, for many seeds.
    """

    def __init__(
        self, world: World, mismatch: Mismatch, recipes: Sequence[Recipe], *, steps: int, learning_rate: float
    ) -> None:
        """Nothing is compiled yet."""
        self._world, self._mismatch, self._steps = world, mismatch, steps
        self._losses = [_loss_of(recipe) for recipe in recipes]
        self._names = [recipe.name for recipe in recipes]
        self._optimizer = optax.adam(learning_rate)
        self._init = jax.jit(jax.vmap(world.init))
        self._starts: dict[tuple[int, bytes], PyTree] = {}
        self._run = jax.jit(jax.vmap(self._train, in_axes=(0, 0, None, None)))

    def train(self, arm: str, *, log_min_p: float | None, seeds: int, key: PRNGKey) -> Mapping[str, Array]:
        """Every number of every step, [seeds, steps]; all arms of one key start from the same policies.

        One step: sample with the perturbed policy of `lag` steps ago, score under the trained one, one Adam update of
        the recipe's loss. An arm that prunes has its sampler prune too, on the safe set of its own logits.
        """
        start_key, key = jax.random.split(key)
        params = self._start(seeds, start_key)
        threshold = jnp.asarray(NO_PRUNING if log_min_p is None else log_min_p)
        return self._run(params, jax.random.split(key, seeds), jnp.asarray(self._names.index(arm)), threshold)

    def _start(self, seeds: int, key: PRNGKey) -> PyTree:
        """The policies before training: made once, for all arms."""
        name = seeds, np.asarray(jax.random.key_data(key)).tobytes()
        if name not in self._starts:
            self._starts[name] = self._init(jax.random.split(key, seeds))
        return self._starts[name]

    def _train(self, params: PyTree, key: PRNGKey, arm: Array, log_min_p: Array) -> dict[str, Array]:
        def step(carry: Any, index: Array) -> tuple[Any, dict[str, Array]]:
            return self._step(carry, jax.random.fold_in(key, index), arm, log_min_p)

        start = (params, self._optimizer.init(params), start_history(params, lag=self._mismatch.lag))
        return jax.lax.scan(step, start, jnp.arange(self._steps))[1]

    def _step(self, carry: Any, key: PRNGKey, arm: Array, log_min_p: Array) -> tuple[Any, dict[str, Array]]:
        params, opt_state, history = carry
        world, sample_key, noise_key = self._world, *jax.random.split(key)
        sampler = stale_weights(history)

        def of_pi(logits: Array, keys: Array) -> Array:
            del keys
            return pruned(logits, log_min_p)

        def of_mu(logits: Array, keys: Array) -> Array:
            return pruned(self._mismatch.logits(logits, keys), log_min_p)

        sampled = world.sample(sampler, of_mu, sample_key, noise_key)
        logits_mu = self._mismatch.logits(world.logits(sampler, sampled), sampled.keys)

        def loss(params: PyTree) -> tuple[Array, Any]:
            both = on_tokens(world.logits(params, sampled), logits_mu, sampled, log_min_p)
            value, shares = jax.lax.switch(arm, self._losses, both, sampled)
            return value, (both, shares)

        gradient, (both, shares) = jax.grad(loss, has_aux=True)(params)
        exact = world.exact(params, of_pi, sampler, of_mu, noise_key)
        metrics = _metrics(world, sampled, both, exact) | shares
        changes, opt_state = self._optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, changes)
        metrics = jax.tree.map(lambda x: x.astype(jnp.float32), metrics)
        return (params, opt_state, push(history, params)), metrics
