"""Signals: from what a batch of experience earned to the advantages of its rows or tokens.

A rule is data, `Rule(function, needs)`: a function of a recipe, whose numbers it reads, and of `SignalInputs`, and the
names of the inputs that may be None and must be there. Call `advantages_of` on the whole batch, before it is cut into
micro-batches: most rules compare rows with each other. Everything here is a constant to the gradient, and what stands
outside the response mask enters nothing, be it NaN.

No rule bootstraps: a row that was cut off at its width counts as ended, and earned what it had earned until then. So
the width is part of the task, as a time limit is.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import present
from jaxrl_llm.checks import require_choice
from jaxrl_llm.masked import masked_count
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_min
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.objectives import advantages
from jaxrl_llm.objectives import divergence_augmented
from jaxrl_llm.objectives import hybrid
from jaxrl_llm.objectives import modulation
from jaxrl_llm.objectives import token_baseline
from jaxrl_llm.objectives.aggregation import token_weights
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.objectives.ratios import token_ratio
from jaxrl_llm.objectives.recipe_fields import RecipeFields
from jaxrl_llm.objectives.rules import Rule
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignalInputs:
    """One batch as signals read it: B rows, of each the R chosen tokens in order. What no rule needs is None.

    Attributes:
        response_mask: true at chosen tokens.
        rewards: return of each row, the sum of its rewards.
        rewards_t: reward of each token.
        group_ids: equal for rows that are compared with each other.
        step_ids: which step of its row each token belongs to, 0, 1, ..; -1 outside.
        actor_ids: who chose each token; -1 outside.
        ended: false where the row was cut off at its width; no rule of `SIGNALS` reads it (see the module).
        steps: at least the most steps that a row has; static under jit.
        log_prob_old: of the tokens under the policy at the start of the update [nats].
        log_prob_behaviour: under the policy that sampled [nats].
        log_prob_ref: under the reference policy, or the teacher [nats].
        entropy: exact, of each context under the policy at the start of the update [nats].
        collision: sum_a p_a^2 of each context under the same policy [prob].
        kl_ref_t: exact KL(old || ref) of each context [nats].
        values: a critic's value of the context of each token, in units of reward.
    """

    response_mask: Bool[Array, "B R"]
    rewards: Float[Array, " B"]
    rewards_t: Float[Array, "B R"]
    group_ids: Int[Array, " B"]
    step_ids: Int[Array, "B R"]
    actor_ids: Int[Array, "B R"]
    ended: Bool[Array, " B"]
    steps: int = dataclasses.field(default=1, metadata={"static": True})
    log_prob_old: Float[Array, "B R"] | None = None
    log_prob_behaviour: Float[Array, "B R"] | None = None
    log_prob_ref: Float[Array, "B R"] | None = None
    entropy: Float[Array, "B R"] | None = None
    collision: Float[Array, "B R"] | None = None
    kl_ref_t: Float[Array, "B R"] | None = None
    values: Float[Array, "B R"] | None = None


def _group_normalised(recipe: RecipeFields, x: SignalInputs) -> Array:
    return advantages.group_normalised(x.rewards, x.group_ids)


def _group_centred(recipe: RecipeFields, x: SignalInputs) -> Array:
    return advantages.group_centred(x.rewards, x.group_ids)


def _leave_one_out(recipe: RecipeFields, x: SignalInputs) -> Array:
    return advantages.leave_one_out(x.rewards, x.group_ids)


def _batch_centred(recipe: RecipeFields, x: SignalInputs) -> Array:
    return advantages.batch_centred(x.rewards)


def _batch_normalised(recipe: RecipeFields, x: SignalInputs) -> Array:
    return advantages.batch_normalised(x.rewards)


def _group_centred_batch_normalised(recipe: RecipeFields, x: SignalInputs) -> Array:
    return advantages.group_centred_batch_normalised(x.rewards, x.group_ids)


@checked
def normalised_over_tokens(advantages_t: Float[Array, "B R"], response_mask: Bool[Array, "B R"]) -> Float[Array, "B R"]:
    """(A - mean) / standard deviation over all response tokens of the batch, divisor n - 1; a constant to the gradient.

    Source: advantage normalisation of PPO's public implementations. They add 1e-8 to the deviation; here a batch whose
    advantages are all equal is found by comparing them, and has 0 everywhere.

    Args:
        advantages_t: of each token.
        response_mask: true at the tokens that the policy sampled.

    Returns:
        one advantage per token, without unit; 0 outside the mask.
    """
    zero = jnp.zeros((), advantages_t.dtype)
    centred = jnp.where(response_mask, advantages_t - masked_mean(advantages_t, response_mask), zero)
    count = masked_count(advantages_t, response_mask)
    variance = masked_sum(jnp.square(centred), response_mask) / jnp.maximum(count - 1, 1)
    differ = masked_max(advantages_t, response_mask) != masked_min(advantages_t, response_mask)
    # Differences whose squares are too small for the dtype are none. NaN is let through: it must show.
    differ = differ & (count > 1) & (variance != 0)
    deviation = jnp.sqrt(jnp.where(differ, variance, jnp.ones((), variance.dtype)))
    return jax.lax.stop_gradient(jnp.where(response_mask & differ, centred / deviation, zero))


def _gae_and_returns(recipe: RecipeFields, x: SignalInputs) -> tuple[Array, Array]:
    return advantages.generalised_advantage_estimation(
        x.rewards_t, present(x.values), x.response_mask, discount=recipe.discount, trace=recipe.trace
    )


def _gae(recipe: RecipeFields, x: SignalInputs) -> Array:
    return _gae_and_returns(recipe, x)[0]


def _gae_normalised(recipe: RecipeFields, x: SignalInputs) -> Array:
    return normalised_over_tokens(_gae(recipe, x), x.response_mask)


def _gae_returns(recipe: RecipeFields, x: SignalInputs) -> Array:
    return _gae_and_returns(recipe, x)[1]


def _step_numbers(recipe: RecipeFields) -> dict[str, float]:
    return {
        "sharpness": recipe.sharpness,
        "clarity_sharpness": recipe.clarity_sharpness,
        "clarity_weight": recipe.clarity_weight,
    }


def _of_steps(x: SignalInputs, entropy: Array, *, all_groups: bool = False) -> tuple[Array, Array, Array]:
    """Advantage of each row, entropy of each step, and which steps there are: those of groups whose rewards differ.

    The bonus has no sign, so that in a group that only fails, or only succeeds, it would be all that is learned.
    """
    of_steps, exists = modulation.step_entropy(entropy, x.step_ids, x.response_mask, steps=x.steps)
    if not all_groups:
        exists = exists & advantages.informative_groups(x.rewards, x.group_ids)[:, None]
    return advantages.group_normalised(x.rewards, x.group_ids), of_steps, exists


def _to_tokens(x: SignalInputs, of_steps: Array) -> Array:
    return modulation.spread_to_tokens(of_steps, x.step_ids, x.response_mask)


def _empg(recipe: RecipeFields, x: SignalInputs) -> Array:
    steps = _of_steps(x, present(x.entropy))
    return _to_tokens(x, modulation.modulated_advantages(*steps, **_step_numbers(recipe)))


def _empg_all_groups(recipe: RecipeFields, x: SignalInputs) -> Array:
    steps = _of_steps(x, present(x.entropy), all_groups=True)
    return _to_tokens(x, modulation.modulated_advantages(*steps, **_step_numbers(recipe)))


def _empg_renyi(recipe: RecipeFields, x: SignalInputs) -> Array:
    # The entropy that the expected gradient norm is a function of: 1 - exp(-H2).
    collision = jnp.where(x.response_mask, present(x.collision), jnp.ones((), x.rewards.dtype))
    steps = _of_steps(x, -jnp.log(collision))
    return _to_tokens(x, modulation.modulated_advantages(*steps, **_step_numbers(recipe)))


def _empg_potential(recipe: RecipeFields, x: SignalInputs) -> Array:
    steps = _of_steps(x, present(x.entropy))
    return _to_tokens(x, modulation.potential_modulated_advantages(*steps, **_step_numbers(recipe)))


def _empg_per_sign(recipe: RecipeFields, x: SignalInputs) -> Array:
    steps = _of_steps(x, present(x.entropy))
    return _to_tokens(x, modulation.sign_preserving_advantages(*steps, sharpness=recipe.sharpness))


@checked
def mean_of_others(rewards: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """Mean reward of the other rows of the group; 0 for a group of one, which has no other. A baseline that no row
    influences for itself, so that what subtracts it stays unbiased.

    Args:
        rewards: one per row.
        group_ids: equal for rows that are compared with each other.

    Returns:
        one baseline per row, in units of reward; exactly the reward where all rewards of a group are equal.
    """
    others = rewards - advantages.leave_one_out(rewards, group_ids)
    alone = advantages.group_size(rewards, group_ids) <= 1
    return jnp.where(alone, jnp.zeros((), rewards.dtype), others)


def _against_divergence(recipe: RecipeFields, x: SignalInputs, divergence_t: Array) -> Array:
    # Minus the coefficient of grad log pi in a loss: what a score function takes as its advantage.
    return -hybrid.sparse_coefficient(
        divergence_t,
        x.rewards_t,
        x.response_mask,
        discount=recipe.discount,
        reward_weight=recipe.reward_weight,
        baseline=mean_of_others(x.rewards, x.group_ids),
    )


def _sparse_imitation(recipe: RecipeFields, x: SignalInputs) -> Array:
    return _against_divergence(
        recipe, x, token_log_ratio(present(x.log_prob_old), present(x.log_prob_ref), x.response_mask)
    )


def _sparse_imitation_exact(recipe: RecipeFields, x: SignalInputs) -> Array:
    return _against_divergence(recipe, x, present(x.kl_ref_t))


def _v_trace(recipe: RecipeFields, x: SignalInputs) -> tuple[Array, Array, Array]:
    # Both caps of V-trace are 1, as in the paper; `trace_cap` belongs to the sum of divergences.
    ratio = token_ratio(
        token_log_ratio(present(x.log_prob_old), present(x.log_prob_behaviour), x.response_mask), x.response_mask
    )
    targets, q = divergence_augmented.v_trace(
        present(x.values), x.rewards_t, ratio, x.response_mask, discount=recipe.discount
    )
    return ratio, targets, q


def _divergence_augmented(recipe: RecipeFields, x: SignalInputs) -> Array:
    ratio, _, q = _v_trace(recipe, x)
    own = divergence_augmented.scaled_by_root_mean_square(q - present(x.values), x.response_mask)
    phi = divergence_augmented.pseudo_reward(
        present(x.log_prob_old), present(x.log_prob_behaviour), divergence=recipe.divergence
    )
    divergence = divergence_augmented.multi_step_divergence(
        phi, ratio, x.response_mask, discount=recipe.discount, trace_cap=recipe.trace_cap
    )
    return divergence_augmented.augmented_advantages(own, divergence, coefficient=recipe.divergence_coefficient)


def _v_trace_targets(recipe: RecipeFields, x: SignalInputs) -> Array:
    return _v_trace(recipe, x)[1]


def _optimal_token_baseline(recipe: RecipeFields, x: SignalInputs) -> Array:
    return token_baseline.optimal_token_baseline(
        x.rewards, present(x.log_prob_old), present(x.collision), x.response_mask, x.group_ids
    )


def _own_token_baseline(recipe: RecipeFields, x: SignalInputs) -> Array:
    # Every other aggregation weighs all tokens of a batch the same.
    weights = None
    if recipe.aggregation == "seq-mean-token-mean":
        weights, _ = token_weights(x.response_mask, mode=recipe.aggregation)
    return token_baseline.own_token_baseline(
        x.rewards, present(x.log_prob_old), present(x.collision), x.response_mask, x.group_ids, token_weights=weights
    )


_OFF_POLICY = ("values", "log_prob_old", "log_prob_behaviour")
_SPENT = ("log_prob_old", "collision")

SIGNALS = {
    "group_normalised": Rule(_group_normalised),
    "group_centred": Rule(_group_centred),
    "leave_one_out": Rule(_leave_one_out),
    "batch_centred": Rule(_batch_centred),
    "batch_normalised": Rule(_batch_normalised),
    "group_centred_batch_normalised": Rule(_group_centred_batch_normalised),
    "optimal_token_baseline": Rule(_optimal_token_baseline, _SPENT),
    "own_token_baseline": Rule(_own_token_baseline, _SPENT),
    "gae": Rule(_gae, ("values",)),
    "gae_normalised": Rule(_gae_normalised, ("values",)),
    "empg": Rule(_empg, ("entropy",)),
    "empg_all_groups": Rule(_empg_all_groups, ("entropy",)),
    "empg_renyi": Rule(_empg_renyi, ("collision",)),
    "empg_potential": Rule(_empg_potential, ("entropy",)),
    "empg_per_sign": Rule(_empg_per_sign, ("entropy",)),
    "sparse_imitation": Rule(_sparse_imitation, ("log_prob_old", "log_prob_ref")),
    "sparse_imitation_exact": Rule(_sparse_imitation_exact, ("kl_ref_t",)),
    "divergence_augmented": Rule(_divergence_augmented, _OFF_POLICY),
}
"""Rules of (recipe, `SignalInputs`): advantages, `[B]` or `[B, R]`. Those without needs are functions of `rewards` and
`group_ids` alone.

