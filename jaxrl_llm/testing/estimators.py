"""`check_estimator`: whether a per-token statistic estimates the divergence or entropy it is named after.

Every token of one context is enumerated and weighted by its probability, so expectations are exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm import categorical
from jaxrl_llm.checks import require_choice
from jaxrl_llm.testing.batch import Batch
from jaxrl_llm.testing.batch import make_batch
from jaxrl_llm.testing.batch import policy_statistics
from jaxrl_llm.testing.case import number
from jaxrl_llm.testing.promise_checks import describe_kl_gradient
from jaxrl_llm.testing.report import Finding
from jaxrl_llm.testing.report import Report

Estimator = Callable[[Batch], Float[Array, "B T"]]

TARGETS = {"kl_ref": "KL(pi || ref)", "kl_behaviour": "KL(mu || pi)", "entropy": "the entropy of pi"}
"""What can be estimated, and its name in sentences."""

PROMISES = ("value", "gradient", "off_policy")

_POLICIES = [np.log(p) for p in ([0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.25, 0.35], [0.15, 0.35, 0.3, 0.2])]
"""pi, another policy that samples, and the reference."""


def _context(*, behaviour: int) -> Batch:
    """One context, every token once: row a holds token a."""
    vocabulary = len(_POLICIES[0])
    pi, mu, ref = (
        np.broadcast_to(_POLICIES[i], (vocabulary, vocabulary))[:, None, :].copy() for i in (0, behaviour, 2)
    )
    rows = np.zeros(vocabulary)
    return make_batch(
        np.arange(vocabulary)[:, None],
        np.ones((vocabulary, 1), bool),
        (pi, mu, mu, ref),
        group_ids=rows,
        rewards=rows,
        advantages=rows,
    )


def _expected(estimator: Estimator, batch: Batch) -> tuple[float, np.ndarray]:
    """Expectation of the estimate under mu, and of its gradient with tokens fixed."""
    probability = jnp.exp(batch.log_prob_behaviour)

    def mean(logits):
        rows = jnp.broadcast_to(logits, batch.logits.shape)
        estimates = estimator(batch._replace(logits=rows, **policy_statistics(rows, batch)))
        if getattr(estimates, "shape", None) != batch.tokens.shape:
            raise TypeError(
                f"the estimator returned {getattr(estimates, 'shape', type(estimates).__name__)}; it must return one "
                f"number per token, {batch.tokens.shape}."
            )
        return jnp.sum(probability * estimates)

    value, gradient = jax.value_and_grad(mean)(batch.logits[0, 0])
    return float(value), np.asarray(gradient)


def _exact(of: str, batch: Batch):
    logits, behaviour, ref = batch.logits[0, 0], batch.logits_behaviour[0, 0], batch.logits_ref[0, 0]
    if of == "kl_ref":
        return jax.value_and_grad(categorical.kl)(logits, ref)
    if of == "kl_behaviour":
        return jax.value_and_grad(lambda z: categorical.kl(behaviour, z))(logits)
    return jax.value_and_grad(categorical.entropy)(logits)


def _value_finding(of: str, batch: Batch, seen: float, sampler: str) -> str:
    exact = float(_exact(of, batch)[0])
    if abs(seen - exact) <= 1e-4 * abs(exact):
        return ""
    return f"With tokens of {sampler} its expectation is {number(seen)}; {TARGETS[of]} is {number(exact)}."


def _gradient_finding(of: str, batch: Batch, seen: np.ndarray) -> str:
    if of == "kl_ref":
        wrong = describe_kl_gradient(seen, batch.logits[0, 0], batch.logits_ref[0, 0], 1.0)
    else:
        wanted = np.asarray(_exact(of, batch)[1])
        size = float(np.linalg.norm(wanted))
        error = float(np.linalg.norm(seen - wanted)) / size
        zero = np.linalg.norm(seen) <= 1e-4 * size
        wrong = "" if error <= 1e-4 else ("it is zero" if zero else f"relative error {number(error)}")
    return f"As a loss its expected gradient is not that of {TARGETS[of]}: {wrong}." if wrong else ""


def examine_estimator(estimator: Estimator, *, of: str, promises: tuple[str, ...] = ("value", "gradient")) -> Report:
    """Compare the expectation of a per-token estimate, and of its gradient, with the exact ones.

        examine_estimator(lambda batch: k3(batch.log_prob - batch.log_prob_ref), of="kl_ref", promises=("value",))

    Args:
        estimator: from a `Batch` to one number per token, `[B, T]`, of the token itself.
        of: "kl_ref" for KL(pi || ref), "kl_behaviour" for KL(mu || pi), "entropy" for that of pi.
        promises: "value": unbiased for tokens of pi (of mu for "kl_behaviour"). "gradient": differentiated with those
            tokens fixed, the expected gradient is that of the exact quantity. "off_policy": unbiased for tokens of
            mu != pi too.

    Returns:
        `Report`.

    Raises:
        ValueError: for an unknown name.
        TypeError: if the estimator does not return one number per token.
    """
    require_choice("of", of, TARGETS)
    for promise in promises:
        require_choice("promises", promise, PROMISES)
    behaviour = _context(behaviour=1)
    own = behaviour if of == "kl_behaviour" else _context(behaviour=0)
    value, gradient = _expected(estimator, own)
    sentences = {
        "value": _value_finding(of, own, value, "mu" if of == "kl_behaviour" else "pi"),
        "gradient": _gradient_finding(of, own, gradient),
        "off_policy": _value_finding(of, behaviour, _expected(estimator, behaviour)[0], "mu, another policy,"),
    }
    findings = tuple(Finding(name, sentences[name]) for name in promises if sentences[name])
    passed = tuple(name for name in promises if not sentences[name])
    return Report(findings, passed, tuple((name, "not promised") for name in PROMISES if name not in promises))


def check_estimator(estimator: Estimator, *, of: str, promises: tuple[str, ...] = ("value", "gradient")) -> Report:
    """`examine_estimator`, raising if a promise does not hold.

    Args and Returns as `examine_estimator`.

    Raises:
        AssertionError: with one sentence per promise that is broken.
        TypeError, ValueError: as `examine_estimator`.
    """
    return examine_estimator(estimator, of=of, promises=promises).raise_if_failed()
