"""Checks of what a loss promises beyond the invariances: its KL penalty, its ratio interval, its trust region.

They use batches of two responses of one token over a vocabulary of 3, where every expectation is a sum of 3 terms.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.testing.batch import Batch
from jaxrl_llm.testing.batch import make_batch
from jaxrl_llm.testing.case import Case
from jaxrl_llm.testing.case import NotApplicable
from jaxrl_llm.testing.case import Runner
from jaxrl_llm.testing.case import number

PI = np.log([0.5, 0.3, 0.2])
REF = np.log([0.2, 0.3, 0.5])
"""One context of the trained and one of the reference policy; KL(pi || ref) = 0.27 nats."""


def _pair(tokens: tuple[int, int], pi, old, behaviour, ref, *, token_advantages: bool) -> Batch:
    """Two responses of one token, one better than the other; each policy is logits `[V]` or `[2, V]`."""
    policies = [np.broadcast_to(np.asarray(z), (2, 3))[:, None, :] for z in (pi, old, behaviour, ref)]
    advantages = np.array([1.0, -1.0])
    return make_batch(
        np.array(tokens)[:, None],
        np.ones((2, 1), bool),
        (policies[0], policies[1], policies[2], policies[3]),
        group_ids=np.zeros(2, int),
        rewards=np.array([1.0, 0.0]),
        advantages=advantages[:, None] if token_advantages else advantages,
    )


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.dot(x, y) / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30))


def describe_kl_gradient(seen: np.ndarray, logits: jax.Array, logits_ref: jax.Array, coefficient: float) -> str:
    """The end of a sentence on a gradient that is not coefficient * grad KL(pi || ref); empty if it is."""
    wanted = coefficient * np.asarray(jax.grad(categorical.kl)(logits, logits_ref))
    size = float(np.linalg.norm(wanted))
    if np.linalg.norm(seen - wanted) <= 1e-4 * size:
        return ""
    if np.linalg.norm(seen) <= 1e-4 * size:
        return "it is zero, as that of k1 is"
    other = np.asarray(jax.grad(lambda z: categorical.kl(logits_ref, z))(logits))
    if _cosine(seen, other) > 0.99999:
        return f"it is that of KL(ref || pi), as that of k3 is (cosine {number(_cosine(seen, wanted))})"
    return f"relative error {number(np.linalg.norm(seen - wanted) / size)}, cosine {number(_cosine(seen, wanted))}"


def kl_penalty(case: Case) -> Iterator[str]:
    """On-policy, the expected gradient of the penalty is kl_coefficient grad KL(pi || ref)."""
    coefficient = case.promises.kl_coefficient
    if coefficient is None:
        raise NotApplicable("no kl_coefficient is promised")
    expected = np.zeros(3)
    batch = None
    for token, probability in enumerate(np.exp(PI)):
        batch = _pair((token, token), PI, PI, PI, REF, token_advantages=case.promises.advantages == "token")
        # Two responses that share their token: the expectation over one of them, since the loss is a mean.
        expected += probability * case.run(case.without_advantages(batch)).gradient.sum(axis=(0, 1))
    assert batch is not None
    wrong = describe_kl_gradient(expected, batch.logits[0, 0], batch.logits_ref[0, 0], coefficient)
    if wrong:
        yield f"On-policy the expected gradient of the KL penalty is not {coefficient} grad KL(pi || ref): {wrong}."


def _contributes(case: Case, ratio: float) -> bool:
    """Whether two tokens with pi_old / mu = ratio have a gradient."""
    probability = min(0.3, 0.9 * ratio)
    rest = 1 - probability
    old = np.log([probability, 0.6 * rest, 0.4 * rest])
    rest = 1 - probability / ratio
    behaviour = np.log([probability / ratio, 0.6 * rest, 0.4 * rest])
    batch = _pair((0, 0), old, old, behaviour, old, token_advantages=case.promises.advantages == "token")
    return bool(np.max(np.abs(case.policy_gradient(batch))) > 1e-6)


def ratio_interval(case: Case) -> Iterator[str]:
    """Tokens contribute where pi_old / mu lies in the promised interval, and only there."""
    if case.promises.keeps_ratio is None:
        raise NotApplicable("no keeps_ratio is promised")
    low, high = case.promises.keeps_ratio
    step = (high / low) ** 0.1 if low > 0 and high < math.inf else 1.1
    inside = [x for x, real in ((low * step, low > 0), (high / step, high < math.inf)) if real]
    outside = [x for x, real in ((low / step, low > 0), (high * step, high < math.inf)) if real]
    dropped = [x for x in inside if not _contributes(case, x)]
    kept = [x for x in outside if _contributes(case, x)]
    if not dropped and not kept:
        return
    inverse = all(not low <= 1 / x <= high for x in dropped) and all(low <= 1 / x <= high for x in kept)
    parts = [f"a token with pi_old / mu = {number(x)} is dropped" for x in dropped]
    parts += [f"one with {number(x)} is kept" for x in kept]
    hint = ": the interval acts on the inverse ratio, the sign of a log-ratio is flipped" if inverse else ""
    yield f"The promised interval is {number(low)} to {number(high)}, but {' and '.join(parts)}{hint}."


def _swap(kl: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits of mu and pi that agree on token 0 and exchange mass between the others, KL(mu || pi) = kl."""
    low, high = 0.0, 0.4 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * middle * math.log((0.4 + middle) / (0.4 - middle)) < kl else (low, middle)
    return np.log([0.2, 0.4 + low, 0.4 - low]), np.log([0.2, 0.4 - low, 0.4 + low])


