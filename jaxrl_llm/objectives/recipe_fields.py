"""The fields of a recipe, and the numbers they may hold. Which names they may hold, the tables say (`recipes.py`)."""

import dataclasses
import math
import numbers
from typing import NamedTuple


class Range(NamedTuple):
    """The finite numbers that a field may hold.

    Attributes:
        low: the least one.
        high: the greatest one; inf where there is none, and inf itself is refused all the same.
        above: whether `low` itself is refused.
        whole: whether only whole numbers are meant.
        optional: whether None may stand in the place of a number.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    whole: bool = False
    optional: bool = False

    def sentence(self) -> str:
        """What the field must be, for an error."""
        what = "a whole number" if self.whole else "a finite number"
        if self.low > -math.inf:
            what += f" {'above' if self.above else 'of at least'} {self.low:g}"
        if self.high < math.inf:
            what += f" {'and' if self.low > -math.inf else 'of'} at most {self.high:g}"
        return what + (", or None" if self.optional else "")

    def holds(self, value: object) -> bool:
        """Whether the field may hold `value`."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        number = float(value)
        if not math.isfinite(number) or (self.whole and not number.is_integer()):
            return False
        return self.low <= number <= self.high and not (self.above and number == self.low)


RANGES = {
    "clip_low": Range(0.0),
    "clip_high": Range(0.0),
    "dual_clip": Range(0.0, above=True),
    "divergence_threshold": Range(0.0),
    "correction_low": Range(0.0),
    "correction_high": Range(0.0, above=True),
    "mask_maximum": Range(0.0),
    "mask_average": Range(0.0),
    "mask_horizon": Range(1, whole=True, optional=True),
    "mask_slope": Range(0.0, 1.0, above=True),
    "kl_coefficient": Range(0.0),
    "entropy_coefficient": Range(),
    "length_normaliser": Range(0.0, above=True, optional=True),
    "log_min_p": Range(high=0.0, optional=True),
    "discount": Range(0.0, 1.0),
    "trace": Range(0.0, 1.0),
    "sharpness": Range(0.0),
    "clarity_sharpness": Range(0.0),
    "clarity_weight": Range(0.0),
    "reward_weight": Range(0.0),
    "divergence_coefficient": Range(0.0),
    "trace_cap": Range(0.0),
}
"""Every field that holds a number, and which."""


@dataclasses.dataclass(frozen=True)
class RecipeFields:
    """What a recipe says; the rules of `rules.py` and `signals.py` read it. Make a `Recipe`, which knows the names.

    Attributes:
        name: for tables and logs.
        source: the paper.
        advantage: a rule of `signals.SIGNALS`; "given" where the caller has advantages of his own.
        ratio: "token", or "geometric" for the length-normalised sequence ratio of GSPO.
        denominator: the policy under the ratio: "old" (start of the update) or "behaviour" (the one that sampled).
        surrogate: a rule of `rules.SURROGATES`.
        aggregation: a name of `aggregation.AGGREGATIONS`.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: bound of the loss for negative advantages, read by "dual_clipped" only.
        divergence_threshold: KL(behaviour || pi) of a context above which "divergence_masked" drops a token that moves
            outwards [nats]. The default is TRM's for its maximum test (arXiv 2512.23075), not one of DPPO's.
        correction: a rule of `rules.CORRECTIONS` applied to log pi_old - log mu, or "none".
        correction_low: lower end of the weights a masked correction keeps.
        correction_high: cap of a truncated correction, upper end of a masked one.
        mask: a rule of `rules.MASKS`, which test accepts a sequence, or "none".
        mask_maximum: threshold of the maximum test [nats].
        mask_average: threshold of the average test [nats], and of the deviations of the ratio, which have no unit (the
            paper suggests 0.03 to 0.10 for those).
        mask_horizon: the longest response that is allowed, to which the weights of "weighted_ratio_deviation" belong
            [tokens]; None takes the columns of the batch.
        mask_slope: eps of these weights, w_t = min(1, (horizon - t) eps): the largest total variation of a context
            [prob]. The default is the one of the paper's table of bounds (arXiv 2512.23075).
        normalise_by: "all" sequences (the estimator of the papers) or the "accepted" ones.
        kl_estimator: how KL(pi || ref) is computed: a name of `divergences.ESTIMATORS`, "exact", or "none".
        kl_coefficient: weight of the KL term; where it is 0 there is none.
        entropy_coefficient: weight of the entropy bonus, which needs the exact entropy of each context.
        length_normaliser: constant length of "seq-mean-token-sum-norm" [tokens].
        log_min_p: the policy is the one renormalised on its safe set at this threshold (`pruning.py`): log-probs are
            passed under it, with whether each target is inside; None for the whole vocabulary.
        discount: of rewards and divergences per token, in [0, 1]; read by gae, sparse_imitation and
            divergence_augmented. 1 for answers that end, as in RLHF (Ouyang et al. 2022, arXiv 2203.02155).
        trace: lambda of GAE, in [0, 1]. The default is that of PPO (Schulman et al. 2017, arXiv 1707.06347, table 3).
        sharpness: k of EMPG's scale; its largest is at most exp(k) times its smallest (Wang et al. 2025, arXiv
            2509.09265: 1).
        clarity_sharpness: k' of EMPG's bonus (arXiv 2509.09265: 1).
        clarity_weight: zeta of EMPG's bonus, in units of the normalised advantage (0.1 in the paper's listing).
        reward_weight: lambda of "sparse_imitation" [nats per unit of reward], the inverse temperature of the optimum
            pi_T exp(lambda R). The default is ours: the note's value (arXiv 2512.23097) could not be found.
        divergence: a name of `divergence_augmented.PSEUDO_REWARDS`.
        divergence_coefficient: 1 / eta of "divergence_augmented" (1 in the named runs of the code of arXiv 2501.15034,
            0.5 in some), in units of the scaled advantage per nat.
        trace_cap: cap of the ratios in the sum of divergences: 1 its n-step form, 0 its 1-step form.

    Raises:
        ValueError: if a field holds a number that it must not, NaN and inf included.
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
    divergence_threshold: float = 0.05
    mask_horizon: int | None = None
    mask_slope: float = 0.005
    discount: float = 1.0
    trace: float = 0.95
    sharpness: float = 1.0
    clarity_sharpness: float = 1.0
    clarity_weight: float = 0.1
    reward_weight: float = 1.0
    divergence: str = "kl"
    divergence_coefficient: float = 1.0
    trace_cap: float = 1.0

    def __post_init__(self):
        given = vars(self)
        for field, range_ in RANGES.items():
            if not range_.holds(given[field]):
                raise ValueError(
                    f"{field} of recipe {self.name!r} is {given[field]!r}; it must be {range_.sentence()}."
                )
        if self.correction_low > self.correction_high:
            raise ValueError(
                f"correction_low of recipe {self.name!r} is {self.correction_low}, above its correction_high "
                f"{self.correction_high}; it must be at most that, or nothing is kept."
            )
