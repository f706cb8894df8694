"""What an update minimises: a recipe, a callable of yours, likelihood, preferences, or a distance to a teacher.

An objective reads fields of `jaxrl_llm.testing.Batch`, one row per sequence, and says which. What it does not read is
None: an exact divergence costs a product of the vocabulary's size. `logits` are always None, as training never makes
them.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxrl_llm.checks import require_choice
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.objectives import LossTerms
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import loss_needs
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives.distillation import forward_kl
from jaxrl_llm.objectives.distillation import reverse_kl
from jaxrl_llm.objectives.divergences import k3
from jaxrl_llm.objectives.likelihood import negative_log_likelihood
from jaxrl_llm.objectives.preferences import dpo
from jaxrl_llm.objectives.preferences import ipo
from jaxrl_llm.objectives.preferences import preference_metrics
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.testing import Batch
from jaxrl_llm.testing import example_batch
from jaxrl_llm.testing.case import as_pair
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import SumCount

NEVER_MADE = ("logits", "logits_old", "logits_behaviour", "logits_ref")
"""Fields of a batch that training does not have: whole distributions of every context."""

OF_REFERENCE = ("log_prob_ref", "kl_ref_t", "kl_from_ref_t")
"""Fields for which a reference policy, or a teacher, must score the batch."""


class Extras(NamedTuple):
    """What a loss may read beside the batch.

    fraction: the share of the minibatch that these rows are. target_kept: whether each token is in the safe set of a
    policy that is pruned; None where it is not.
    """

    fraction: Any
    target_kept: Bool[Array, "B R"] | None


class Objective(NamedTuple):
    """A loss, and what it needs.

    Attributes:
        name: for messages.
        needs: names of the fields of a batch that it reads.
        loss: (batch, extras) -> the loss as (sum, count), with metrics as such pairs.
        log_min_p: threshold of the safe set that the policy is renormalised on; None for the whole vocabulary.
        compares_rows: whether it compares the rows of a group, so that a group must stay together.
        per_sequence: whether it reads one advantage per sequence, `[B]`, instead of one per token, `[B, R]`.
        about: one line for a list.
    """

    name: str
    needs: frozenset[str]
    loss: Callable[[Batch, Extras], LossTerms]
    log_min_p: float | None = None
    compares_rows: bool = False
    per_sequence: bool = False
    about: str = ""

    @property
    def reads_reference(self) -> bool:
        """Whether a reference policy must score the batch."""
        return not self.needs.isdisjoint(OF_REFERENCE)


def recipe_objective(recipe: Recipe) -> Objective:
    """The loss of a recipe."""
    # target_kept comes with `log_min_p`; the old log-probs are there for the metrics of every recipe.
    needs = {"advantages", "log_prob_old", *loss_needs(recipe)} - {"target_kept"}

    def loss(batch: Batch, extras: Extras) -> LossTerms:
        return policy_loss(
            recipe,
            log_prob=batch.log_prob,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            log_prob_old=batch.log_prob_old,
            log_prob_behaviour=batch.log_prob_behaviour,
            log_prob_ref=batch.log_prob_ref,
            kl_t=None if batch.kl_t is None else jax.lax.stop_gradient(batch.kl_t),
            kl_ref_t=batch.kl_ref_t,
            entropy=batch.entropy,
            target_kept=extras.target_kept,
            batch_fraction=extras.fraction,
        )

    return Objective(recipe.name, frozenset(needs), loss, log_min_p=recipe.log_min_p)


def general_metrics(batch: Batch) -> dict[str, SumCount]:
    """What is worth watching under any loss, per chosen token, as (sum, count): `entropy`, `log_prob`, and where they
    are there `kl_old_k3` and `kl_ref`.
    """
    values = {"entropy": batch.entropy, "log_prob": batch.log_prob, "kl_ref": batch.kl_ref_t}
    if batch.log_prob_old is not None:
        values["kl_old_k3"] = k3(-token_log_ratio(batch.log_prob, batch.log_prob_old, batch.response_mask))
    pairs = {name: masked_sum_count(x, batch.response_mask) for name, x in values.items() if x is not None}
    return jax.tree.map(jax.lax.stop_gradient, pairs)


def callable_objective(function: Callable[[Batch], Any], name: str | None = None) -> Objective:
    """A loss of yours, `function(batch)` -> (sum, count) or a scalar; which fields it reads is seen from its trace.

    A scalar is taken as the mean over the sequences of the micro-batch, so that those of other sizes add up.

    Raises:
        TypeError: it returns something else.
        ValueError: it cannot be traced, or reads a field that training never makes.
    """
    name = str(name or getattr(function, "__name__", type(function).__name__))
    needs = fields_read(function, name)
    for field in NEVER_MADE:
        if field in needs:
            raise ValueError(
                f"The objective {name!r} reads batch.{field}, which training never makes ([tokens, vocabulary]); it "
                "can read log_prob, entropy, kl_t, kl_ref_t and kl_from_ref_t, which are exact over the vocabulary."
            )

    def loss(batch: Batch, extras: Extras) -> LossTerms:
        try:
            result = function(batch)
            total, count = as_pair(result)
        except Exception as error:
            shape = batch.response_mask.shape
            raise ValueError(f"The objective {name!r} fails on a batch of {shape}: {_first_line(error)}") from error
        if not isinstance(result, tuple):
            count = batch.response_mask.any(axis=1).sum().astype(total.dtype)
            total = total * count
        return LossTerms((total, count), general_metrics(batch))

    per_sequence = "advantages" in needs and not _takes_tokens(function)
    return Objective(name, needs, loss, compares_rows="group_ids" in needs, per_sequence=per_sequence)


def _takes_tokens(function: Callable[[Batch], Any]) -> bool:
    """Whether one advantage per token means the same to a loss as one per sequence. `advantages[:, None]`, say, makes
    something else of it, often without an error.
    """
    batch = example_batch()
    spread = jnp.broadcast_to(batch.advantages[:, None], batch.response_mask.shape)
    try:
        of_sequences = as_pair(function(batch))
    except (TypeError, ValueError):
        return True
    try:
        of_tokens = as_pair(function(batch._replace(advantages=spread)))
    except (TypeError, ValueError):
        return False
    return bool(jnp.allclose(jnp.stack(of_tokens), jnp.stack(of_sequences), rtol=1e-4))


def fields_read(function: Callable[[Batch], Any], name: str) -> frozenset[str]:
    """The fields of a batch that a function's result depends on, from its trace.

    Raises:
        TypeError: it returns neither a floating scalar nor a pair of them.
        ValueError: it cannot be traced, with one advantage per sequence or per token.
    """
    try:
        return _fields_read(function, name, example_batch())
    except ValueError as error:
        try:
            return _fields_read(function, name, example_batch(advantages="token"))
        except ValueError:
            raise error from None


def _fields_read(function: Callable[[Batch], Any], name: str, batch: Batch) -> frozenset[str]:
    try:
        closed = jax.make_jaxpr(lambda batch: as_pair(function(batch)))(batch)
    except TypeError as error:
        raise TypeError(f"The objective {name!r}: {_first_line(error)}") from error
    except Exception as error:
        raise ValueError(f"The objective {name!r} cannot be compiled; it says: {_first_line(error)}") from error
    present = [field for field in batch._fields if getattr(batch, field) is not None]
    reads = _inputs_read(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return frozenset(field for field, read in zip(present, reads, strict=True) if read)


def _inputs_read(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Which inputs of a trace its wanted outputs depend on; into functions that are jitted, which are given a whole
    batch even where they read one field of it.
    """
    needed = {var for var, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(var, Literal)}
    # Backwards, so that what is computed and thrown away needs nothing.
    for equation in reversed(jaxpr.eqns):
        used = [var in needed for var in equation.outvars]
        if not equation.effects and not any(used):
            continue
        jitted = equation.primitive.name in ("jit", "pjit") and not equation.effects
        reads = _inputs_read(equation.params["jaxpr"].jaxpr, used) if jitted else [True] * len(equation.invars)
        pairs = zip(equation.invars, reads, strict=True)
        needed.update(var for var, read in pairs if read and not isinstance(var, Literal))
    return [var in needed for var in jaxpr.invars]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _nll(batch: Batch, extras: Extras) -> LossTerms:
    return LossTerms(negative_log_likelihood(batch.log_prob, batch.response_mask), general_metrics(batch))


