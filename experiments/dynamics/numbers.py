"""From the probes of a learner, [seeds, points, ...], to what is reported: numbers per seed, and their intervals."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from experiments.lab.numbers import Interval
from experiments.lab.numbers import over_seeds
from experiments.study import Arrays

ROUNDINGS = 30
"""Changes of the logits of fewer units in their last place are left out of ratios and correlations."""

FEWEST = 8
"""Tokens that a correlation of one batch needs."""

BATCH, TOKEN, ADAM = "batch", "token", "adam"
"""The three kinds of probes: the update of the batch, one token's gradient alone, and Adam's update of the batch."""

Table = Mapping[str, np.ndarray]


def tokens_of(part: Arrays, kind: str, seed: int, point: int, *, every: bool = False) -> Table:
    """The tokens of one probe as flat arrays: those that the formula moves, by more than rounding; or `every` one."""
    named = {name.removeprefix(f"{kind}_"): part[name][seed, point] for name in part if name.startswith(f"{kind}_")}
    keep = named["real" if kind == TOKEN else "mask"]
    if not every:
        keep = keep & (named["predicted"] > 0) & (named["realised"] > 0)
        keep = keep & (named["first"] > ROUNDINGS * named["rounding"])
    return {name: values[keep] for name, values in named.items()}


def rank_correlation(table: Table, size: str = "realised") -> float:
    """Spearman's, of realised and predicted sizes."""
    return float(np.corrcoef(*(stats.rankdata(table[name]) for name in (size, "predicted")))[0, 1])


def slope(table: Table) -> float:
    """Of log realised on log predicted, by least squares: 1 where one is proportional to the other."""
    return float(np.polyfit(np.log(table["predicted"]), np.log(table["realised"]), 1)[0])


def partial_correlation(table: Table) -> float:
    """Of log realised and log sqrt(1 - 2 p + C), both without what log |A| explains linearly."""
    advantage = np.log(np.abs(table["step"]))
    given = np.stack([np.ones_like(advantage), advantage], axis=1)
    left = []
    for name in ("realised", "unit"):
        values = np.log(table[name])
        left.append(values - given @ np.linalg.lstsq(given, values, rcond=None)[0])
    return float(np.corrcoef(*left)[0, 1])


def spread(table: Table) -> float:
    """95 % quantile over 5 % quantile of realised / predicted: 1 where there is one factor for all tokens."""
    low, high = np.quantile(table["realised"] / table["predicted"], [0.05, 0.95])
    return float(high / low)


def _mean_of(name: str) -> Callable[[Table], float]:
    return lambda table: float(table[name].mean())


def _median_ratio(top: str, bottom: str) -> Callable[[Table], float]:
    return lambda table: float(np.median(table[top] / table[bottom]))


def _share_of_updates(name: str) -> Callable[[Table], float]:
    """Of the updates with A > 0, those that raise at least one other action."""

    def share(table: Table) -> float:
        rewarded = table["step"] > 0
        return float((table[name][rewarded] > 0).mean()) if rewarded.any() else np.nan

    return share


STATISTICS: Mapping[str, Callable[[Table], float]] = {
    "rank_correlation": rank_correlation,
    "centred_rank_correlation": lambda table: rank_correlation(table, "centred"),
    "slope": slope,
    "partial_correlation": partial_correlation,
    "spread": spread,
    "ratio": _median_ratio("realised", "predicted"),
    "realised_over_first": _median_ratio("realised", "first"),
    "centred": _median_ratio("centred", "realised"),
    "unit": _mean_of("unit"),
    "p": _mean_of("p"),
    "rising_formula": _share_of_updates("rising_formula"),
    "rising": _share_of_updates("rising"),
    "agreeing": _mean_of("agreeing"),
    "agreeing_mass": _mean_of("agreeing_mass"),
}
"""Of the tokens of one probe."""


def per_seed(part: Arrays, kind: str, statistic: Callable[[Table], float]) -> np.ndarray:
    """Mean over the points of each seed; points with too few tokens, or constant ones, are passed over."""
    seeds, points = part[f"{kind}_predicted"].shape[:2]
    found = np.full((seeds, points), np.nan)
    with np.errstate(all="ignore"):
        for seed, point in np.ndindex(seeds, points):
            table = tokens_of(part, kind, seed, point)
            # Where all sizes are the same, as those of a uniform policy, they have no order to follow.
            if len(table["step"]) >= FEWEST and np.ptp(np.log(table["unit"])) > 1e-3:
                found[seed, point] = statistic(table)
    known = np.isfinite(found).any(axis=1).all()
    return np.nanmean(found, axis=1) if known else np.full(seeds, np.nan)