def trust_region(case: Case) -> Iterator[str]:
    """A sequence whose exact KL is above the threshold contributes nothing and stays in, or leaves, the denominator."""
    threshold = case.promises.rejects_above_kl
    if threshold is None:
        raise NotApplicable("no rejects_above_kl is promised")

    def gradient(kl_second):
        mu, pi = zip(_swap(threshold / 2), _swap(kl_second), strict=True)
        tokenwise = case.promises.advantages == "token"
        return case.policy_gradient(_pair((0, 0), pi, mu, mu, pi, token_advantages=tokenwise))[:, 0]

    calm, moved = gradient(threshold / 2), gradient(2 * threshold)
    if min(np.max(np.abs(calm[0])), np.max(np.abs(calm[1])), np.max(np.abs(moved[0]))) < 1e-8:
        yield f"A sequence with KL(mu || pi) = {number(threshold / 2)}, below {number(threshold)}, does not contribute."
        return
    if np.max(np.abs(moved[1])) > 1e-8:
        yield (
            f"A sequence with exact KL(mu || pi) = {number(2 * threshold)}, above {number(threshold)}, contributes. "
            "Its sampled token kept its probability while two others exchanged theirs: a test that sees the sampled "
            "token alone misses this."
        )
        return
    factor = float(np.max(np.abs(moved[0])) / np.max(np.abs(calm[0])))
    wanted = {"all": 1.0, "accepted": 2.0}[case.promises.normalise_by]
    if abs(factor - wanted) > 1e-3:
        yield (
            f"When one of two sequences is rejected, the gradient of the other is multiplied by {number(factor)} "
            f"instead of {number(wanted)}: the denominator is not that of normalise_by={case.promises.normalise_by!r}."
        )


def length_one(case: Case) -> Iterator[str]:
    """On responses of one token the loss equals another one."""
    if case.promises.length_one_equals is None:
        raise NotApplicable("no length_one_equals is promised")
    first = np.argmax(np.asarray(case.batch.response_mask), axis=1)
    rows = np.arange(len(first))

    def one_token(x):
        return x[rows, first][:, None] if x.ndim >= 2 else x

    batch = jax.tree.map(one_token, case.batch)
    own, other = case.run(batch), Runner(case.promises.length_one_equals)(batch)
    if case.differ(own.value, other.value) or case.differ(own.gradient, other.gradient):
        yield (
            f"On responses of one token the loss is {number(own.value)} and the other one {number(other.value)}, or "
            "their gradients differ: a sequence ratio of one token must be that token's ratio."
        )
