"""Training on tokens of a sampler whose logits are noisy, with and without a pruned vocabulary: no sampling anywhere.

The policy is a token tree. Each step enumerates the responses of the noisy sampler and makes the expected update of
policy gradient without a correction, E[(R - 1/2) sum_t grad log pi_S(y_t)], over those whose tokens the trainer keeps.
A threshold of -inf prunes nothing. The noise is redrawn at every step; a relative part grows with the distance from the
largest logit, as rounding does, so that the tail is the noisiest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import mismatch
from jaxrl_llm.objectives import pruning
from theory_checks import token_trees as trees
from theory_checks.check import World

VOCABULARY, HORIZON, STEPS, RATE = 4, 3, 8, 4.0
LOG_MIN_P = float(np.log(0.05))


def token_values(policy: Any, *, log_min_p: float) -> tuple[jax.Array, jax.Array]:
    """[V^T, T]: log pi_S of every token of every response, and whether the safe set of its context keeps it."""
    tokens, contexts = trees.responses(policy[0].shape[-1], len(policy))
    each = [
        pruning.pruned_log_prob(z[row], tokens[:, t], log_min_p=log_min_p)
        for t, (z, row) in enumerate(zip(policy, contexts, strict=True))
    ]
    return jnp.stack([x.log_prob for x in each], 1), jnp.stack([x.kept for x in each], 1)


def _law(values: tuple[jax.Array, jax.Array]) -> jax.Array:
    log_prob, kept = values
    return jnp.where(jnp.all(kept, axis=1), jnp.exp(jnp.sum(log_prob, axis=1)), 0.0)


def _distance(one: Any, other: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(a - b)) for a, b in zip(one, other, strict=True)))


def _statistics(policy: Any, sampler: Any, rewards: jax.Array, log_min_p: float) -> tuple[Any, dict[str, jax.Array]]:
    """The expected update of one step; how far sampler, update and value are from those without noise or pruning."""
    values, sampled = token_values(policy, log_min_p=log_min_p), token_values(sampler, log_min_p=log_min_p)
    law, law_sampled, law_full = _law(values), _law(sampled), jnp.exp(trees.sequence_log_probs(policy))
    both = jnp.all(values[1], axis=1) & jnp.all(sampled[1], axis=1)
    every = jnp.ones(values[1].shape, bool)
    weights = pruning.pruned_sequence_weights(values[0], sampled[0], values[1], every, cap=jnp.inf)

    def expected_update(weight):
        def loss(p):
            return jnp.sum(weight * (rewards - 0.5) * jnp.sum(token_values(p, log_min_p=log_min_p)[0], axis=1))

        return jax.grad(loss)(policy)

    exact = jax.grad(lambda p: jnp.sum(_law(token_values(p, log_min_p=log_min_p)) * rewards))(policy)
    update = expected_update(jnp.where(jnp.all(values[1], axis=1), law_sampled, 0.0))
    noise = trees.per_sequence([jnp.max(jnp.abs(a - b), axis=1) for a, b in zip(policy, sampler, strict=True)])
    change = jnp.sum(jnp.abs(jnp.where(both[:, None], sampled[0] - values[0], 0.0)), axis=1)
    p, p_sampled = (jnp.exp(trees.token_log_probs(z)) for z in (policy, sampler))
    # The bound is linear in the noise, which is another one in every context.
    most = jnp.sum(noise * mismatch.two_sided_log_prob_change(p, p_sampled, max_noise=1.0), axis=1)
    # |score|^2 of a response is a sum of T terms |e_a - p|^2 <= 2, and |R - 1/2| <= 1/2.
    largest = jnp.sqrt(2.0 * len(policy)) / 2
    return update, {
        "reward": jnp.sum(law_full * rewards),
        "pruned_reward": jnp.sum(law * rewards),
        "leaves": jnp.sum(jnp.where(law > 0, 0.0, law_full)),
        "log_ratio": jnp.sum(law_sampled * change),
        "log_ratio_bound": jnp.sum(law_sampled * most),
        "update_error": _distance(update, exact),
        "update_bound": largest * jnp.sum(jnp.abs(law_sampled - law)),
        "corrected_error": _distance(expected_update(law_sampled * weights), exact),
        "missed": largest * jnp.sum(jnp.where(law_sampled > 0, 0.0, law)),
    }


def train(
    policy: Any,
    rewards: jax.Array,
    signs: Any,
    *,
    absolute: jax.Array,
    relative: jax.Array,
    log_min_p: float,
    rate: float = RATE,
) -> dict[str, jax.Array]:
    """Statistics of every step, [steps] each.

    Args:
        policy: logits of a token tree.
        rewards: of the responses, in [0, 1].
        signs: numbers in [-1, 1] in the shapes of the policy after a leading axis of steps.
        absolute, relative: the sampler has z + (absolute + relative (max z - z)) sign for z [nats].
        log_min_p: threshold of pruning, of the trainer and of the sampler each on its own logits; -inf for none.
        rate: step size on logits.
    """

    def step(policy, sign):
        far = [absolute + relative * (jnp.max(z, axis=-1, keepdims=True) - z) for z in policy]
        sampler = [z + e * s for z, e, s in zip(policy, far, sign, strict=True)]
        update, found = _statistics(policy, sampler, rewards, log_min_p)
        return [z + rate * g for z, g in zip(policy, update, strict=True)], found

    return jax.lax.scan(step, policy, signs)[1]


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    pi, _, rewards = trees.draw(
        generator,
        worlds=count,
        vocabulary=VOCABULARY,
        horizon=HORIZON,
        noise=np.zeros(count),
        share=np.ones(count),
        kind=np.arange(count) % 3,
    )
    signs = [jnp.asarray(generator.uniform(-1, 1, (count, STEPS, *z.shape[1:]))) for z in pi]
    # One world in two has all noise at its largest, where the bound on the log-ratio is nearest.
    extreme = jnp.arange(count) % 2 == 0
    signs = [jnp.where(extreme[:, None, None, None], jnp.sign(s), s) for s in signs]
    absolute, relative = generator.uniform(0.0, 0.5, count), generator.uniform(0.0, 0.2, count)
    return [(pi, rewards, signs, jnp.asarray(absolute), jnp.asarray(relative))]


def _measure(pi: Any, rewards: jax.Array, signs: Any, absolute: jax.Array, relative: jax.Array) -> dict[str, jax.Array]:
    full, pruned = (
        train(pi, rewards, signs, absolute=absolute, relative=relative, log_min_p=x) for x in (-jnp.inf, LOG_MIN_P)
    )
    return {f"{name}_full": x for name, x in full.items()} | {f"{name}_pruned": x for name, x in pruned.items()}


WORLD = World(name="pruned_training", draw=_draw, measure=_measure)
