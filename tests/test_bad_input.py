"""Every public function of objectives and bounds, on what people pass by mistake: a sentence that names the argument.

What is not an error has a defined result: nothing is NaN on an empty batch, an empty mask, groups of one
member or a vocabulary of one.
"""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrl_llm.checks import require_batch_values
from jaxrl_llm.objectives import advantages
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives import token_baseline
from tests.public_calls import FUNCTIONS
from tests.public_calls import SIZES
from tests.public_calls import call
from tests.public_calls import good_call

PER_TOKEN_OR_SEQUENCE = {"policy_loss": ("advantages",)}
"""Arguments that may have either of two ranks."""


@pytest.fixture(autouse=True)
def without_type_hook():
    """Users run without the run-time type checks of the tests; what they see then is ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def mistakes(kind):
    """(function, argument) for every array argument whose rank or dtype can be wrong."""
    cases = []
    for name in FUNCTIONS:
        _, arrays = good_call(name)
        for key, annotation in arrays.items():
            either = key in PER_TOKEN_OR_SEQUENCE.get(name.rpartition(".")[2], ())
            # An elementwise function of one array takes any shape.
            alone = annotation.dim_str.startswith("*") and sum(a.dim_str.startswith("*") for a in arrays.values()) == 1
            if kind == "dtype" or not (either or alone):
                cases.append(pytest.param(name, key, id=f"{name}-{key}"))
    return cases


def refuses(name, arguments, key):
    """The call ends in a sentence that names the argument, and not in one of XLA's."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(name, arguments)
    text = str(caught.value)
    assert re.search(rf"\b{key}\b", text), text
    assert "must" in text or "needs" in text or "make them equal" in text, text
    assert text.endswith((".", "?"))
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(("name", "key"), mistakes("rank"))
def test_another_rank(name, key):
    arguments, _ = good_call(name)
    refuses(name, {**arguments, key: arguments[key][..., None]}, key)


@pytest.mark.parametrize(("name", "key"), mistakes("dtype"))
def test_another_dtype(name, key):
    arguments, _ = good_call(name)
    value = arguments[key]
    wrong = value.astype(jnp.float32) if not jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.int32)
    refuses(name, {**arguments, key: wrong}, key)


def defined(name, arguments):
    result = call(name, arguments)
    for leaf in jax.tree.leaves(result):
        if hasattr(leaf, "dtype"):
            assert not np.isnan(np.asarray(leaf, np.float64)).any(), (name, leaf)


ARRAYS = [name for name in FUNCTIONS if good_call(name)[1]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_without_a_mistake(name):
    defined(name, good_call(name)[0])


@pytest.mark.parametrize("name", ARRAYS)
def test_an_empty_batch(name):
    defined(name, good_call(name, B=0, N=0)[0])


@pytest.mark.parametrize("name", [name for name in ARRAYS if any("mask" in key for key in good_call(name)[0])])
def test_an_empty_mask(name):
    arguments, _ = good_call(name)
    masks = {
        key: jnp.zeros_like(value)
        for key, value in arguments.items()
        if key in ("response_mask", "token_mask", "step_mask", "mask")
    }
    defined(name, {**arguments, **masks})
    # What lies outside a mask does not enter, be it NaN.
    spoilt = {
        key: jnp.full_like(value, jnp.nan)
        for key, value in arguments.items()
        if getattr(value, "shape", None) == next(iter(masks.values())).shape and value.dtype == jnp.float32
    }
    if name.split(".")[1] not in ("loss_metrics", "policy_loss"):
        defined(name, {**arguments, **masks, **spoilt})


@pytest.mark.parametrize("name", [name for name in ARRAYS if "group_ids" in good_call(name)[0]])
def test_groups_of_one_member(name):
    arguments, _ = good_call(name)
    defined(name, {**arguments, "group_ids": jnp.arange(SIZES["B"])})
    defined(name, good_call(name, B=1)[0])


@pytest.mark.parametrize("name", [n for n in ARRAYS if any("V" in a.dim_str for a in good_call(n)[1].values())])
def test_a_vocabulary_of_one(name):
    defined(name, good_call(name, V=1)[0])


def test_a_reward_that_is_not_a_number():
    rewards, ids = jnp.array([1.0, jnp.nan, 0.0, 1.0]), jnp.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan; every reward must be finite"):
        require_batch_values(rewards=rewards, response_mask=jnp.ones((4, 2), bool), group_ids=ids)
    # Where values cannot be looked at, it stays visible, in its own group.
    for rule in (advantages.group_centred, advantages.group_normalised, advantages.leave_one_out):
        np.testing.assert_array_equal(np.isnan(rule(rewards, ids)), [True, True, False, False])
    assert np.isnan(advantages.batch_normalised(rewards)).all()
    ones = jnp.full((4, 2), 0.5)
    for rule in (token_baseline.optimal_token_baseline, token_baseline.own_token_baseline):
        np.testing.assert_array_equal(
            np.isnan(rule(rewards, jnp.log(ones), ones, ones > 0, ids)), [[True] * 2] * 2 + [[False] * 2] * 2
        )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("objectives.hybrid.top_k_kl_partial", "k", 0),
        ("objectives.hybrid.top_k_kl_with_tail", "k", 4),
        ("objectives.hybrid.linear_warmup", "steps", 0),
        ("objectives.hybrid.cosine_warmup", "steps", 0),
        ("objectives.hybrid.log_linear", "steps", 0),
        ("objectives.hybrid.log_linear", "start", 0.0),
        ("objectives.aggregation.aggregate", "mode", "token_mean"),
        ("objectives.aggregation.seq_mean_token_sum_norm", "length_normaliser", 0.0),
        ("objectives.advantages.group_normalised", "ddof", 2),
        ("objectives.modulation.step_entropy", "steps", 0),
        ("objectives.pruning.pruned_log_prob", "log_min_p", 0.5),
        ("bounds.inputs.bound_inputs_from_scalars", "horizon", 0),
        ("bounds.inputs.bound_inputs_from_tokens", "horizon", 0),
        ("bounds.inverse.largest_max_kl", "horizon", 0),
        ("bounds.logit_dynamics.update_norm_range", "vocabulary", 1),
        ("bounds.logit_dynamics.expected_update_norm_range_sharp", "vocabulary", 1),
        ("bounds.pruning.worst_case_pruned_mass", "vocabulary", 0),
        ("bounds.pruning.worst_case_pruned_mass", "log_min_p", 0.5),
        ("bounds.pruning.worst_case_bias_bound", "horizon", 0),
        ("bounds.pruning.worst_case_bias_bound", "smallest_kept_mass", 1.5),
        ("bounds.mismatch.uniform_log_prob_change", "max_noise", -0.1),
        ("bounds.regret.psrl_bayes_regret_prior_free", "dimension", 0),
        ("bounds.regret.sequential_projection_dimension", "failure", 0.0),
        ("bounds.regret.sequential_projection_dimension", "accuracy", 1.5),
        ("bounds.regret.covariance_tracking_dimension", "dimension", 0),
        ("bounds.regret.confidence_width", "failure", 2.0),
        ("bounds.regret.ensemble_linear_regret", "failure", 0.0),
        ("bounds.regret.hyperagent_bayes_regret", "prior_mass", 1.0),
    ],
)
def test_a_number_out_of_range(name, key, value):
    refuses(name, {**good_call(name)[0], key: value}, key)


def test_a_name_that_is_nearly_right():
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        get_recipe("gprpo")
