"""Names of the numbers that the report shows, as training writes them; and bounds and phases in words."""

REWARD = "critic/rewards/mean"
LENGTH = "response_length/mean"
ENTROPY = "actor/entropy"
ACCEPTED = "actor/acceptance"
MISMATCH = "rollout_corr/k3_kl"
KL_MEAN = "shift/kl_mean"
KL_MAX = "shift/kl_max"
TV_MEAN = "shift/tv_mean"
TV_MAX = "shift/tv_max"
ERROR = "bounds/error"
ERROR_SE = "bounds/error_se"
THRESHOLD = "bounds/threshold"
UNIFIED_PRINTED = "bounds/unified_printed"
UNIFIED_SHARP = "bounds/unified_sharp"

HELD_OUT = "held_out/accuracy"
HELD_OUT_STRICT = "held_out/strict"
"""Both where the policy was evaluated; step 0 is the policy before training."""

TOTAL_SECONDS = "total"
EVALUATION_SECONDS = "evaluate"
"""Both in timings.jsonl; the first includes the second."""

BOUNDS = {
    "classical": "classical (TRPO)",
    "coupling": "coupling",
    "pinsker_marginal_kl": "Pinsker-marginal, KL",
    "pinsker_marginal_tv": "Pinsker-marginal, TV",
    "mixed_kl": "mixed, KL",
    "mixed_tv": "mixed, TV",
    "adaptive_kl": "adaptive, KL",
    "adaptive_tv": "adaptive, TV",
    "adaptive": "adaptive, both",
    "linear": "linear",
    "average_only": "averages only",
    "sequence_kl": "KL of responses",
}
"""The bounds of `jaxrl_llm.bounds` in words."""

TIMES = {
    "rollout": "rollout",
    "score": "score",
    "update": "update",
    "bounds": "bounds",
    "other": "other",
}
"""Parts of a step in timings.jsonl, in words."""

COUNTS = {
    "groups/equal_rewards": "prompts whose answers all earned the same (they teach nothing)",
    "actor/optimizer_steps": "optimiser steps",
    "actor/skipped": "optimiser steps skipped (loss or gradient not finite)",
}
"""Counts in metrics.jsonl, in words; they add up over steps."""


def printed(bound: str) -> str:
    """Name of a bound with the paper's constant."""
    return f"bounds/printed/{bound}"


def sharp(bound: str) -> str:
    """Name of a bound with the halved constant."""
    return f"bounds/sharp/{bound}"
