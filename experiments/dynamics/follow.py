"""Train a small agent by plain gradient ascent, all seeds at once, and probe its updates along the way."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.dynamics.learner import Learner
from experiments.dynamics.learner import moved
from experiments.dynamics.learner import policy_gradient
from experiments.dynamics.learner import scaled
from experiments.dynamics.probe import batch_probe
from experiments.dynamics.probe import choose_tokens
from experiments.dynamics.probe import token_probe
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree


def measuring_steps(steps: int, points: int) -> np.ndarray:
    """Updates before which there is a probe: evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, steps - 1, points).round().astype(int))


def follow(
    learner: Learner, *, seeds: int, key: PRNGKey, steps: int, points: int, tokens: int, learning_rate: float
) -> Mapping[str, Any]:
    """Reward of every step, and the probes of some.

    Args:
        learner: who learns.
        seeds: agents trained at once.
        key: of everything random.
        steps: updates; each is `learning_rate` times the policy gradient of one batch.
        points: probes along the way.
        tokens: how many are probed alone at each point.
        learning_rate: eta.

    Returns:
        reward [seeds, steps]; probe_steps; batch_* [seeds, points, B, K] and token_* [seeds, points, tokens].
    """
    init_key, key = jax.random.split(key)
    params, fixed = jax.jit(jax.vmap(learner.init))(jax.random.split(init_key, seeds))

    def update(params: PyTree, key: PRNGKey) -> tuple[PyTree, Array]:
        batch = learner.sample(params, fixed, key)
        change = scaled(policy_gradient(learner, params, fixed, batch), learning_rate)
        return moved(params, change), batch.reward

    def probe(params: PyTree, key: PRNGKey) -> tuple[dict[str, Array], dict[str, Array]]:
        # The batch and the step that the next update will take.
        batch = learner.sample(params, fixed, key)
        change = scaled(policy_gradient(learner, params, fixed, batch), learning_rate)
        whole, first = batch_probe(learner, params, fixed, batch, change, learning_rate)
        alone = functools.partial(token_probe, learner, params, fixed, batch, first, learning_rate=learning_rate)
        return whole, jax.lax.map(alone, choose_tokens(batch, tokens, key))

    update, probe = jax.jit(jax.vmap(update)), jax.jit(jax.vmap(probe))
    at = measuring_steps(steps, points)
    rewards, wholes, alones = [], [], []
    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(key, step), seeds)
        if step in at:
            whole, alone = jax.device_get(probe(params, keys))
            wholes.append(whole)
            alones.append(alone)
        params, reward = update(params, keys)
        rewards.append(np.asarray(reward))
    found: dict[str, Any] = {"reward": np.stack(rewards, axis=1), "probe_steps": at}
    for prefix, parts in (("batch", wholes), ("token", alones)):
        found |= {f"{prefix}_{name}": np.stack([part[name] for part in parts], axis=1) for name in parts[0]}
    return found
