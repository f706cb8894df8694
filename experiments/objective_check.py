"""An objective of the user's own, examined before it trains; what was found is kept beside the run."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.named import own_words
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json
from jaxrl_llm.testing import examine_objective
from jaxrl_llm.testing import example_batch
from jaxrl_llm.testing.case import Runner

FILE = "objective_check.json"


def examine(text: str, objective: Callable[..., Any]) -> dict[str, Any]:
    """What `jaxrl_llm.testing.examine_objective` says of an objective, as it is kept.

    Args:
        text: how it was named on the command line.
        objective: the function.

    Returns:
        its name, the findings (check and sentence each), names of checks that passed, and of those that did not apply
        with the reason.

    Raises:
        UserError: training by it means nothing: it fails, cannot be compiled, returns no loss, is not finite, or has
            no gradient.
    """
    try:
        outcome = Runner(objective)(example_batch())
    except jax.errors.JAXTypeError as error:
        raise UserError(f"The objective {text!r} cannot be compiled: {own_words(error)}.") from error
    except Exception as error:
        raise UserError(f"The objective {text!r} fails on a small batch: {own_words(error)}.") from error
    if not np.isfinite(outcome.value):
        raise UserError(f"The objective {text!r} is {float(outcome.value)} on an ordinary batch; it must be finite.")
    if not np.isfinite(outcome.gradient).all():
        raise UserError(f"The gradient of objective {text!r} is not finite on an ordinary batch.")
    if not outcome.gradient.any():
        raise UserError(
            f"The gradient of objective {text!r} is 0 for every logit of an ordinary batch, so nothing would be "
            "learned; it must depend on log_prob, entropy, kl_t or kl_ref_t."
        )
    report = examine_objective(objective)
    return {
        "objective": text,
        "findings": [finding._asdict() for finding in report.findings],
        "passed": list(report.passed),
        "skipped": [list(pair) for pair in report.skipped],
        "token_weights": report.token_weights,
    }


def sentences(check: dict[str, Any]) -> list[str]:
    """What was found, a line each."""
    found, passed = check["findings"], len(check["passed"])
    failed = len({finding["check"] for finding in found})
    first = f"objective {check['objective']}: {passed} checks passed, {failed} did not."
    return [first, *(f"  {finding['check']}: {finding['sentence']}" for finding in found)]


def objective_section(run: RunFolder) -> list[str]:
    """`sentences` of the check that is kept beside a run; none where the objective is not the user's own."""
    path = run.path / FILE
    return sentences(read_json(path)) if path.exists() else []
