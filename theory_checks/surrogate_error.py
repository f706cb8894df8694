"""How far the surrogate can be from the truth: Trust Region Masking (arXiv 2512.23075), printed and sharp."""

import functools

import numpy as np

from jaxrl_llm.bounds import PRINTED
from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds.surrogate_error import UNIFIED
from theory_checks.check import Check
from theory_checks.check import Measured
from theory_checks.check import Sides
from theory_checks.surrogate_fixtures import FIXTURES
from theory_checks.surrogate_worlds import WORLD

PAPER = "arXiv 2512.23075"
DERIVED = "derived (docs/theory.md)"

WRONG_FACTOR = {"mixed_kl": 0.45, "mixed_tv": 0.9, "linear": 0.9, "average_only": 0.6, "sequence_kl": 0.9}
"""What the sharp bound is multiplied by in its wrong twin: one half, or what the worlds here decide."""

PRINTED_FACTOR = {"mixed_kl": 0.15, "mixed_tv": 0.2, "linear": 0.2}
"""The same for the printed bound, where it is not a quarter."""

_TV, _KL = "min(1, eps)", "min(1, sqrt(delta/2))"
_ADAPTIVE = "sum_t Dbar_t min(1, (T - t) eps, sqrt((T - t) delta/2))"


def _both(rest: str) -> tuple[str, str]:
    return f"4 {rest}", f"2 {rest}"


FORMULA = {
    "classical": ("2 T (T - 1) eps^2", "T (T - 1) eps^2"),
    "coupling": _both(f"{_TV} sum_t min(1, (t - 1) eps)"),
    "pinsker_marginal_kl": _both(f"{_KL} sum_t min(1, sqrt((t - 1) delta/2))"),
    "pinsker_marginal_tv": _both(f"{_TV} sum_t min(1, sqrt((t - 1) delta/2))"),
    "mixed_kl": (f"4 T {_KL} min(1, sqrt(D_KL/2))", f"min(T {_KL}, sqrt(T delta D_KL))"),
    "mixed_tv": (f"4 T {_TV} D_TV", f"{_TV} min(T, 2 (T - 1) D_TV)"),
    "adaptive_kl": _both("sum_t Dbar_t min(1, sqrt((T - t) delta/2))"),
    "adaptive_tv": _both("sum_t Dbar_t min(1, (T - t) eps)"),
    "adaptive": _both(_ADAPTIVE),
    "linear": ("4 sum_t Dbar_t", "sum_t Dbar_t"),
    "average_only": ("", "D_TV + sum_t Dbar_t"),
    "sequence_kl": ("", "D_KL = KL(P^mu || P^pi), from averages alone"),
}
"""Name of a bound -> its formula, printed and sharp."""


def _error(m: Measured) -> np.ndarray:
    return np.abs(m["error"])


def _bounded_by(m: Measured, *, key: str, factor: float = 1.0) -> Sides:
    return Sides(_error(m), factor * m[key])


def _bound_checks() -> list[Check]:
    checks = []
    for table, prefix in ((PRINTED, "printed"), (SHARP, "sharp")):
        for name in table:
            wrong = PRINTED_FACTOR.get(name, 0.25) if prefix == "printed" else WRONG_FACTOR.get(name, 0.5)
            paper = PAPER if prefix == "printed" else DERIVED
            checks.append(
                Check(
                    name=f"surrogate_error.{name}_{prefix}",
                    paper=paper,
                    statement=f"|Error| <= {FORMULA[name][prefix == 'sharp']}",
                    functions=(f"bounds.surrogate_error.{name}_{prefix}",),
                    world=WORLD,
                    sides=functools.partial(_bounded_by, key=f"{prefix}_{name}"),
                    wrong=functools.partial(_bounded_by, key=f"{prefix}_{name}", factor=wrong),
                )
            )
    return checks


def _pair(m: Measured, *, key: str, factor: float = 1.0) -> Sides:
    return Sides(m[key][:, 0], factor * m[key][:, 1])


_SHIFT = {
    "coupling": ("(t - 1) eps", 0.5),
    "pinsker": ("sqrt((t - 1) delta / 2)", 0.5),
    "sequence_tv": ("D_TV", 0.5),
    "sequence_kl": ("sqrt(D_KL / 2)", 0.5),
}


def _shift_checks() -> list[Check]:
    return [
        Check(
            name=f"surrogate_error.context_shift_{route}",
            paper=PAPER,
            statement=f"TV of the laws of contexts at position t <= min(1, {formula})",
            functions=("bounds.inputs.BoundInputs",),
            world=WORLD,
            sides=functools.partial(_pair, key=f"shift_{route}"),
            wrong=functools.partial(_pair, key=f"shift_{route}", factor=factor),
        )
        for route, (formula, factor) in _SHIFT.items()
    ]


