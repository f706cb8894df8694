"""Training under a controlled mismatch: exact numbers against enumeration, and what an arm's weights do."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pruning_training
from experiments import trm_training
from experiments.lab import numbers
from experiments.lab.arms import LABELS
from experiments.lab.arms import arm
from experiments.lab.ladder import ladder
from experiments.lab.ladder import measured
from experiments.lab.ladder import moves
from experiments.lab.settings import LabSettings
from experiments.lab.settings import check
from experiments.lab.sums import sums
from experiments.lab.train import NO_PRUNING
from experiments.lab.train import ArmScan
from experiments.lab.train import Mismatch
from experiments.lab.train import on_tokens
from experiments.lab.train import sampled_error
from experiments.lab.world import Sampled
from experiments.run_folder import UserError
from experiments.settings import RunSettings
from jaxrl_llm import categorical
from jaxrl_llm.bounds import BOUND_NAMES
from jaxrl_llm.bounds.surrogate_error import WITHOUT_COVERAGE
from jaxrl_llm.rollouts.perturb import chain_logits
from jaxrl_llm.rollouts.perturb import perturbation

RUNGS, VOCABULARY, HORIZON = 3, 4, 4


@pytest.fixture(scope="module")
def policies() -> tuple[jax.Array, jax.Array]:
    pi = jax.random.normal(jax.random.key(1), (RUNGS, VOCABULARY))
    return pi, pi + 0.4 * jax.random.normal(jax.random.key(2), pi.shape)


def test_the_ladder_is_what_enumeration_says(policies):
    follows = moves(jax.random.key(0), rungs=RUNGS, vocabulary=VOCABULARY, traps=1)
    pi, mu = (np.asarray(jax.nn.softmax(table), np.float64) for table in policies)
    reward_pi = reward_mu = gain = kl = 0.0
    for tokens in itertools.product(range(VOCABULARY), repeat=HORIZON):
        state, law_pi, law_mu, ratios = 0, 1.0, 1.0, 0.0
        for token in tokens:
            law_pi, law_mu = law_pi * pi[state, token], law_mu * mu[state, token]
            ratios += pi[state, token] / mu[state, token] - 1
            state = int(follows[state, token])
        reward = state / (RUNGS - 1)
        reward_pi, reward_mu = reward_pi + law_pi * reward, reward_mu + law_mu * reward
        gain += law_mu * reward * ratios
        kl += law_mu * np.log(law_mu / law_pi)
    exact = measured(*policies, follows, horizon=HORIZON)
    np.testing.assert_allclose(
        [exact.reward_pi, exact.reward_mu, exact.surrogate_gain, exact.inputs.sequence_kl],
        [reward_pi, reward_mu, gain, kl],
        rtol=2e-5,
    )
    swapped = measured(policies[1], policies[0], follows, horizon=HORIZON)
    assert abs(float(swapped.surrogate_gain) - gain) > 1e-2  # pi and mu are not interchangeable
    assert abs(reward_pi - reward_mu - gain) > 1e-3  # there is an error to be bounded


@pytest.fixture(scope="module")
def trained():
    world = ladder(jax.random.key(0), horizon=12, rungs=RUNGS, vocabulary=VOCABULARY, traps=1, answers=32)
    noise = perturbation("gaussian_noise", 1.0).logits
    recipes = [arm(name, mask_maximum=0.3, mask_average=0.2) for name in LABELS]
    trainer = ArmScan(world, Mismatch(noise, 2), recipes, steps=25, learning_rate=0.1)

    @functools.cache
    def run(name: str, log_min_p: float | None = None):
        return jax.device_get(trainer.train(name, log_min_p=log_min_p, seeds=2, key=jax.random.key(4)))

    return run


def test_arms_start_alike_learn_and_differ(trained):
    none, tis, trm = trained("none"), trained("tis"), trained("trm")
    for other in (tis, trm):  # same start, same noise, same sampled batch
        for name in ("reward", "reward_sampler", "error_sampled", "kl_mean"):
            np.testing.assert_array_equal(none[name][:, 0], other[name][:, 0])
    assert np.all(numbers.at_the_end(tis["reward"]) > tis["reward"][:, 0] + 0.05)
    assert np.any(none["reward"][:, -1] != tis["reward"][:, -1])
    assert 0 < trm["wasted"].mean() < 1
    assert np.all(none["wasted"] == 0)
    assert np.all(none["acceptance"] == 1)
    mis = trained("mis")
    assert 0 < mis["acceptance"].mean() < 1
    for part in (trm, mis):
        np.testing.assert_allclose(part["acceptance"], 1 - part["wasted"], atol=1e-6)  # all responses are equally long
    assert np.all(tis["acceptance"] == 1)


def test_bounds_hold_where_everything_is_exact(trained):
    part = trained("none")
    assert np.all(np.abs(part["error"]) <= part["unified_sharp"] + 1e-5)
    assert np.all(part["unified_sharp"] <= part["unified_printed"] + 1e-6)
    # There is an error to be bounded.
    assert np.abs(part["error"]).max() > 0.02


def test_pruning_prunes_both_sides(trained):
    weak, strong = trained("dvp", -13.0), trained("dvp", -1.0)
    assert weak["pruned_mass"].max() < 1e-3 < strong["pruned_mass"].mean()
    assert strong["wasted"].mean() > 0  # safe sets differ
    assert np.isfinite(strong["log_ppl_abs_diff"]).all()
    np.testing.assert_allclose(trained("tis")["reward"], weak["reward"], atol=1e-4)  # there is nothing to prune


def test_bounds_are_of_the_pair_that_the_error_is_about():
    """The pruned policies: mu cannot draw all that pi can in the first context, pi not all that mu can in the third."""
    logits = jnp.log(jnp.array([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.6, 0.2, 0.2]]))
    logits_mu = jnp.log(jnp.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]))
    row = jnp.array([[0, 1, 2]])
    sampled = Sampled(
        row, row >= 0, jnp.ones(1), row[:, 0], row[:, 0], None, jax.random.split(jax.random.key(0), 3), row
    )
    both = on_tokens(logits, logits_mu, sampled, jnp.log(0.4))
    np.testing.assert_allclose(both.tv[0], [4 / 9, 2 / 3 - 5 / 9, 4 / 9], rtol=1e-5)
    np.testing.assert_array_equal(both.covered[0], [False, True, True])
    np.testing.assert_array_equal(np.isinf(both.kl[0]), [False, False, True])
    np.testing.assert_allclose(both.kl[0, 0], np.log(9 / 5), rtol=1e-5)
    np.testing.assert_allclose(both.kl_whole, categorical.kl(logits_mu, logits)[None], rtol=1e-5)


def test_a_bound_without_proof_is_not_reported(trained):
    part = trained("dvp", -1.0)
    uncovered = part["covered"] == 0
    assert uncovered.any()
    assert np.isinf(part["sequence_kl"]).any()
    names = {BOUND_NAMES[int(number)] for number in part["dominating"][uncovered]}
    assert names <= set(WITHOUT_COVERAGE), names
    for bound in (part["unified_sharp"], part["unified_printed"]):
        assert np.all(np.abs(part["error"]) <= bound + 1e-5)
        assert np.isfinite(bound).all()
    assert np.all(trained("trm")["covered"] == 1)


def test_responses_to_one_prompt_are_one_cluster():
    world = ladder(jax.random.key(0), horizon=4, rungs=RUNGS, vocabulary=VOCABULARY, traps=1, answers=16)
    table = jax.random.normal(jax.random.key(1), (RUNGS, VOCABULARY))
    once = world.sample(table, chain_logits(), jax.random.key(2), jax.random.key(3))
    per_row = ("tokens", "mask", "rewards", "group_ids", "clusters", "row")
    twice = once._replace(**{name: jnp.concatenate([getattr(once, name)] * 2) for name in per_row})
    found = [sampled_error(on_tokens(0.5 * table, table, one, NO_PRUNING), one) for one in (once, twice)]
    assert 0 < float(found[0].standard_error) < 1
    np.testing.assert_allclose(*found, rtol=1e-5)  # copies say nothing new


def test_a_pruned_token_has_the_ratio_zero():
    """The sampled error of the surrogate is that of enumeration where the trainer does not keep what was sampled."""
    world = ladder(jax.random.key(0), horizon=3, rungs=RUNGS, vocabulary=VOCABULARY, traps=1, answers=20_000)
    noise = perturbation("gaussian_noise", 0.5).logits
    trainer = ArmScan(
        world, Mismatch(noise, 0), [arm("dvp", mask_maximum=1.0, mask_average=1.0)], steps=1, learning_rate=0.1
    )
    part = jax.device_get(trainer.train("dvp", log_min_p=-0.2, seeds=2, key=jax.random.key(5)))
    assert part["wasted"].max() > 0.05
    np.testing.assert_array_less(np.abs(part["error_sampled"] - part["error"]), 4 * part["error_sampled_se"])


def test_exact_rewards_of_sums_are_those_of_samples():
    world = sums(prompts=50, group_size=40, width=16, layers=1, imitation_steps=200)
    state = jax.jit(world.init)(jax.random.key(0))
    noise = perturbation("gaussian_noise", 0.7).logits
    key, noise_key = jax.random.key(1), jax.random.key(2)
    exact = jax.jit(lambda state: world.exact(state, chain_logits(), state, noise, noise_key))(state)
    sampled = jax.jit(lambda state: world.sample(state, noise, key, noise_key)._replace(keys=None))(state)
    rewards = sampled.rewards
    assert np.all(np.asarray(sampled.clusters).reshape(50, 40) == np.arange(50)[:, None])
    error = np.std(np.asarray(rewards).reshape(50, 40).mean(1)) / 50**0.5 + 1e-3
    assert abs(float(jnp.mean(rewards)) - float(exact.reward_mu)) < 4 * error
    assert 0.01 < float(exact.reward_mu) != float(exact.reward_pi)


def test_collapse_is_a_fall_from_the_best_window():
    rises, falls = np.linspace(0, 1, 50), np.concatenate([np.linspace(0, 1, 25), np.linspace(1, 0.3, 25)])
    broken = np.full(50, np.nan)
    np.testing.assert_array_equal(numbers.collapsed(np.stack([rises, falls])), [False, True])
    assert numbers.collapsed(np.stack([broken, rises]))[0]


def test_prevented_collapses_are_paired_by_seed():
    rises, falls = np.linspace(0, 1, 50), np.concatenate([np.linspace(0, 1, 25), np.linspace(1, 0.3, 25)])
    mine, other = {"reward": np.stack([rises] * 5 + [falls])}, {"reward": np.stack([falls] * 4 + [rises] * 2)}
    fewer = numbers.collapses_prevented(mine, other)
    assert fewer.value == pytest.approx(4 / 6 - 1 / 6)
    assert fewer.low < 0 < fewer.value < fewer.high  # six seeds do not tell four fewer and one more from chance
    assert numbers.collapses_prevented(other, mine).value == -fewer.value


def test_intervals_are_those_of_student():
    interval = numbers.over_seeds(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert interval.mean == 3
    np.testing.assert_allclose(interval.half, 2.776445 * 2.5**0.5 / 5**0.5, rtol=1e-5)
    assert interval.resolved
    assert not numbers.over_seeds(np.array([-1.0, 1.0, 0.5])).resolved


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="Field --seeds is 1; it must be at least 2"):
        check(LabSettings(seeds=1))
    with pytest.raises(ValueError, match="Field --log-min-p is 1"):
        check(LabSettings(log_min_p=1.0))
    with pytest.raises(ValueError, match="vocabulary is 2; it must be at least 3"):
        ladder(jax.random.key(0), horizon=4, rungs=3, vocabulary=2, traps=2, answers=4)
    with pytest.raises(ValueError, match="group_size is 1"):
        sums(prompts=4, group_size=1, width=8, layers=1, imitation_steps=0)
    with pytest.raises(ValueError, match="Did you mean 'tis'"):
        arm("tiss", mask_maximum=1.0, mask_average=1.0)


def synthetic(names, settings, generator) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of a run that was not made: enough to draw every page."""
    shape = (settings.seeds, 30)
    quantities = [
        "reward",
        "reward_sampler",
        "error",
        "error_sampled",
        "error_sampled_se",
        "unified_printed",
        "unified_sharp",
        "threshold",
        "vacuous",
        "log_ppl_abs_diff",
        "kl_mean",
        "kl_max",
        "acceptance",
        "wasted",
        "pruned_mass",
        "covered",
        "sequence_kl",
    ]
    return {
        name: {quantity: generator.uniform(0.1, 0.9, shape).astype(np.float32) for quantity in quantities}
        | {"seconds": np.array(1.0)}
        for name in names
    }