def _preference(loss: Callable[..., SumCount]) -> Callable[[Batch, Extras], LossTerms]:
    def compared(batch: Batch, extras: Extras) -> LossTerms:
        arrays = (batch.log_prob, batch.log_prob_ref, batch.response_mask, batch.group_ids, batch.rewards)
        return LossTerms(loss(*arrays), general_metrics(batch) | preference_metrics(*arrays))

    return compared


def _forward(batch: Batch, extras: Extras) -> LossTerms:
    return LossTerms(forward_kl(batch.kl_from_ref_t, batch.response_mask), general_metrics(batch))


def _reverse(batch: Batch, extras: Extras) -> LossTerms:
    return LossTerms(reverse_kl(batch.kl_ref_t, batch.response_mask), general_metrics(batch))


_PAIRS = frozenset({"log_prob_ref", "group_ids", "rewards"})

_KINDS = (
    Objective("nll", frozenset({"log_prob"}), _nll, about="negative log-likelihood of what the collector brought"),
    Objective("dpo", _PAIRS, _preference(dpo), compares_rows=True, about="direct preference optimisation of pairs"),
    Objective("ipo", _PAIRS, _preference(ipo), compares_rows=True, about="identity preference optimisation of pairs"),
    Objective(
        "distil_forward",
        frozenset({"kl_from_ref_t", "log_prob_ref"}),
        _forward,
        about="exact KL(teacher || policy) at the contexts that the collector brought",
    ),
    Objective(
        "distil_reverse",
        frozenset({"kl_ref_t", "log_prob_ref"}),
        _reverse,
        about="exact KL(policy || teacher) at the contexts that the collector brought",
    ),
)

OBJECTIVES = {objective.name: objective for objective in _KINDS}
"""Objectives that are no policy gradient, by name."""


def get_objective(given: "str | Callable[[Batch], Any] | Objective | None", recipe: Recipe) -> Objective:
    """What is minimised: the recipe's loss for None, one of `OBJECTIVES` by name, or a callable.

    Raises:
        ValueError, TypeError: there is none of that name, or the callable cannot be used.
    """
    if given is None:
        return recipe_objective(recipe)
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        require_choice("objective", given, OBJECTIVES)
        return OBJECTIVES[given]
    return callable_objective(given)
