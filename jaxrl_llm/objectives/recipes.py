"""Recipes: each paper's objective as one row of data, composed from the parts of this package.

    loss = aggregate( mask * correction * surrogate(ratio, advantage) + kl_coefficient * KL - entropy_coefficient *
    entropy )

A recipe says which part fills each place. Read `RECIPES` line by line against the papers; change a row with
`dataclasses.replace`. `policy_loss` evaluates one.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_choice
from jaxrl_llm.objectives.aggregation import AGGREGATIONS
from jaxrl_llm.objectives.divergence_augmented import PSEUDO_REWARDS
from jaxrl_llm.objectives.divergences import ESTIMATORS
from jaxrl_llm.objectives.recipe_fields import RecipeFields
from jaxrl_llm.objectives.rules import CORRECTIONS
from jaxrl_llm.objectives.rules import MASKS
from jaxrl_llm.objectives.rules import SURROGATES
from jaxrl_llm.objectives.signals import SIGNALS
from jaxrl_llm.objectives.signals import SignalInputs
from jaxrl_llm.objectives.signals import advantages_of

CHOICES = {
    "advantage": ("given", *SIGNALS),
    "ratio": ("token", "geometric"),
    "denominator": ("old", "behaviour"),
    "surrogate": tuple(SURROGATES),
    "correction": ("none", *CORRECTIONS),
    "mask": ("none", *MASKS),
    "normalise_by": ("all", "accepted"),
    "aggregation": AGGREGATIONS,
    "kl_estimator": ("none", "exact", *ESTIMATORS),
    "divergence": PSEUDO_REWARDS,
}
"""What each field of a recipe may say: the names of the rules."""


@dataclasses.dataclass(frozen=True)
class Recipe(RecipeFields):
    """One policy-gradient objective as data: `RecipeFields`, each name of which exists. Hashable: pass it to jit as a
    static argument.

    Raises:
        ValueError: if a field holds a name that does not exist, or a number that it must not.
    """

    def __post_init__(self):
        given = vars(self)
        for field, choices in CHOICES.items():
            require_choice(f"{field} of recipe {self.name!r}", given[field], choices)
        super().__post_init__()


_PPO = Recipe(
    name="ppo",
    source="Schulman et al. 2017, arXiv 1707.06347, eqs. 7 and 11",
    # Normalised, as every public implementation has it: else the unit of the reward scales the step.
    advantage="gae_normalised",
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
    Recipe(
        name="group_reinforce",
        source="GLM-4.5 2025, arXiv 2508.06471, section 3, agentic RL (with the log-prob that it omits: errata F10.1)",
        advantage="group_centred",
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
        # Without the groups whose rewards are all equal, unlike the paper's listing (errata F4.2).
        advantage="empg",
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
        advantage="sparse_imitation",
        surrogate="score_function",
        aggregation="seq-mean-token-sum",
        kl_estimator="exact",
        kl_coefficient=1.0,
    ),
    Recipe(
        name="divergence_augmented",
        source="Wang et al. 2019, arXiv 2501.15034 (advantages: `divergence_augmented.augmented_advantages`)",
        advantage="divergence_augmented",
        surrogate="importance_weighted",
        aggregation="token-mean",
        # Old data is reused: the ratio is to the policy that sampled it, which on a fresh batch is the old one.
        denominator="behaviour",
        discount=0.99,
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


def loss_needs(recipe: RecipeFields) -> tuple[str, ...]:
    """Names of the arguments of `policy_loss` that may be None and that this recipe needs, in no order that matters.

    log_prob_old, log_prob_behaviour, log_prob_ref, kl_t, kl_ref_t, entropy, target_kept: what nobody names here need
    not be computed. What its advantages need is `SIGNALS[recipe.advantage].needs`.
    """
    below = {"ratio": f"log_prob_{recipe.denominator}"}
    names = [below.get(name, name) for name in SURROGATES[recipe.surrogate].needs]
    if recipe.correction != "none":
        names += CORRECTIONS[recipe.correction].needs
    if recipe.mask != "none":
        names += MASKS[recipe.mask].needs
    if recipe.log_min_p is not None:
        names.append("target_kept")
    if recipe.kl_estimator != "none" and recipe.kl_coefficient != 0:
        names.append("kl_ref_t" if recipe.kl_estimator == "exact" else "log_prob_ref")
    if recipe.entropy_coefficient != 0:
        names.append("entropy")
    return tuple(dict.fromkeys(names))


@checked
def sequence_advantages(
    recipe: RecipeFields, rewards: Float[Array, " B"], group_ids: Int[Array, " B"]
) -> Float[Array, " B"]:
    """The advantage of each sequence, for rules that need rewards and groups alone: `advantages_of` in short. Call it
    on the whole batch, before it is cut into micro-batches.

    Args:
        recipe: whose field `advantage` names the rule.
        rewards: one reward per sequence.
        group_ids: equal for sequences that answer the same prompt.

    Returns:
        one advantage per sequence.

    Raises:
        ValueError: if the recipe's advantages must be given ("given"), or their rule needs more than rewards and
            groups.
    """
    nothing = jnp.zeros((rewards.shape[0], 0), rewards.dtype)
    nobody = jnp.zeros((rewards.shape[0], 0), jnp.int32)
    return advantages_of(
        recipe,
        SignalInputs(
            response_mask=jnp.zeros((rewards.shape[0], 0), bool),
            rewards=rewards,
            rewards_t=nothing,
            group_ids=group_ids,
            step_ids=nobody,
            actor_ids=nobody,
            ended=jnp.ones(rewards.shape[0], bool),
        ),
    )