empg and its variants leave out the steps of groups whose rewards are all equal, where the bonus would be all that is
learned (errata F4.2); empg_all_groups has them, as the paper's listing does.

own_token_baseline weighs tokens as the recipe's aggregation does. sparse_imitation takes l_t = log pi_old - log pi_ref
of the tokens, sparse_imitation_exact the KL of their contexts (the Rao-Blackwell form); their baseline is
`mean_of_others`. divergence_augmented is Q - V of V-trace, scaled by its root mean square, minus divergence_coefficient
D_t, with ratios and pseudo-rewards of the policy at the start of the update to the one that sampled: where a batch is
fresh the two are one, and D_t is 0.
"""

VALUE_TARGETS = {
    "gae": Rule(_gae_returns, ("values",)),
    "gae_normalised": Rule(_gae_returns, ("values",)),
    "divergence_augmented": Rule(_v_trace_targets, _OFF_POLICY),
}
"""Rules of (recipe, `SignalInputs`): what the critic is trained towards, `[B, R]`, for every signal with `values`."""


def _apply(recipe: RecipeFields, rule: Rule, inputs: SignalInputs) -> Array:
    given = vars(inputs)
    missing = [name for name in rule.needs if given[name] is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} of the signal's inputs {'is' if len(missing) == 1 else 'are'} None; recipe "
            f"{recipe.name!r} needs {'it' if len(missing) == 1 else 'them'} for its advantage ({recipe.advantage!r})."
        )
    shape = inputs.response_mask.shape
    # What stands outside the mask may be anything; a rule sees 0 there.
    clean = {
        name: jnp.where(inputs.response_mask, x, jnp.zeros((), x.dtype))
        for name, x in given.items()
        if name in _PER_TOKEN and x is not None and x.shape == shape
    }
    return jax.lax.stop_gradient(rule.function(recipe, dataclasses.replace(inputs, **clean)))


_PER_TOKEN = (
    "rewards_t",
    "log_prob_old",
    "log_prob_behaviour",
    "log_prob_ref",
    "entropy",
    "collision",
    "kl_ref_t",
    "values",
)


def advantages_of(recipe: RecipeFields, inputs: SignalInputs) -> Float[Array, " B"] | Float[Array, "B R"]:
    """The advantages of a batch by the recipe's rule; constants to the gradient.

    Args:
        recipe: whose field `advantage` names a rule of `SIGNALS`; static under jit.
        inputs: the whole batch, not a part of it.

    Returns:
        one advantage per row, or one per token, 0 outside the mask.

    Raises:
        ValueError: if an input that the rule needs is None, shapes do not fit, or the advantages must be "given".
    """
    if recipe.advantage == "given":
        raise ValueError(
            f"recipe {recipe.name!r} takes advantages as given; compute them, or replace its field advantage, "
            f"which must be one of {', '.join(SIGNALS)}."
        )
    require_choice("advantage", recipe.advantage, SIGNALS)
    return _apply(recipe, SIGNALS[recipe.advantage], inputs)


def value_targets(recipe: RecipeFields, inputs: SignalInputs) -> Float[Array, "B R"]:
    """What the critic is trained towards: GAE's returns A + V, or V-trace's v_t; constants to the gradient.

    Args:
        recipe: whose field `advantage` names a rule of `VALUE_TARGETS`; static under jit.
        inputs: the whole batch, with `values`.

    Returns:
        one target per token, in units of reward; 0 outside the mask.

    Raises:
        ValueError: if the recipe's signal has no critic, or an input that the rule needs is None.
    """
    if recipe.advantage not in VALUE_TARGETS:
        raise ValueError(
            f"recipe {recipe.name!r} has the advantage {recipe.advantage!r}, which has no critic; it must be one of "
            f"{', '.join(VALUE_TARGETS)}."
        )
    return _apply(recipe, VALUE_TARGETS[recipe.advantage], inputs)
