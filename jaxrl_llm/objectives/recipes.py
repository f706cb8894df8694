"""Recipes: each paper's objective as one row of data, composed from the parts of this package.

    loss = aggregate( mask * correction * surrogate(ratio, advantage) + kl_coefficient * KL - entropy_coefficient *
    entropy )

A recipe says which part fills each place. Read `RECIPES` line by line against the papers; change a row with
`dataclasses.replace`. `policy_loss` evaluates one.
"""

import dataclasses

from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_choice
from jaxrl_llm.objectives import advantages
from jaxrl_llm.objectives.aggregation import AGGREGATIONS
from jaxrl_llm.objectives.divergences import ESTIMATORS

CHOICES = {
    "advantage": (
        "given",
        "group_normalised",
        "group_centred",
        "leave_one_out",
        "batch_centred",
        "batch_normalised",
        "group_centred_batch_normalised",
    ),
    "ratio": ("token", "geometric"),
    "denominator": ("old", "behaviour"),
    "surrogate": ("score_function", "importance_weighted", "clipped", "dual_clipped", "clipped_weight"),
    "correction": (
        "none",
        "token_truncated",
        "token_masked",
        "sequence_truncated",
        "sequence_masked",
        "geometric_masked",
    ),
    "mask": ("none", "maximum", "average", "both", "sampled_maximum", "sampled_average", "sampled_both"),
    "normalise_by": ("all", "accepted"),
    "aggregation": AGGREGATIONS,
    "kl_estimator": ("none", "exact", *ESTIMATORS),
}
"""What each field of a recipe may say."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One policy-gradient objective as data. Hashable: pass it to jit as a static argument.

    Attributes:
        name: for tables and logs.
        source: the paper.
        advantage: a function of `advantages.py`; "given" where the recipe needs a value function or the caller's own.
        ratio: "token", or "geometric" for the length-normalised sequence ratio of GSPO.
        denominator: the policy under the ratio: "old" (start of the update) or "behaviour" (the one that sampled).
        surrogate: a function of `surrogates.py`.
        aggregation: a name of `aggregation.AGGREGATIONS`.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: bound of the loss for negative advantages, read by "dual_clipped" only.
        correction: a function of `corrections.py` applied to log pi_old - log mu, or "none".
        correction_low: lower end of the weights a masked correction keeps.
        correction_high: cap of a truncated correction, upper end of a masked one.
        mask: which test of `masks.py` accepts a sequence, or "none".
        mask_maximum: threshold of the maximum test [nats].
        mask_average: threshold of the average test [nats].
        normalise_by: "all" sequences (the estimator of the papers) or the "accepted" ones.
        kl_estimator: how KL(pi || ref) is computed: a name of `divergences.ESTIMATORS`, "exact", or "none".
        kl_coefficient: weight of the KL term.
        entropy_coefficient: weight of the entropy bonus, which needs the exact entropy of each context.
        length_normaliser: constant length of "seq-mean-token-sum-norm" [tokens].
        log_min_p: the policy is the one renormalised on its safe set at this threshold (`pruning.py`): log-probs are
            passed under it, with whether each target is inside; None for the whole vocabulary.

    Raises:
        ValueError: if a field holds a name that does not exist, or a threshold that keeps nothing.
    """

    name: str
    source: str
    advantage: str
    surrogate: str
    aggregation: str
    ratio: str = "token"
    denominator: str = "old"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    correction: str = "none"
    correction_low: float = 0.0
    correction_high: float = 2.0
    mask: str = "none"
    mask_maximum: float = 0.05
    mask_average: float = 0.001
    normalise_by: str = "all"
    kl_estimator: str = "none"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    length_normaliser: float | None = None
    log_min_p: float | None = None

    def __post_init__(self):
        for field, choices in CHOICES.items():
            require_choice(f"{field} of recipe {self.name!r}", getattr(self, field), choices)
        if self.log_min_p is not None and not self.log_min_p <= 0:
            raise ValueError(
                f"log_min_p of recipe {self.name!r} is {self.log_min_p}; it must be at most 0, or nothing is kept."
            )


_PPO = Recipe(
    name="ppo",
    source="Schulman et al. 2017, arXiv 1707.06347, eq. 7",
    advantage="given",
    surrogate="clipped",
    aggregation="token-mean",
)

_GRPO = Recipe(
    name="grpo",
    source="Shao et al. 2024, arXiv 2402.03300, eqs. 3 and 4",
    advantage="group_normalised",
    surrogate="clipped",
    aggregation="seq-mean-token-mean",
    kl_estimator="k3",
    kl_coefficient=0.04,
)

_TRM = Recipe(
    name="trm",
    source="Li et al. 2025, arXiv 2512.23075 (TRM, both tests)",
    advantage="group_normalised",
    surrogate="importance_weighted",
    aggregation="seq-mean-token-sum",
    denominator="behaviour",
    mask="both",
    # The pair of thresholds that is stable together in the paper's runs, though each alone is too loose.
    mask_maximum=0.1,
    mask_average=0.002,
)

