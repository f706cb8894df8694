"""The loss under test made uniform: one compiled program that gives its value and every gradient."""

import warnings
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.masked import safe_divide
from jaxrl_llm.testing.batch import CONSTANT_FIELDS
from jaxrl_llm.testing.batch import POLICY_FIELDS
from jaxrl_llm.testing.batch import Batch
from jaxrl_llm.testing.batch import policy_statistics
from jaxrl_llm.testing.batch import with_policies
from jaxrl_llm.testing.promises import Promises

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each program runs a few times on a few numbers: what takes time is compiling it."""


class NotApplicable(Exception):
    """Raised by a check that has nothing to say about this loss; its message says why."""


class Outcome(NamedTuple):
    """What one evaluation gives, as NumPy arrays.

    Attributes:
        total: the sum, or the scalar that the loss returned.
        count: the count, 1 for a scalar loss.
        value: total / count.
        gradient: of the value with respect to the logits of pi, through every statistic, `[B, T, V]`.
        fields: gradients of the value with respect to single fields of the batch.
        count_gradient: gradient of the count with respect to `log_prob`.
    """

    total: Any
    count: Any
    value: Any
    gradient: Any
    fields: dict[str, Any]
    count_gradient: Any


def as_pair(result: Any) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of what a loss returned, (loss, 1) of a scalar.

    Raises:
        TypeError: if it is neither a floating scalar nor a pair of them.
    """
    parts: Any = result if isinstance(result, tuple) and len(result) == 2 else (result, 1)
    for part in parts:
        shape = jnp.shape(part) if isinstance(part, (jax.Array, np.ndarray, np.generic, int, float)) else None
        if shape != ():
            seen = type(part).__name__ if shape is None else f"{jnp.result_type(part)}{list(shape)}"
            raise TypeError(f"the loss returned {seen}; it must return a floating scalar, or (sum, count) of scalars.")
    total = jnp.asarray(parts[0])
    if not jnp.issubdtype(total.dtype, jnp.floating):
        raise TypeError(f"the loss returned a sum of type {total.dtype}; it must be floating.")
    return total, jnp.asarray(parts[1]).astype(total.dtype)


class Runner:
    """Evaluates a loss on batches."""

    def __init__(self, loss_fn: Callable[[Batch], Any]):
        self.loss_fn = loss_fn
        self.compiled = jax.jit(self._outcome, compiler_options=QUICK)

    def _outcome(self, batch: Batch) -> Outcome:
        names = (*POLICY_FIELDS, "logits", *CONSTANT_FIELDS)

        def pair(fields):
            return as_pair(self.loss_fn(batch._replace(**fields)))

        (total, count), pull_back = jax.vjp(pair, {name: getattr(batch, name) for name in names})
        value, slopes = jax.value_and_grad(lambda x: safe_divide(*x))((total, count))
        fields = pull_back(slopes)[0]
        count_gradient = pull_back((jnp.zeros_like(total), jnp.ones_like(count)))[0]["log_prob"]
        through_statistics = jax.vjp(lambda z: policy_statistics(z, batch), batch.logits)[1]
        gradient = fields["logits"] + through_statistics({name: fields[name] for name in POLICY_FIELDS})[0]
        return Outcome(total, count, value, gradient, fields, count_gradient)

    def __call__(self, batch: Batch) -> Outcome:
        """The outcome on one batch."""
        return jax.tree.map(np.asarray, self.compiled(batch))

    def in_float64(self, batch: Batch, *, step: float = 0.0, steps: int = 0) -> tuple[Outcome, np.ndarray]:
        """The outcome on the same numbers in float64, and the losses along `steps` steps against the gradient's sign.

        Args:
            batch: in any floating dtype.
            step: change of every logit of pi per step.
            steps: how many.
        """
        with jax.enable_x64(True), warnings.catch_warnings():
            # A loss may ask for float32 by name; that is what this evaluation is there to show.
            warnings.simplefilter("ignore")
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), _widest(x.dtype)), batch)
            outcome = jax.tree.map(np.asarray, self.compiled(wide))
            direction, losses = -step * np.sign(outcome.gradient), []
            for n in range(steps):
                others = (wide.logits_old, wide.logits_behaviour, wide.logits_ref)
                losses.append(self.compiled(with_policies(wide, wide.logits + n * direction, *others)).value)
            return outcome, np.array(losses, np.float64)


def _widest(dtype: Any) -> Any:
    return jnp.float64 if jnp.issubdtype(dtype, jnp.floating) else dtype


class Case:
    """One loss under examination.

    Attributes:
        run: evaluates the loss.
        promises: what the loss says about itself.
        batch: the batch of most checks.
        base: the outcome on it.
        found: filled by checks with what the report shows.
    """

    def __init__(self, loss_fn: Callable[[Batch], Any], promises: Promises, batch: Batch):
        self.run = Runner(loss_fn)
        self.promises = promises
        self.batch = batch
        self.base = self.run(batch)
        self.found: dict[str, str] = {}
        self.scale = float(np.max(np.abs(self.base.gradient), initial=0.0))
        self.tolerance = 1e-4 if self.base.value.dtype == np.float32 else 1e-8

    def differ(self, x: Any, y: Any, *, factor: float = 1.0) -> bool:
        """Whether two results are further apart than rounding explains, on the scale of the loss and its gradient."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return True
        size = max(np.max(np.abs(x), initial=0.0), np.max(np.abs(y), initial=0.0), self.scale, 1e-30)
        return bool(np.max(np.abs(x - y), initial=0.0) > factor * self.tolerance * size)

    def without_advantages(self, batch: Batch) -> Batch:
        """The batch with nothing to learn from: advantages 0, or rewards equal (to a number that means round)."""
        if self.promises.given:
            return batch._replace(advantages=jnp.zeros_like(batch.advantages))
        return batch._replace(rewards=jnp.full_like(batch.rewards, 0.3))

    def policy_gradient(self, batch: Batch) -> np.ndarray:
        """The gradient that the advantages cause: without KL and entropy terms, which zero advantages leave alone."""
        return self.run(batch).gradient - self.run(self.without_advantages(batch)).gradient

    def signs(self, batch: Batch) -> np.ndarray:
        """What the advantage of each token is, or is proportional to, `[B, T]`."""
        shape = batch.response_mask.shape
        if self.promises.given:
            advantages = np.asarray(batch.advantages, np.float64)
            return np.broadcast_to(advantages.reshape(*advantages.shape, *[1] * (2 - advantages.ndim)), shape)
        rewards, ids = np.asarray(batch.rewards, np.float64), np.asarray(batch.group_ids)
        if self.promises.advantages == "batch":
            ids = np.zeros_like(ids)
        means = np.array([rewards[ids == own].mean() for own in ids])
        return np.broadcast_to((rewards - means)[:, None], shape)


def number(x: Any) -> str:
    """A number as sentences show it."""
    return f"{float(x):.4g}"
