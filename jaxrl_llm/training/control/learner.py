"""The update of an actor-critic: V-trace on what older policies saw, less the divergence, over every minibatch in one
loop.

For a step t of an older policy with log pi_old(a|s), with rho = pi/pi_old under the policy as it is now:

    v, Q  V-trace of the rewards;  A = (Q - V) / root mean square over the minibatch
    D_t   the discounted sum of the divergence's pseudo-reward from t on, through truncated ratios
    loss  surrogate(rho, A - coefficient D) + value (V - v)^2 / 2 - entropy H

Each is a function of `jaxrl_llm.objectives`. Q - V is the advantage of V-trace, one step behind that of GAE: "ppo" is
PPO's clip on it. Departures from the paper's code: errata F8.1 to F8.3; the value at the end of a row is that of the
network, not a return that was stored; log-ratios are clamped at 20, not 10; games are drawn without replacement and
without priorities; the error of the values is not weighted by rho.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.objectives import divergence_augmented as augmented
from jaxrl_llm.objectives import ratios
from jaxrl_llm.objectives import values as value_losses
from jaxrl_llm.training.control.methods import policy_loss
from jaxrl_llm.training.control.networks import ActorCritic
from jaxrl_llm.training.control.networks import Memory
from jaxrl_llm.training.control.rollouts import Replay
from jaxrl_llm.training.control.rollouts import Rollout
from jaxrl_llm.training.control.rollouts import draw
from jaxrl_llm.training.control.rollouts import take
from jaxrl_llm.training.control.settings import ControlSettings
from jaxrl_llm.training.run.optimizer import make_optimizer
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

Metrics = dict[str, Float[Array, ""]]


class Learning(NamedTuple):
    """What an update changes: the network's parameters, and the optimiser's state."""

    params: PyTree
    opt_state: PyTree


class Targets(NamedTuple):
    """What V-trace and the divergence say of each step; constants.

    value: what V should be. advantage: before the divergence, with root mean square 1. scale: that root mean square.
    divergence: D_t.
    """

    value: Float[Array, "B T"]
    advantage: Float[Array, "B T"]
    scale: Float[Array, ""]
    divergence: Float[Array, "B T"]


class Learner:
    """One network and one way to improve it; its methods are pure."""

    def __init__(self, shape: tuple[int, ...], actions: int, settings: ControlSettings) -> None:
        """Nothing is computed yet.

        Args:
            shape: of what a game shows.
            actions: how many there are.
            settings: the numbers.

        Raises:
            ValueError: the torso does not fit the shape, or the optimiser's schedule the run.
        """
        self.settings = settings
        self._make = functools.partial(
            ActorCritic, shape, actions, torso=settings.torso, width=settings.width, memory=settings.memory
        )
        abstract = nnx.eval_shape(lambda: self._make(rngs=nnx.Rngs(0)))
        self._graphdef, self._start = nnx.graphdef(abstract), abstract.start
        self._optimizer = make_optimizer(settings.optimizer, settings.iterations * settings.updates)

    def init(self, key: PRNGKey) -> Learning:
        """Random weights, and an optimiser that has seen nothing."""
        params = nnx.state(self._make(rngs=nnx.Rngs(key)))
        return Learning(params, self._optimizer.init(params))

    def memory(self, games: int) -> Memory:
        """What is remembered before a game."""
        return self._start(games)

    def forward(
        self, params: PyTree, shown: Any, began: Bool[Array, "B T"], memory: Memory
    ) -> tuple[Float[Array, "B T A"], Float[Array, "B T"], Memory]:
        """Logits, values and memory; see `ActorCritic`."""
        return nnx.merge(self._graphdef, params)(shown, began, memory)

    def act(
        self, params: PyTree, shown: Any, began: Bool[Array, " B"], memory: Memory
    ) -> tuple[Float[Array, "B A"], Memory]:
        """Logits of one step of B games."""
        logits, _, memory = self.forward(params, shown[:, None], began[:, None], memory)
        return logits[:, 0], memory

    def targets(self, rollout: Rollout, log_prob: Float[Array, "B T"], values: Float[Array, "B T1"]) -> Targets:
        """V-trace and the divergence under the policy as it is now."""
        method, settings = self.settings.method, self.settings
        log_ratio = ratios.token_log_ratio(jax.lax.stop_gradient(log_prob), rollout.log_prob, rollout.real)
        # A ratio of 0 makes the value of a step that was cut off its own target: it stands for what would follow.
        ratio = jnp.where(rollout.cut, 0.0, ratios.ratio_from_log(log_ratio))
        goal, q = augmented.v_trace(
            values[:, :-1],
            rollout.reward,
            ratio,
            rollout.real,
            discount=rollout.discount,
            trace_cap=settings.trace,
            bootstrap=values[:, -1],
        )
        learned = rollout.real & ~rollout.cut
        raw = jax.lax.stop_gradient(q - values[:, :-1])
        scale = jnp.sqrt(masked_mean(jnp.square(raw), learned))
        advantage = augmented.scaled_by_root_mean_square(raw, learned)
        if method.divergence == "none":
            return Targets(goal, advantage, scale, jnp.zeros_like(advantage))
        phi = augmented.pseudo_reward(log_prob, rollout.log_prob, divergence=method.divergence)
        divergence = augmented.multi_step_divergence(
            phi, ratio, rollout.real, discount=rollout.discount, trace_cap=method.divergence_trace
        )
        return Targets(goal, advantage, scale, divergence)

    def loss(self, params: PyTree, rollout: Rollout) -> tuple[Float[Array, ""], Metrics]:
        """The loss of some games, and what is measured of it."""
        method, settings = self.settings.method, self.settings
        logits, values, _ = self.forward(params, rollout.shown, rollout.began, rollout.memory)
        logits, learned = logits[:, :-1], rollout.real & ~rollout.cut
        log_prob = categorical.log_prob(logits, rollout.action)
        targets = self.targets(rollout, log_prob, values)
        log_ratio = ratios.token_log_ratio(log_prob, rollout.log_prob, learned)
        ratio = ratios.ratio_from_log(log_ratio)
        gains = augmented.augmented_advantages(targets.advantage, targets.divergence, coefficient=method.coefficient)
        policy = masked_mean(policy_loss(method, log_prob, ratio, gains), learned)
        error = safe_divide(*value_losses.squared_value_loss(values[:, :-1], targets.value, learned))
        entropy = masked_mean(categorical.entropy(logits), learned)
        loss = policy + settings.value * error - settings.entropy * entropy
        weights, log_weights = jax.lax.stop_gradient((ratio, log_ratio))
        metrics = {
            "loss": loss,
            "policy_loss": policy,
            "value_loss": error,
            "entropy": entropy,
            # E_old[rho - 1 - log rho] = KL(pi_old || pi): each term is 0 or more.
            "kl": masked_mean(weights - 1 - log_weights, learned),
            "effective_share": safe_divide(
                jnp.square(masked_sum(weights, learned)),
                masked_sum(jnp.square(weights), learned) * masked_sum(jnp.ones_like(weights), learned),
            ),
            "ratio_max": masked_max(weights, learned),
            "divergence": masked_mean(targets.divergence, learned),
            "scale": targets.scale,
        }
        return loss, metrics

    def update(self, learning: Learning, replay: Replay, key: PRNGKey) -> tuple[Learning, Metrics]:
        """All updates of one iteration; one whose loss or gradient is not finite changes nothing.

        Returns:
            what was learned, and the mean of the metrics over the updates that were made.
        """
        settings = self.settings
        size = settings.games // settings.minibatches

        def step(learning: Learning, chosen: Any) -> tuple[Learning, Metrics]:
            (_, metrics), slope = jax.value_and_grad(self.loss, has_aux=True)(learning.params, take(replay, *chosen))
            norm = optax.tree.norm(slope)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            change, opt_state = self._optimizer.update(slope, learning.opt_state, learning.params)
            moved = Learning(optax.apply_updates(learning.params, change), opt_state)
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, learning)
            return kept, metrics | {"grad_norm": norm, "finite": finite.astype(jnp.float32)}

        chosen = draw(replay, key, reuse=settings.reuse, size=size)
        learning, metrics = jax.lax.scan(step, learning, chosen)
        made = metrics.pop("finite") > 0
        means = {name: masked_mean(jnp.where(made, values, 0), made) for name, values in metrics.items()}
        return learning, means | {"skipped": jnp.sum(~made).astype(jnp.float32)}

    def measure(self, params: PyTree, before: PyTree, rollout: Rollout) -> Metrics:
        """The divergence of the policy that played from the one before, in the states that it met.

        These are states of the new policy, so the mean of KL(pi || pi_old) is the Bregman divergence of the occupancies
        (in undiscounted frequencies) for the conditional entropy. `surprise` is the mean temporal difference of the
        values of the policy that played, `surprise_before` of those of the one before: the latter less the former of
        the batch before is what the new policy gained per step, by the performance difference, whatever the values.
        """
        logits, own, _ = self.forward(params, rollout.shown, rollout.began, rollout.memory)
        old, before_it, _ = self.forward(before, rollout.shown, rollout.began, rollout.memory)
        learned = rollout.real & ~rollout.cut

        def surprise(values: Float[Array, "B T1"]) -> Float[Array, ""]:
            return masked_mean(rollout.reward + rollout.discount * values[:, 1:] - values[:, :-1], learned)

        return {
            "occupancy_divergence": masked_mean(categorical.kl(logits, old)[:, :-1], learned),
            "occupancy_tv": masked_mean(categorical.total_variation(logits, old)[:, :-1], learned),
            "surprise": surprise(own),
            "surprise_before": surprise(before_it),
        }
