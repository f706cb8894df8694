"""All checks by name."""

from theory_checks import advantages
from theory_checks import aggregation
from theory_checks import corrections
from theory_checks import divergence
from theory_checks import empg
from theory_checks import exploration
from theory_checks import hybrid
from theory_checks import inverse
from theory_checks import kl_estimators
from theory_checks import logit_dynamics
from theory_checks import masked_guarantee
from theory_checks import masks
from theory_checks import mismatch
from theory_checks import posterior_sampling
from theory_checks import pruning
from theory_checks import regret
from theory_checks import surrogate_error
from theory_checks import surrogates
from theory_checks import token_baseline
from theory_checks import token_chains
from theory_checks.check import Check

FAMILIES: dict[str, list[Check]] = {
    "surrogate_error": surrogate_error.CHECKS,
    "token_chains": token_chains.CHECKS,
    "inverse": inverse.CHECKS,
    "masked_guarantee": masked_guarantee.CHECKS,
    "mismatch": mismatch.CHECKS,
    "pruning": pruning.CHECKS,
    "logit_dynamics": logit_dynamics.CHECKS,
    "advantages": advantages.CHECKS,
    "token_baseline": token_baseline.CHECKS,
    "corrections": corrections.CHECKS,
    "surrogates": surrogates.CHECKS,
    "masks": masks.CHECKS,
    "kl_estimators": kl_estimators.CHECKS,
    "aggregation": aggregation.CHECKS,
    "hybrid": hybrid.CHECKS,
    "empg": empg.CHECKS,
    "divergence": divergence.CHECKS,
    "regret": regret.CHECKS,
    "posterior_sampling": posterior_sampling.CHECKS,
    "exploration": exploration.CHECKS,
}
"""Family -> its checks, in the order of the table."""


def all_checks() -> list[Check]:
    """Every check of every family."""
    return [check for checks in FAMILIES.values() for check in checks]


def select(name: str) -> list[Check]:
    """The check of that name, or all checks of the family of that name.

    Raises:
        ValueError: if there is none.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    found = [check for check in all_checks() if check.name == name]
    if not found:
        raise ValueError(f"name is {name!r}; it must be a family ({', '.join(FAMILIES)}) or a name that `list` shows.")
    return found