def _dominated(m: Measured, *, wrong: bool) -> Sides:
    replaced = ["pinsker_marginal_kl", "pinsker_marginal_tv", "coupling", "adaptive_kl", "adaptive_tv"]
    # Against a bound from averages, which can be smaller, it would fail.
    others = [m[f"sharp_{name}"] for name in [*replaced, *(["linear"] if wrong else [])]]
    return Sides(m["sharp_adaptive"], np.min([*others, m["printed_mixed_kl"] / 2], axis=0))


def _attained(m: Measured, *, factor: float = 1.0) -> Sides:
    """2 eps^2 in the two-token worlds but the last; other worlds compare the error with itself."""
    here = (m["two_tokens"] > 0) & (m["max_tv"] < 0.5)
    names = ("classical", "coupling", "adaptive", "adaptive_tv")
    sharp = np.stack([np.where(here, factor * m[f"sharp_{name}"], _error(m)) for name in names], axis=1)
    return Sides(np.repeat(_error(m)[:, None], len(names), axis=1), sharp)


def _identity_checks() -> list[Check]:
    def identity(name, statement, functions, left, right, wrong, paper=PAPER, tolerance=1e-10):
        return Check(
            name=f"surrogate_error.{name}",
            paper=paper,
            statement=statement,
            functions=functions,
            world=WORLD,
            sides=lambda m: Sides(left(m), right(m)),
            wrong=lambda m: Sides(wrong(m), right(m)),
            equality=True,
            tolerance=tolerance,
        )

    return [
        identity(
            "ratio_form",
            "Error = -E_mu[R sum_t (rho_t - 1)(1 - prod_{j>t} rho_j)]",
            ("bounds.sampled.sampled_surrogate_error",),
            lambda m: m["ratio_form"],
            lambda m: m["error"],
            lambda m: m["ratio_form_wrong"],
        ),
        identity(
            "performance_difference",
            "Error = sum_t (E_{d_t^pi} g_t - E_{d_t^mu} g_t)",
            ("bounds.surrogate_error.surrogate_error_bounds",),
            lambda m: m["performance_difference"],
            lambda m: m["error"],
            lambda m: m["performance_sum"],
        ),
        identity(
            "sampled_surrogate",
            "E of the sampled surrogate gain = L'",
            ("bounds.sampled.sampled_surrogate_gain",),
            lambda m: m["sampled_surrogate"],
            lambda m: m["surrogate"],
            lambda m: m["sampled_gain"],
        ),
        identity(
            "sampled_gain",
            "E of the sampled gain = J(pi) - J(mu)",
            ("bounds.sampled.sampled_gain",),
            lambda m: m["sampled_gain"],
            lambda m: m["gain"],
            lambda m: m["sampled_surrogate"],
        ),
        identity(
            "sampled_sequence_tv",
            "(1/2) E_mu|prod rho - 1| = E_mu max(0, 1 - prod rho) = TV of the sequence laws",
            ("bounds.sampled.sampled_sequence_tv", "bounds.sampled.sampled_sequence_tv_one_sided"),
            lambda m: np.stack([m["sampled_tv"], m["sampled_tv_one_sided"]], axis=1),
            lambda m: np.repeat(m["sequence_tv"][:, None], 2, axis=1),
            lambda m: np.stack([m["sampled_tv"] * 2, m["sampled_tv_one_sided"]], axis=1),
        ),
        identity(
            "weighted_deviation",
            "E_mu sum_t |rho_t - 1| min(1, (T - t) eps) = the adaptive TV bound with the sharp constant",
            ("bounds.sampled.sampled_weighted_deviation",),
            lambda m: m["weighted_deviation"],
            lambda m: m["sharp_adaptive_tv"],
            lambda m: 2 * m["weighted_deviation"],
            paper=DERIVED,
        ),
        identity(
            "baseline_offset",
            "erratum F2.1: printed surrogate E_mu[(R - b) sum_t rho_t] = L' + T (J(mu) - b)",
            ("bounds.sampled.sampled_surrogate_gain",),
            lambda m: m["printed_surrogate"],
            lambda m: m["surrogate"] + m["offset"],
            lambda m: m["printed_surrogate"] - m["offset"],
            paper=DERIVED,
        ),
        identity(
            "k3_unbiased",
            "E_mu k3 = KL(mu || pi) in every context",
            ("objectives.divergences.k3",),
            lambda m: m["k3"][:, 0],
            lambda m: m["k3"][:, 1],
            lambda m: m["k3"][:, 1] + m["k3_wrong"][:, 0],
        ),
        Check(
            name="surrogate_error.sharp_constant_attained",
            paper=DERIVED,
            statement="|Error| = 2 eps^2 = classical = coupling = adaptive (sharp) in a world of two tokens",
            functions=tuple(
                f"bounds.surrogate_error.{name}_sharp" for name in ("classical", "coupling", "adaptive", "adaptive_tv")
            ),
            world=WORLD,
            sides=_attained,
            wrong=functools.partial(_attained, factor=0.5),
            equality=True,
        ),
    ]