@pytest.mark.parametrize("experiment", [trm_training, pruning_training])
def test_pages_say_what_is_resolved(experiment):
    settings = dataclasses.replace(experiment.SETTINGS, arms="all")
    names = list(experiment.parts(settings))
    assert len(names) == len(set(names)) >= 9
    results = synthetic(names, settings, np.random.default_rng(0))
    zero = "sums_trm" if experiment is trm_training else "dvp_3"
    bounded = 1 if experiment is pruning_training else 4
    results[zero]["error_sampled"] = np.tile([[-0.1, 0.1]], (settings.seeds, 15)).astype(np.float32)
    summary = experiment.summarise(settings, results)
    assert summary[experiment.EXPERIMENT.expectation.quantity] < 1
    page = experiment.page(settings, results, summary)
    rows = {row[0]: row for section in page.sections if section.table for row in section.table.rows}
    captions = [picture.caption for section in page.sections for picture in section.pictures]
    assert sum("bounds that need it have no proof" in caption for caption in captions) == bounded
    assert rows["TRM, both tests" if experiment is trm_training else "DVP, log rho = -3"][8] == "not resolved"
    for section in page.sections:
        for picture in section.pictures:
            assert picture.svg.startswith("<?xml")


def test_an_unknown_mismatch_is_refused():
    with pytest.raises(UserError, match=r"Field --mismatch: .*Did you mean 'int8_weights'"):
        RunSettings(mismatch="int8_weight").get_perturbation()
    assert RunSettings(mismatch="temperature", mismatch_strength=1.3).get_perturbation().logits is not None
