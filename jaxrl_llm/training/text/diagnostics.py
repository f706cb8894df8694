"""How far the policy as the trainer computes it is from the one that sampled: rounding, quantisation, staleness.

Names and definitions are verl's (`rollout_corr/...`, `training/rollout_probs_diff_...`), where "rollout" is the
policy that sampled and "training" the trainer's policy before the update.
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_min
from jaxrl_llm.objectives.divergences import k3
from jaxrl_llm.objectives.ratios import ratio_from_log
from jaxrl_llm.objectives.ratios import sequence_ratio
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float


@jax.jit
def mismatch_metrics(
    log_prob_old: Float[Array, "B R"], log_prob_behaviour: Float[Array, "B R"], response_mask: Bool[Array, "B R"]
) -> dict[str, Float[Array, ""]]:
    """Trainer against sampler on the sampled tokens.

    Args:
        log_prob_old: under the trainer's policy before the update [nats].
        log_prob_behaviour: as recorded by the sampler [nats].
        response_mask: true at sampled tokens.

    Returns:
        kl (log mu - log pi, mean per token), k3_kl (the same KL by its non-negative estimator), training_ppl and
        rollout_ppl (mean per sequence of exp(-mean log p)), log_ppl_diff and log_ppl_abs_diff (mean per sequence),
        log_ppl_diff_max and _min, chi2_token and chi2_seq (mean squared ratio minus 1), log_ratio_abs_max [nats];
        and the absolute difference of the two probabilities of a token: mean, max, standard deviation.
    """
    log_ratio = token_log_ratio(log_prob_old, log_prob_behaviour, response_mask)
    real = jnp.any(response_mask, axis=1)
    training = masked_mean(log_prob_old, response_mask, axis=1)
    rollout = masked_mean(log_prob_behaviour, response_mask, axis=1)
    gap = rollout - training
    apart = jnp.abs(jnp.exp(log_prob_old) - jnp.exp(log_prob_behaviour))
    mean = masked_mean(apart, response_mask)
    return {
        "rollout_corr/kl": masked_mean(-log_ratio, response_mask),
        "rollout_corr/k3_kl": masked_mean(k3(-log_ratio), response_mask),
        "rollout_corr/training_ppl": masked_mean(jnp.exp(-training), real),
        "rollout_corr/rollout_ppl": masked_mean(jnp.exp(-rollout), real),
        "rollout_corr/log_ppl_diff": masked_mean(gap, real),
        "rollout_corr/log_ppl_abs_diff": masked_mean(jnp.abs(gap), real),
        "rollout_corr/log_ppl_diff_max": masked_max(gap, real),
        "rollout_corr/log_ppl_diff_min": masked_min(gap, real),
        "rollout_corr/chi2_token": masked_mean(ratio_from_log(log_ratio) ** 2, response_mask) - 1,
        "rollout_corr/chi2_seq": masked_mean(sequence_ratio(log_ratio, response_mask) ** 2, real) - 1,
        "rollout_corr/log_ratio_abs_max": masked_max(jnp.abs(log_ratio), response_mask),
        "training/rollout_probs_diff_mean": mean,
        "training/rollout_probs_diff_max": masked_max(apart, response_mask),
        "training/rollout_probs_diff_std": jnp.sqrt(masked_mean((apart - mean) ** 2, response_mask)),
    }