def interval(part: Arrays, kind: str, name: str) -> Interval:
    """A statistic with its interval over seeds."""
    return over_seeds(per_seed(part, kind, STATISTICS[name]))


def formula_per_advantage(part: Arrays) -> np.ndarray:
    """[seeds, points] mean of sqrt(1 - 2 p + C) over all sampled tokens."""
    return _over_probes(part, BATCH, lambda table: float(table["unit"].mean()))


def realised_per_advantage(part: Arrays, kind: str) -> np.ndarray:
    """[seeds, points] mean realised size over all tokens of the probe, over the mean of their |eta A|."""
    return _over_probes(part, kind, lambda table: float(table["realised"].mean() / np.abs(table["step"]).mean()))


def _over_probes(part: Arrays, kind: str, value: Callable[[Table], float]) -> np.ndarray:
    shape = part[f"{kind}_step"].shape[:2]
    with np.errstate(all="ignore"):
        found = [value(tokens_of(part, kind, *place, every=True)) for place in np.ndindex(shape)]
    # A batch without any advantage has no step to divide by.
    return np.where(np.isfinite(found), found, np.nan).reshape(shape)


def fall(values: np.ndarray) -> np.ndarray:
    """Of each seed: the last point that has a number over the first one; NaN where none has."""
    known = [row[np.isfinite(row)] for row in values]
    return np.array([row[-1] / row[0] if len(row) else np.nan for row in known])


def without_advantage(part: Arrays) -> np.ndarray:
    """Of each seed: mean realised change of tokens whose advantage is 0, over that of the others; by the formula 0."""
    shares = []
    for seed in range(len(part["batch_step"])):
        real, step = part["batch_mask"][seed], part["batch_step"][seed]
        still, other = real & (step == 0), real & (step != 0)
        realised = part["batch_realised"][seed]
        shares.append(realised[still].mean() / realised[other].mean() if still.any() and other.any() else np.nan)
    return np.array(shares)


def kernel_range_kept(part: Arrays) -> float:
    """Share of single tokens whose first-order change over the formula lies between the extreme eigenvalues of K."""
    real = part["token_real"] & (part["token_predicted"] > 0)
    ratio = part["token_first"][real] / part["token_predicted"][real]
    low, high = part["token_kernel_low"][real], part["token_kernel_high"][real]
    # Eigenvalues of a float32 matrix are known to some millionths of the largest.
    slack = 1e-4 * high
    return float(((ratio >= np.where(np.isnan(low), 0, low) - slack) & (ratio <= high + slack)).mean())


def exactness(part: Arrays) -> Mapping[str, float]:
    """How far single tokens are from the formula: to first order, relatively; and before and after, in logits."""
    real = part["token_real"] & (part["token_predicted"] > 0)
    predicted = part["token_predicted"][real]
    return {
        "first_order_relative_error": float(np.abs(part["token_first"][real] / predicted - 1).max()),
        "realised_error": float(np.abs(part["token_realised"][real] - predicted).max()),
    }


def summary_of(part: Arrays) -> dict[str, Any]:
    """The numbers of a learner: means over seeds, and as `_half` their 95 % half-intervals (None for one seed)."""
    summary: dict[str, Any] = {}
    for kind in (BATCH, TOKEN, ADAM):
        if f"{kind}_step" not in part:
            continue
        for name in STATISTICS:
            _put(summary, f"{kind}_{name}", interval(part, kind, name))
        _put(summary, f"{kind}_last_over_first", over_seeds(fall(realised_per_advantage(part, kind))))
    _put(summary, "formula_last_over_first", over_seeds(fall(formula_per_advantage(part))))
    real = part["token_real"] & (part["token_advantage"] != 0)
    for name in ("own", "own_cosine"):
        medians = [np.median(part[f"token_{name}"][seed][real[seed]]) for seed in range(len(real))]
        _put(summary, name, over_seeds(np.array(medians)))
    _put(summary, "without_advantage", over_seeds(without_advantage(part)))
    tail = max(1, part["reward"].shape[1] // 10)
    _put(summary, "reward_first", over_seeds(part["reward"][:, :tail].mean(axis=1)))
    _put(summary, "reward_last", over_seeds(part["reward"][:, -tail:].mean(axis=1)))
    return summary | {
        "kernel_range_kept": kernel_range_kept(part),
        "kernel_low": _finite(np.median(part["token_kernel_low"][part["token_real"]])),
        "kernel_high": _finite(np.median(part["token_kernel_high"][part["token_real"]])),
        **exactness(part),
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _put(summary: dict[str, Any], name: str, found: Interval) -> None:
    summary[name], summary[f"{name}_half"] = _finite(found.mean), _finite(found.half)
