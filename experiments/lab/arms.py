"""The corrections that are compared, as recipes: they share advantages, aggregation and optimiser, and differ in what
they do about the sampler.
"""

import dataclasses

from jaxrl_llm.checks import require_choice
from jaxrl_llm.objectives import Recipe

PLAIN = Recipe(
    name="none",
    source="REINFORCE with GRPO's advantages on the trainer's log-probs: the sampler is trusted",
    advantage="group_normalised",
    surrogate="score_function",
    aggregation="seq-mean-token-sum",
    denominator="behaviour",
)

_TRM = dataclasses.replace(PLAIN, surrogate="importance_weighted", source="arXiv 2512.23075")
# The value of log_min_p says that there is pruning; its threshold is data of the trainer.
_DVP = dataclasses.replace(PLAIN, correction="token_truncated", log_min_p=-13.0, source="arXiv 2512.23087")

LABELS = {
    "none": "no correction",
    "ppo_clip": "PPO clip",
    "tis": "TIS",
    "mis": "MIS",
    "trm_max": "TRM-Max",
    "trm_avg": "TRM-Avg",
    "trm": "TRM, both tests",
    "dvp": "DVP",
    "dvp_trm": "DVP + TRM",
}
"""The arms by name, and in words."""

DEFAULT_ARMS = ("none", "tis", "trm", "dvp")


PRUNING = ("dvp", "dvp_trm")
"""The arms whose policy is the one renormalised on its safe set."""


def arm(name: str, *, mask_maximum: float, mask_average: float) -> Recipe:
    """The recipe of an arm.

    Args:
        name: one of `LABELS`.
        mask_maximum: threshold of the maximum test [nats].
        mask_average: threshold of the average test [nats].

    Raises:
        ValueError: there is no such arm.
    """
    thresholds = {"mask_maximum": mask_maximum, "mask_average": mask_average}
    recipes = {
        "none": PLAIN,
        # With one update per batch the ratio to the start of the update is 1; the clip acts on the mismatch.
        "ppo_clip": dataclasses.replace(PLAIN, surrogate="clipped", clip_low=0.2, clip_high=0.28),
        "tis": dataclasses.replace(PLAIN, correction="token_truncated"),
        "mis": dataclasses.replace(PLAIN, correction="sequence_masked"),
        "trm_max": dataclasses.replace(_TRM, mask="maximum", **thresholds),
        "trm_avg": dataclasses.replace(_TRM, mask="average", **thresholds),
        "trm": dataclasses.replace(_TRM, mask="both", **thresholds),
        "dvp": _DVP,
        "dvp_trm": dataclasses.replace(_DVP, mask="both", **thresholds),
    }
    require_choice("name", name, recipes)
    return dataclasses.replace(recipes[name], name=name)
