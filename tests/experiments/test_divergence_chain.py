"""One batch reused in small worlds: identities that hold exactly, wrong ones that are caught, and the tiny twin."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import divergence_chain as study
from experiments.cli import main
from experiments.results import RESULTS
from experiments.reuse import compute
from experiments.reuse import exact
from experiments.reuse.arms import ARMS
from experiments.reuse.numbers import share_above
from experiments.reuse.worlds import FAMILIES
from experiments.reuse.worlds import RANDOM
from experiments.reuse.worlds import draw
from experiments.reuse.worlds import the_chain
from experiments.run_folder import ROOT
from experiments.run_folder import RunFolder
from experiments.run_folder import read_json
from jaxrl_llm.objectives import divergence_augmented as augmented
from theory_checks import chain_drift

DISCOUNT, COEFFICIENT = 0.9, 0.5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn(family="sparse", *, discount=DISCOUNT):
    """A batch, and a policy that is not the old one."""
    rng = np.random.default_rng(3)
    worlds = draw(family, states=4, count=1, generator=rng)
    world = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), worlds)
    return exact.gather(world, discount), world.old + jnp.asarray(rng.normal(size=world.old.shape))


def gradient(name, batch, logits):
    states = exact.occupancy(logits, batch.world, DISCOUNT)
    return compute.policy_gradient(logits, ARMS[name].charge, batch, DISCOUNT, states)


def test_the_charge_is_the_gradient_of_the_divergence_and_a_flipped_sign_is_not(monkeypatch):
    batch, logits = drawn()
    conditional = jax.grad(exact.divergence)(logits, batch, DISCOUNT)
    full = jax.grad(exact.full_divergence)(logits, batch, DISCOUNT)
    many = gradient("multi_step", batch, logits)
    np.testing.assert_allclose(many, conditional, atol=1e-14)
    np.testing.assert_allclose(gradient("full_entropy", batch, logits), full, atol=1e-14)
    # Multi-step is also the full entropy with log d/d_old dropped: as its gradient it is wrong.
    for wrong in (gradient("one_step", batch, logits), gradient("truncated", batch, logits), full):
        assert np.abs(wrong - conditional).max() > 1e-3
    right = augmented.pseudo_reward
    monkeypatch.setattr(augmented, "pseudo_reward", lambda *policies, **choice: -right(*policies, **choice))
    assert np.abs(gradient("multi_step", batch, logits) - conditional).max() > 1e-2


def test_without_a_future_all_charges_are_one_step():
    batch, logits = drawn(discount=0.0)
    one, *others = (
        exact.charged(logits, batch, ARMS[name].charge, 0.0)
        for name in ("one_step", "two_terms", "truncated", "multi_step")
    )
    for other in others:
        np.testing.assert_array_equal(other, one)
    assert np.abs(exact.charged(logits, batch, ARMS["multi_step"].charge, DISCOUNT) - one).max() > 1e-2


@pytest.mark.parametrize(("name", "cap"), [("two_terms", 0.0), ("truncated", 1.0)])
def test_the_charge_is_the_mean_of_the_recursion_over_trajectories(name, cap):
    discount, steps = 0.02, 7
    chain = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), the_chain(3))
    batch = exact.gather(chain, discount)
    logits = chain.old + jnp.asarray(np.random.default_rng(0).normal(size=chain.old.shape))
    actions = np.array(list(itertools.product(range(2), repeat=steps)))
    # From the first state on, the second action goes forward.
    states = np.minimum(np.cumsum(actions, axis=1) - actions, 2)
    old, new = (np.asarray(jax.nn.log_softmax(z))[states, actions] for z in (chain.old, logits))
    phi = augmented.pseudo_reward(jnp.asarray(new), jnp.asarray(old))
    values = augmented.multi_step_divergence(
        phi, jnp.exp(jnp.asarray(new - old)), jnp.ones(phi.shape, bool), discount=discount, trace_cap=cap
    )[:, 0]
    chances = np.exp(old[:, 1:].sum(axis=1))
    expected = np.array([np.sum((chances * values)[actions[:, 0] == action]) for action in range(2)])
    found = exact.charged(logits, batch, ARMS[name].charge, discount)[0]
    np.testing.assert_allclose(found, expected, atol=1e-11)
    other = ARMS["truncated" if name == "two_terms" else "two_terms"].charge
    assert np.abs(exact.charged(logits, batch, other, discount)[0] - expected).max() > 1e-7


def test_what_the_truncated_sum_charges_is_no_divergence():
    """Erratum F8.5."""

    def charged_later(new, old):
        ratio = new / old
        return np.sum(old * np.minimum(ratio, 1) * np.log(ratio))

    flat, steep = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    np.testing.assert_allclose(charged_later(flat, steep), -charged_later(steep, flat))
    np.testing.assert_allclose(charged_later(flat, steep), -0.133, atol=5e-4)
    np.testing.assert_allclose(np.sum(flat * np.log(flat / steep)), 0.511, atol=5e-4)
    # On one state that leads to itself, D - phi is discount / (1 - discount) times that, where cD lets it through.
    batch, _ = drawn()
    logits = jnp.log(jnp.asarray(np.tile(flat, (4, 1))))
    world = batch.world._replace(
        transitions=jnp.tile(jnp.eye(4)[:, None], (1, 2, 1)), old=jnp.log(jnp.tile(steep, (4, 1)))
    )
    batch = exact.gather(world, DISCOUNT)
    later = exact.charged(logits, batch, ARMS["two_terms"].charge, DISCOUNT) - jnp.log(jnp.asarray(flat / steep))
    np.testing.assert_allclose(later, DISCOUNT * charged_later(flat, steep))


def test_the_optimum_is_where_multi_step_rests():
    batch, logits = drawn()
    options = {"discount": DISCOUNT, "coefficient": COEFFICIENT}
    best = exact.optimum(batch, **options)
    ascent = {
        name: exact.slope(best, batch, ARMS[name].charge, current=1.0, **options) for name in ("multi_step", "one_step")
    }
    np.testing.assert_allclose(ascent["multi_step"], 0.0, atol=1e-14)
    assert np.abs(ascent["one_step"]).max() > 1e-4
    found = [exact.measure(policy, batch, DISCOUNT) for policy in (best, logits)]
    values = [exact.objective(one.gain, one.divergence, **options) for one in found]
    np.testing.assert_allclose(exact.distance(logits, best, batch, **options), values[0] - values[1], atol=1e-14)
    assert values[0] > values[1] + 1e-3


def test_the_chain_is_that_of_the_notebook():
    world = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), the_chain(8))
    batch = exact.gather(world, DISCOUNT)

    def path(charge):
        options = {"discount": DISCOUNT, "coefficient": chain_drift.COEFFICIENT, "current": 0.0}
        policies = exact.reuse(batch, charge, rates=jnp.full(4, 25.0), **options)
        return jax.vmap(lambda logits: exact.measure(logits, batch, DISCOUNT))(policies)

    found = jax.jit(jax.vmap(path))(compute.charges_of(("one_step", "multi_step")))
    for row, future in enumerate((False, True)):
        drift, gain = chain_drift.reuse(future=future, reuses=4)
        np.testing.assert_allclose(found.states[row], drift, rtol=1e-9)
        np.testing.assert_allclose(found.gain[row], gain, rtol=1e-9)
    assert np.all(np.asarray(found.states) <= np.asarray(found.bound))


def test_shares_count_only_worlds_that_were_set_to_the_drift():
    gains = np.zeros((4, len(compute.MATCHED)))
    gains[:, compute.MATCHED.index("multi_step")] = [1.0, 1.0, -1.0, 1.0]
    reached = np.ones(gains.shape, bool)
    reached[3] = False
    family = np.full(4, list(FAMILIES).index("dense"))
    results = {"equal_current": {"gain": gains, "reached": reached, "family": family, "seconds": np.array(1.0)}}
    share = share_above(results, "dense", "multi_step")
    assert (share.problems, round(share.value, 3)) == (3, 0.667)
    assert share_above(results, "sparse", "multi_step").problems == 0


def test_the_tiny_twin_from_end_to_end(tmp_path):
    with jax.enable_x64(False):
        assert main(["run", "divergence_chain", "--tiny", "--id", "one", "--runs-folder", str(tmp_path)]) == 0
    folder = RunFolder(tmp_path / "divergence_chain" / "one")
    summary = json.loads(folder.summary.read_text())
    assert summary["identity_largest_error"] < 1e-12 < 1e-3 < summary["gradient_errors"]["one_step"]["chain"]
    assert summary["bound_smallest_margin"] > 0
    assert "Whose gradient it is" in folder.report.read_text()


def test_figures_of_the_errata_are_those_of_the_kept_run():
    """Errata F8.5 and F8.6."""
    text = " ".join((ROOT / "docs" / "errata.md").read_text().split())
    kept = read_json(RESULTS / "divergence_chain.json")["summary"]

    def shares(arm, advantages="current"):
        return "{:.0%}, {:.0%} and {:.0%}".format(
            *(kept["equal_drift"][advantages][arm][family]["share"] for family in RANDOM)
        ).replace("%", "")

    assert f"in {shares('multi_step')} % of" in text
    assert f"old policy in {shares('multi_step', 'old')} %" in text
    assert f"with it {shares('full_entropy')} %" in text
    errors = kept["gradient_errors"]
    assert f"by {errors['truncated']['chains']:.0%} in random chains, without any future by".replace("%", " %") in text
    assert f"without any future by {errors['one_step']['chains']:.0%}".replace("%", " %") in text
    ratios = [kept["same_coefficient"]["current"][family]["drift_ratio"] for family in FAMILIES]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.035
    assert f"advantages of the old policy {shares('full_entropy', 'old')} %" in text
    above = [100 * kept["equal_drift"]["current"]["multi_step"][family]["gain_above"] for family in RANDOM]
    assert "by {:.1f}, {:.1f} and {:.1f} % of the return gained".format(*above) in text
    old = kept["same_coefficient"]["old"]
    chain = old["chain"]
    assert f"{chain['drift_ratio']:.2f} times as far on the chain" in text
    assert f"{old['chains']['drift_ratio']:.2f} in random ones" in text
    assert f"({old['sparse']['drift_ratio']:.2f} and {old['dense']['drift_ratio']:.2f})" in text
    assert chain["gain"]["multi_step"] < chain["gain"]["one_step"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"states": 2}, "--states is 2; it must be at least 3"),
        ({"worlds": 1}, "--worlds is 1; it must be at least 2"),
        ({"discount": 1.0}, "--discount is 1.0; it must be above 0 and at most 0.98"),
        ({"drift": 1.0}, "--drift is 1.0; it must be above 0 and below 1"),
        ({"reuses": 1}, "--reuses is 1; it must be at least 2"),
        ({"coefficient": 0.0}, "--coefficient is 0.0; it must be at least 0.01"),
    ],
)
def test_settings_that_cannot_be(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        study.parts(dataclasses.replace(study.SETTINGS, **changed))