def _order_checks() -> list[Check]:
    def bound(name, statement, functions, left, right, wrong, paper=PAPER):
        return Check(
            name=f"surrogate_error.{name}",
            paper=paper,
            statement=statement,
            functions=functions,
            world=WORLD,
            sides=lambda m: Sides(left(m), right(m)),
            wrong=lambda m: Sides(left(m), wrong(m)),
        )

    return [
        bound(
            "unified_printed",
            f"|Error| <= the smallest of {len(UNIFIED)} printed bounds",
            ("bounds.surrogate_error.surrogate_error_bounds",),
            _error,
            lambda m: m["unified_printed"],
            lambda m: m["unified_printed"] / 4,
        ),
        bound(
            "unified_sharp",
            f"|Error| <= the smallest of {len(SHARP)} sharp bounds",
            ("bounds.surrogate_error.surrogate_error_bounds",),
            _error,
            lambda m: m["unified_sharp"],
            lambda m: m["unified_sharp"] / 2,
            paper=DERIVED,
        ),
        bound(
            "worst_reward",
            "|Error| <= E_mu max(0, 1 + sum_t (rho_t - 1) - prod_t rho_t): the largest over all rewards",
            ("bounds.sampled.sampled_worst_surrogate_error",),
            _error,
            lambda m: m["worst_reward"],
            lambda m: 0.9 * m["worst_reward"],
            paper=DERIVED,
        ),
        bound(
            "worst_reward_bounded",
            "the largest |Error| over all rewards <= the smallest sharp bound",
            (
                "bounds.sampled.sampled_worst_surrogate_error",
                "bounds.surrogate_error.linear_sharp",
                "bounds.surrogate_error.sequence_kl_sharp",
            ),
            lambda m: m["worst_reward"],
            lambda m: m["unified_sharp"],
            lambda m: 0.9 * m["unified_sharp"],
            paper=DERIVED,
        ),
        bound(
            "average_only_from_kl",
            "D_TV + sum_t Dbar_t <= sqrt(2 T D_KL)",
            ("bounds.surrogate_error.average_only_sharp", "bounds.surrogate_error.average_only_from_kl"),
            lambda m: m["sharp_average_only"],
            lambda m: m["average_from_kl"],
            lambda m: m["average_from_kl"] / 2,
            paper=DERIVED,
        ),
        bound(
            "pinsker_closed_form",
            "printed Pinsker-marginal KL <= (4/3) T^(3/2) delta",
            ("bounds.surrogate_error.pinsker_marginal_kl_closed_form",),
            lambda m: m["printed_pinsker_marginal_kl"],
            lambda m: m["closed_form"],
            lambda m: m["closed_form"] / 2,
        ),
        bound(
            "trivial",
            "|Error| <= max(J(mu) + L' - 0, 1 - J(mu) - L')",
            ("bounds.surrogate_error.trivial_error_bound",),
            _error,
            lambda m: m["trivial"],
            lambda m: m["trivial"] / 2,
            paper=DERIVED,
        ),
        bound(
            "surrogate_gain",
            "|L'| <= sum_t Dbar_t",
            ("bounds.surrogate_error.average_only_sharp",),
            lambda m: np.abs(m["surrogate"]),
            lambda m: m["sum_mean_tv"],
            lambda m: m["sum_mean_tv"] / 4,
            paper=DERIVED,
        ),
        bound(
            "gain",
            "|J(pi) - J(mu)| <= D_TV",
            ("bounds.surrogate_error.average_only_sharp",),
            lambda m: np.abs(m["gain"]),
            lambda m: m["sequence_tv"],
            lambda m: m["sequence_tv"] / 4,
            paper=DERIVED,
        ),
        Check(
            name="surrogate_error.adaptive_dominates",
            paper=DERIVED,
            statement="erratum F2.3: adaptive <= Pinsker-marginal, coupling, half of mixed KL, its own branches",
            functions=("bounds.surrogate_error.adaptive_sharp", "bounds.surrogate_error.mixed_kl_printed"),
            world=WORLD,
            sides=functools.partial(_dominated, wrong=False),
            wrong=functools.partial(_dominated, wrong=True),
        ),
        Check(
            name="surrogate_error.advantage",
            paper=DERIVED,
            statement="|g(c)| = |sum_a (pi - mu) Q^mu| <= TV(c) in every context, half of the printed lemma",
            functions=("bounds.surrogate_error.adaptive_sharp",),
            world=WORLD,
            sides=functools.partial(_pair, key="advantage"),
            wrong=functools.partial(_pair, key="advantage", factor=0.5),
        ),
        Check(
            name="surrogate_error.tv_from_kl",
            paper="Pinsker; Bretagnolle and Huber",
            statement="TV <= min( sqrt(KL / 2), sqrt(1 - exp(-KL)) ) in every context",
            functions=("bounds.inputs.tv_bound_from_kl",),
            world=WORLD,
            sides=functools.partial(_pair, key="tv_from_kl"),
            wrong=functools.partial(_pair, key="tv_from_kl", factor=0.5),
        ),
    ]


CHECKS = [*_bound_checks(), *_shift_checks(), *_identity_checks(), *_order_checks(), *FIXTURES]
