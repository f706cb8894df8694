"""`check_objective`: hold a loss to the invariances that every loss of a policy has, and say in words which fail."""

from collections.abc import Callable
from typing import Any

import jax

from jaxrl_llm.checks import require_choice
from jaxrl_llm.testing import gradient_checks
from jaxrl_llm.testing import layout_checks
from jaxrl_llm.testing import promise_checks
from jaxrl_llm.testing.batch import Batch
from jaxrl_llm.testing.batch import example_batch
from jaxrl_llm.testing.case import Case
from jaxrl_llm.testing.case import NotApplicable
from jaxrl_llm.testing.promises import Promises
from jaxrl_llm.testing.report import Finding
from jaxrl_llm.testing.report import Report

_ALL = (
    layout_checks.finite,
    layout_checks.mask_values,
    layout_checks.padding_columns,
    layout_checks.columns,
    layout_checks.padding_rows,
    layout_checks.empty_mask,
    layout_checks.permutation,
    layout_checks.micro_batches,
    layout_checks.vmap,
    gradient_checks.on_policy_gradient,
    gradient_checks.no_advantage,
    gradient_checks.sign,
    gradient_checks.advantage_scaling,
    gradient_checks.stop_gradient,
    gradient_checks.constant_count,
    gradient_checks.logit_shift,
    gradient_checks.precision,
    promise_checks.kl_penalty,
    promise_checks.ratio_interval,
    promise_checks.trust_region,
    promise_checks.length_one,
)

CHECKS = {check.__name__: check for check in _ALL}
"""Every check by name, in the order of the report; the docstring of each says what must hold."""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "without a message")


def examine_objective(loss_fn: Callable[[Batch], Any], *, seed: int = 0, **promises: Any) -> Report:
    """Run every check on a loss and report; raises nothing about the loss.

        def my_loss(batch):
            ratio = jnp.exp(batch.log_prob - jax.lax.stop_gradient(batch.log_prob_old))
            losses = jnp.where(batch.response_mask, -ratio * batch.advantages[:, None], 0.0)
            return losses.sum(), batch.response_mask.sum()

        print(examine_objective(my_loss, aggregation="token-mean"))

    Args:
        loss_fn: from a `Batch` to a scalar, or to (sum, count), whose quotient is the loss. It may be compiled already.
        seed: of the example batch.
        promises: fields of `Promises`, which say what to hold the loss to.

    Returns:
        `Report`, whose findings are sentences.

    Raises:
        TypeError: for a promise that does not exist, or a loss that returns neither a scalar nor a pair.
        ValueError: for a promise with an unknown value.
    """
    stated = Promises(**promises)
    for name in stated.skip:
        require_choice("skip", name, CHECKS)
    try:
        case = Case(loss_fn, stated, example_batch(seed, advantages=stated.advantages))
    except jax.errors.JAXTypeError as error:
        sentence = f"The loss cannot be compiled, and nothing else was looked at; jit says: {_first_line(error)}"
        return Report((Finding("compiles", sentence),))
    findings, passed, skipped = [], [], []
    for name, check in CHECKS.items():
        if name in stated.skip:
            skipped.append((name, "as asked"))
            continue
        try:
            sentences = list(check(case))
        except NotApplicable as reason:
            skipped.append((name, str(reason)))
            continue
        except Exception as error:  # the loss works on an ordinary batch and not on this one: that is a finding
            sentences = [f"The loss raises {type(error).__name__}: {_first_line(error)}"]
        findings += [Finding(name, sentence) for sentence in sentences]
        if not sentences:
            passed.append(name)
    return Report(tuple(findings), tuple(passed), tuple(skipped), case.found.get("token_weights"))


def check_objective(loss_fn: Callable[[Batch], Any], *, seed: int = 0, **promises: Any) -> Report:
    """`examine_objective`, raising if a check fails: one line in a test.

    Args and Returns as `examine_objective`.

    Raises:
        AssertionError: with one sentence per thing that is wrong.
        TypeError, ValueError: as `examine_objective`.
    """
    return examine_objective(loss_fn, seed=seed, **promises).raise_if_failed()
