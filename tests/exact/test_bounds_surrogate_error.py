"""Every bound on the surrogate error against exact enumeration of token trees, in float64.

Each theorem is tested three ways: it holds on every random world, some world comes near it, and a wrong formula is
caught.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import PRINTED
from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import sampled_surrogate_error
from jaxrl_llm.bounds import sampled_weighted_deviation
from jaxrl_llm.bounds import sampled_worst_surrogate_error
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.bounds.surrogate_error import WITHOUT_COVERAGE
from jaxrl_llm.bounds.surrogate_error import average_only_from_kl
from theory_checks import token_trees as trees

SHAPES = [(2, 6), (3, 5), (4, 4), (5, 4)]
WORLDS = 150


def measure(pi, mu, rewards):
    gain, surrogate, error = trees.error_of_surrogate(pi, mu, rewards)
    inputs = trees.bound_inputs(pi, mu)
    weight = jnp.exp(trees.sequence_log_probs(mu))
    ratios = trees.token_log_ratios(pi, mu)
    every = jnp.ones_like(ratios, bool)
    # The estimator on "every sequence, in proportion": weights enter through the rewards, the mean through the size.
    ratio_form = sampled_surrogate_error(ratios, every, weight * rewards * rewards.size).value
    bounds = surrogate_error_bounds(inputs)
    after = jnp.arange(ratios.shape[1], dtype=ratios.dtype)[::-1]
    weights = jnp.minimum(after * inputs.max_tv, 1.0)
    deviations = jax.vmap(lambda row: sampled_weighted_deviation(row[None], every[:1], weights).value)(ratios)
    worst = jax.vmap(lambda row: sampled_worst_surrogate_error(row[None], every[:1]).value)(ratios)
    return {
        "error": error,
        "worst": jnp.sum(weight * worst),
        "gain": gain,
        "surrogate": surrogate,
        "ratio_form": ratio_form,
        "weighted_deviation": jnp.sum(weight * deviations),
        "bounds": bounds,
        "from_kl": average_only_from_kl(inputs),
    }


@pytest.fixture(scope="module")
def measured():
    results, rng = [], np.random.default_rng(11)
    for vocabulary, horizon in SHAPES:
        worlds = trees.draw(
            rng,
            worlds=WORLDS,
            vocabulary=vocabulary,
            horizon=horizon,
            noise=np.geomspace(0.02, 3.0, WORLDS),
            share=np.where(np.arange(WORLDS) % 2 == 0, 1.0, 0.2),
            kind=np.arange(WORLDS) % 3,
        )
        results.append(jax.device_get(jax.jit(jax.vmap(measure))(*worlds)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def test_runs_in_float64(measured):
    assert measured["error"].dtype == np.float64


def test_the_ratio_form_is_the_error(measured):
    np.testing.assert_allclose(measured["ratio_form"], measured["error"], atol=1e-12)
    assert np.abs(measured["error"]).max() > 0.1


def test_the_weighted_deviation_is_the_adaptive_bound(measured):
    np.testing.assert_allclose(measured["weighted_deviation"], measured["bounds"].sharp["adaptive_tv"], rtol=1e-10)
    assert np.all(np.abs(measured["error"]) <= measured["weighted_deviation"] + 1e-12)


@pytest.mark.parametrize("name", sorted(SHARP))
def test_no_bound_is_broken_with_either_constant(measured, name):
    error = np.abs(measured["error"])
    assert np.all(error <= measured["bounds"].sharp[name] + 1e-12)
    if name in PRINTED:
        assert np.all(error <= measured["bounds"].printed[name] + 1e-12)


def test_averages_alone_bound_the_error(measured):
    assert np.all(measured["bounds"].sharp["average_only"] <= measured["from_kl"] + 1e-12)


def test_the_unified_minimum_is_the_smallest(measured):
    sharp = np.stack(list(measured["bounds"].sharp.values()))
    np.testing.assert_allclose(measured["bounds"].unified_sharp, sharp.min(0))
    assert np.all(measured["bounds"].unified_sharp <= measured["bounds"].unified_printed)


def test_adaptive_is_never_above_the_bounds_it_replaces(measured):
    sharp = measured["bounds"].sharp
    for name in ("pinsker_marginal_kl", "pinsker_marginal_tv", "coupling", "adaptive_kl", "adaptive_tv"):
        assert np.all(sharp["adaptive"] <= sharp[name] + 1e-12)
    assert np.all(sharp["adaptive"] <= measured["bounds"].printed["mixed_kl"] / 2 + 1e-12)


def test_no_reward_does_worse_than_the_worst_one_and_no_bound_is_below_it(measured):
    assert np.all(np.abs(measured["error"]) <= measured["worst"] + 1e-12)
    for name, bound in measured["bounds"].sharp.items():
        assert np.all(measured["worst"] <= bound + 1e-12), name
    pi, mu, _ = fixture()
    ratios = jnp.exp(trees.token_log_ratios(pi, mu))
    excess = jnp.prod(ratios, axis=1) - 1 - jnp.sum(ratios - 1, axis=1)
    rewards = (excess < 0).astype(excess.dtype)
    error = trees.error_of_surrogate(pi, mu, rewards)[2]
    worst = sampled_worst_surrogate_error(jnp.log(ratios), jnp.ones(ratios.shape, bool)).value  # mu is uniform
    np.testing.assert_allclose(worst, -error, rtol=1e-12)
    # The opposite rewards attain it with the other sign, because E_mu of the excess is 0.
    np.testing.assert_allclose(trees.error_of_surrogate(pi, mu, 1 - rewards)[2], worst, rtol=1e-12)


def rare_first_step(share):
    """mu almost never starts with token 1, pi does with probability `share`; then they disagree."""
    never = 1e-12
    mu = [log([1 - never, never]), log([0.5, 0.5], [1 - never, never])]
    pi = [log([1 - share, share]), log([0.5, 0.5], [never, 1 - never])]
    return pi, mu, jnp.array([0.0, 0.0, 1.0, 0.0])


def jump():
    """mu and pi disagree about both tokens; Error is the number of tokens."""
    never = 1e-12
    yes, no = [never, 1 - never], [1 - never, never]
    return [log(yes), log(no, yes)], [log(no), log(yes, no)], jnp.array([1.0, 0.0, 1.0, 0.0])


def test_the_averages_bound_the_error_with_constant_one_and_no_less():
    # |Error| <= D_KL and |Error| <= sum_t Dbar_t, both attained (errata F2.17).
    for share, slack in ((0.5, 0.3), (0.1, 0.06), (0.01, 0.006)):
        pi, mu, rewards = rare_first_step(share)
        error = abs(float(trees.error_of_surrogate(pi, mu, rewards)[2]))
        bound = float(surrogate_error_bounds(trees.bound_inputs(pi, mu)).sharp["sequence_kl"])
        assert (1 - slack) * bound <= error <= bound
    pi, mu, rewards = jump()
    error = abs(float(trees.error_of_surrogate(pi, mu, rewards)[2]))
    inputs = trees.bound_inputs(pi, mu)
    np.testing.assert_allclose(error, surrogate_error_bounds(inputs).sharp["linear"], rtol=1e-9)
    np.testing.assert_allclose(error, 2.0, rtol=1e-9)
    # At two tokens the mixed TV bound is attained by small steps.
    pi, mu, rewards = worst_two_step(1e-4)
    error = abs(float(trees.error_of_surrogate(pi, mu, rewards)[2]))
    assert error > 0.9998 * surrogate_error_bounds(trees.bound_inputs(pi, mu)).sharp["mixed_tv"]


def test_the_printed_growth_with_the_horizon_is_not_needed():
    # Small equal steps of independent tokens: half of D_KL in the limit, whatever the horizon, so linear in it.
    ratios = []
    for horizon in (2, 4, 8, 12):
        step = 1e-3
        pi = [jnp.tile(log([0.5 + step, 0.5 - step]), (2**t, 1)) for t in range(horizon)]
        mu = [jnp.zeros((2**t, 2)) for t in range(horizon)]
        log_ratio = trees.token_log_ratios(pi, mu)
        worst = sampled_worst_surrogate_error(log_ratio, jnp.ones(log_ratio.shape, bool)).value  # mu is uniform
        ratios.append(float(worst / trees.bound_inputs(pi, mu).sequence_kl))
    assert all(0.3 < ratio <= 0.5 + 1e-9 for ratio in ratios), ratios


def cut(policies, rng):
    """The policies without some tokens of each context, never without all."""
    cut_ones = []
    for logits in policies:
        drop = rng.random(logits.shape) < 0.3
        np.put_along_axis(drop, rng.integers(0, logits.shape[-1], (*logits.shape[:-1], 1)), False, axis=-1)
        cut_ones.append(jnp.where(jnp.asarray(drop), -jnp.inf, logits))
    return cut_ones


def of_cut_policies(pi, mu, rewards):
    """Error and the inputs of the bounds; a response that mu cannot sample is in no expectation under mu."""
    log_pi, log_mu = trees.sequence_log_probs(pi), trees.sequence_log_probs(mu)
    possible = log_mu > -jnp.inf
    ratios = jnp.exp(jnp.where(possible[:, None], trees.token_log_ratios(pi, mu), 0.0))
    law = jnp.exp(log_mu)
    error = jnp.sum((jnp.exp(log_pi) - law) * rewards) - jnp.sum(law * rewards * jnp.sum(ratios - 1, axis=1))
    kl = jnp.sum(jnp.where(possible, law * (jnp.where(possible, log_mu, 0.0) - log_pi), 0.0))
    return error, trees.bound_inputs(pi, mu)._replace(sequence_kl=kl)


@pytest.mark.parametrize("both", [False, True])
def test_what_holds_where_pi_can_draw_what_mu_cannot(both):
    # errata F2.18
    rng, worlds = np.random.default_rng(3), 300
    noise, every = np.geomspace(0.05, 3.0, worlds), np.ones(worlds)
    kind = np.arange(worlds) % 3
    pi, mu, rewards = trees.draw(rng, worlds=worlds, vocabulary=3, horizon=4, noise=noise, share=every, kind=kind)
    mu, pi = cut(mu, rng), cut(pi, rng) if both else pi

    def measure(pi, mu, rewards):
        error, inputs = of_cut_policies(pi, mu, rewards)
        return jnp.abs(error), inputs, surrogate_error_bounds(inputs, mu_covers_pi=False)

    error, inputs, bounds = jax.device_get(jax.jit(jax.vmap(measure))(pi, mu, rewards))
    assert np.all(np.isinf(inputs.max_kl)) == both
    for kind in (bounds.sharp, bounds.printed):
        for name, bound in kind.items():
            assert np.all(error <= bound + 1e-12), name  # also: none is NaN
            assert np.all(np.isinf(bound)) or name in WITHOUT_COVERAGE, name
    np.testing.assert_array_equal(bounds.unified_sharp, np.min([bounds.sharp[name] for name in WITHOUT_COVERAGE], 0))
    assert np.max(error / bounds.sharp["linear"]) > 0.5
    if not both:
        assert np.max(error / bounds.sharp["sequence_kl"]) > 0.4


def test_each_other_bound_is_broken_by_one_token_that_mu_cannot_draw():
    share = 0.01
    pi, mu = [log([1 - share, share])], [log([1.0, 0.0])]
    error, inputs = of_cut_policies(pi, mu, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(error, share)
    covered, without = surrogate_error_bounds(inputs), surrogate_error_bounds(inputs, mu_covers_pi=False)
    for kind, told in ((covered.sharp, without.sharp), (covered.printed, without.printed)):
        for name, bound in kind.items():
            assert (float(error) <= float(bound) + 1e-12) == (name in WITHOUT_COVERAGE), name
            assert np.isinf(told[name]) == (name not in WITHOUT_COVERAGE), name
    # The sum of TV is attained here, and D_KL but for a term of second order.
    np.testing.assert_allclose(without.sharp["linear"], share)
    np.testing.assert_allclose(without.sharp["sequence_kl"], share, rtol=0.01)
    # L' depends on where the rewards start: if every reward is 5 it is -5 share, and J(pi) is J(mu).
    constant = abs(float(of_cut_policies(pi, mu, jnp.array([5.0, 5.0]))[0]))
    shifted = surrogate_error_bounds(inputs, reward_range=(5.0, 6.0), mu_covers_pi=False)
    assert constant > 4 * float(without.unified_sharp)
    np.testing.assert_allclose(shifted.sharp["linear"], 6 * share)  # the span of 0 and [5, 6]
    assert constant <= float(shifted.unified_sharp)
    assert not bool(shifted.vacuous)


def log(*rows):
    return jnp.log(jnp.array(rows))


def fixture():
    mu = [log([0.5, 0.5]), log([0.5, 0.5], [0.5, 0.5])]
    pi = [log([0.6, 0.4]), log([0.7, 0.3], [0.5, 0.5])]
    return pi, mu, jnp.array([1.0, 0.0, 0.0, 0.0])


def test_hand_fixture():
    pi, mu, rewards = fixture()
    gain, surrogate, error = trees.error_of_surrogate(pi, mu, rewards)
    np.testing.assert_allclose([gain, surrogate, error], [0.17, 0.15, 0.02], atol=1e-12)
    inputs = trees.bound_inputs(pi, mu)
    np.testing.assert_allclose(inputs.max_tv, 0.2)
    np.testing.assert_allclose(inputs.max_kl, 0.0871767, rtol=1e-6)
    np.testing.assert_allclose(inputs.sequence_kl, 0.0639993, rtol=1e-6)
    np.testing.assert_allclose(inputs.sequence_tv, 0.17)
    np.testing.assert_allclose(inputs.mean_tv_t, [0.1, 0.1])
    expected = {
        "coupling": 0.16,
        "pinsker_marginal_kl": 0.174353,
        "pinsker_marginal_tv": 0.167023,
        "mixed_kl": 0.298778,
        "mixed_tv": 0.272,
        "adaptive": 0.08,
    }
    bounds = surrogate_error_bounds(inputs)
    for name, value in expected.items():
        np.testing.assert_allclose(bounds.printed[name], value, rtol=4e-6)
    np.testing.assert_allclose(bounds.sharp["adaptive"], 0.04, rtol=1e-12)
    np.testing.assert_allclose(bounds.sharp["average_only"], 0.37, rtol=1e-12)


def worst_two_step(eps):
    """Two tokens, pi = mu at the root but for a shift of eps, and the second step shifted the other way after each
    token.

    mu is uniform; after token 0 pi moves towards the rewarded token, after token 1 away from it.
    """
    mu = [log([0.5, 0.5]), log([0.5, 0.5], [0.5, 0.5])]
    pi = [log([0.5 + eps, 0.5 - eps]), log([0.5 + eps, 0.5 - eps], [0.5 - eps, 0.5 + eps])]
    return pi, mu, jnp.array([1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.3])
def test_the_sharp_constant_is_attained_at_two_tokens(eps):
    # Error = 2 eps^2 here: the coupling, classical and adaptive bounds with halved constants are equalities.
    pi, mu, rewards = worst_two_step(eps)
    error = abs(float(trees.error_of_surrogate(pi, mu, rewards)[2]))
    sharp = surrogate_error_bounds(trees.bound_inputs(pi, mu)).sharp
    np.testing.assert_allclose(error, 2 * eps**2, rtol=1e-9)
    for name in ("classical", "coupling", "adaptive", "adaptive_tv"):
        np.testing.assert_allclose(error, sharp[name], rtol=1e-9)
    if eps < 0.01:  # Pinsker's inequality is an equality in the limit of small steps
        for name in ("pinsker_marginal_kl", "pinsker_marginal_tv", "adaptive_kl"):
            assert error > 0.999 * sharp[name]
    # So a quarter of the printed constant would be a wrong theorem, and this world shows it.
    assert error > 0.99 * sharp["adaptive"] > 0.5 * sharp["adaptive"]


@pytest.mark.parametrize("baseline", [0.0, 0.3])
def test_the_printed_surrogate_is_off_by_a_constant(baseline):
    # E_mu[(R - b) sum_t rho_t] = L' + T (J(mu) - b): the bounds are for L', not for the printed surrogate (errata
    # F2.1).
    pi, mu, rewards = (jax.tree.map(lambda x: x[0], part) for part in one_world())
    law = jnp.exp(trees.sequence_log_probs(mu))
    ratios = jnp.exp(trees.token_log_ratios(pi, mu))
    printed = jnp.sum(law * (rewards - baseline) * ratios.sum(axis=1))
    _, surrogate, error = trees.error_of_surrogate(pi, mu, rewards)
    offset = ratios.shape[1] * (jnp.sum(law * rewards) - baseline)
    np.testing.assert_allclose(printed, surrogate + offset, rtol=1e-12)
    gain = jnp.sum(jnp.exp(trees.sequence_log_probs(pi)) * rewards) - jnp.sum(law * rewards)
    assert abs(float(gain - printed)) > 100 * abs(float(error))


def one_world():
    return trees.draw(
        np.random.default_rng(1),
        worlds=1,
        vocabulary=3,
        horizon=5,
        noise=np.array([0.05]),
        share=np.ones(1),
        kind=np.zeros(1),
    )


def test_wrong_formulas_are_caught(measured):
    error = np.abs(measured["error"])
    sharp = measured["bounds"].sharp
    pi, mu, rewards = worst_two_step(0.2)
    worst = abs(float(trees.error_of_surrogate(pi, mu, rewards)[2]))
    exact = surrogate_error_bounds(trees.bound_inputs(pi, mu)).sharp
    # Half of the sharp constant is broken for every bound that the two-token world attains.
    for name in ("classical", "coupling", "adaptive", "adaptive_tv"):
        assert worst > 0.5 * exact[name] + 1e-6
    # The surrogate without its -1, or with a baseline other than J(mu), is off by more than the bound (errata F2.1).
    offset = np.abs(measured["gain"] - (measured["surrogate"] + 0.5))
    assert np.any(offset > sharp["classical"])
    # Leaving out the surrogate altogether breaks the adaptive bound on many worlds.
    assert np.mean(np.abs(measured["gain"]) > sharp["adaptive"]) > 0.05
    assert np.all(error <= sharp["adaptive"] + 1e-12)


def test_tightness_on_random_worlds(measured):
    """Random worlds are far from the worst case; the figures here are the largest |Error| / bound seen."""
    error = np.abs(measured["error"])
    seen = {name: float(np.max(error / value)) for name, value in measured["bounds"].sharp.items()}
    assert seen["adaptive"] > 0.15, seen
    assert seen["average_only"] > 0.08, seen
    assert all(0 < ratio <= 1 for ratio in seen.values()), seen