_ALL = (
    Recipe(
        name="reinforce",
        source="Williams 1992, with the batch mean as baseline",
        advantage="batch_centred",
        surrogate="score_function",
        aggregation="seq-mean-token-sum",
    ),
    dataclasses.replace(
        _PPO,
        name="reinforce_plus_plus",
        source="Hu 2025, arXiv 2501.03262 (its KL belongs into the reward)",
        advantage="batch_normalised",
    ),
    dataclasses.replace(
        _PPO,
        name="reinforce_plus_plus_baseline",
        source="Hu 2025, arXiv 2501.03262 (group baseline)",
        advantage="group_centred_batch_normalised",
    ),
    Recipe(
        name="rloo",
        source="Ahmadian et al. 2024, arXiv 2402.14740",
        advantage="leave_one_out",
        surrogate="score_function",
        aggregation="seq-mean-token-sum",
    ),
    _GRPO,
    dataclasses.replace(
        _GRPO,
        name="dr_grpo",
        source="Liu et al. 2025, arXiv 2503.20783",
        advantage="group_centred",
        aggregation="seq-mean-token-sum",
        kl_estimator="none",
        kl_coefficient=0.0,
    ),
    dataclasses.replace(
        _GRPO,
        name="dapo",
        source="Yu et al. 2025, arXiv 2503.14476, eq. 10 (dynamic sampling is `advantages.informative_groups`)",
        clip_high=0.28,
        aggregation="token-mean",
        kl_estimator="none",
        kl_coefficient=0.0,
    ),
    Recipe(
        name="gspo",
        source="Zheng et al. 2025, arXiv 2507.18071, eq. 5",
        advantage="group_normalised",
        surrogate="clipped",
        aggregation="seq-mean-token-mean",
        ratio="geometric",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    Recipe(
        name="cispo",
        source="MiniMax-M1 2025, arXiv 2506.13585, eqs. 4 and 5 (clip_high is ours: the paper prints none)",
        advantage="group_normalised",
        surrogate="clipped_weight",
        aggregation="token-mean",
        clip_low=1.0,
        clip_high=4.0,
    ),
    _PPO,
    dataclasses.replace(
        _TRM, name="trm_max", source="Li et al. 2025, arXiv 2512.23075 (TRM-Max)", mask="maximum", mask_maximum=0.05
    ),
    dataclasses.replace(
        _TRM, name="trm_avg", source="Li et al. 2025, arXiv 2512.23075 (TRM-Avg)", mask="average", mask_average=0.001
    ),
    _TRM,
    dataclasses.replace(
        _PPO,
        name="empg",
        source="Wang et al. 2025, arXiv 2509.09265 (advantages from `modulation.modulated_advantages`)",
    ),
    Recipe(
        name="dvp",
        source="Taming the Tail, arXiv 2512.23087 (REINFORCE on the pruned policy, token-level truncated correction)",
        advantage="leave_one_out",
        surrogate="score_function",
        aggregation="seq-mean-token-sum",
        correction="token_truncated",
        correction_high=2.0,
        log_min_p=-13.0,
    ),
    Recipe(
        name="hybrid",
        source="arXiv 2512.23097 (advantages: minus `hybrid.sparse_coefficient`; the reference is the teacher)",
        advantage="given",
        surrogate="score_function",
        aggregation="seq-mean-token-sum",
        kl_estimator="exact",
        kl_coefficient=1.0,
    ),
    Recipe(
        name="divergence_augmented",
        source="Wang et al. 2019, arXiv 2501.15034 (advantages: `divergence_augmented.augmented_advantages`)",
        advantage="given",
        surrogate="importance_weighted",
        aggregation="token-mean",
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}
"""Every recipe by name."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: naming the nearest recipe, if there is none of that name.
    """
    require_choice("recipe", name, RECIPES)
    return RECIPES[name]


@checked
def sequence_advantages(recipe: Recipe, rewards: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """The advantage of each sequence by the recipe's rule; call it on the whole batch, before it is cut into
    micro-batches.

    Args:
        recipe: whose field `advantage` names the rule.
        rewards: one reward per sequence.
        group_ids: equal for sequences that answer the same prompt.

    Returns:
        one advantage per sequence.

    Raises:
        ValueError: if the recipe's advantages must be given ("given": a value function, or the caller's own).
    """
    if recipe.advantage == "given":
        raise ValueError(
            f"recipe {recipe.name!r} takes advantages as given; compute them, for instance by "
            "generalised_advantage_estimation, or replace its field advantage."
        )
    if recipe.advantage in ("batch_centred", "batch_normalised"):
        return getattr(advantages, recipe.advantage)(rewards)
    return getattr(advantages, recipe.advantage)(rewards, group_ids)
