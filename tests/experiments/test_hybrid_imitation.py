"""Imitation plus reward in Rooms: fields against enumeration in float64, where they vanish, what the report says."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import hybrid_imitation_rl as study
from experiments.cli import main
from experiments.hybrid.arms import ARMS
from experiments.hybrid.arms import Field
from experiments.hybrid.arms import scheduled
from experiments.hybrid.exact import distance
from experiments.hybrid.exact import field_loss
from experiments.hybrid.exact import stationary
from experiments.hybrid.exact import worth
from experiments.hybrid.numbers import difference
from experiments.hybrid.settings import EXACT
from experiments.hybrid.settings import RESTING
from experiments.hybrid.settings import parts
from experiments.hybrid.train import sampled_loss
from experiments.hybrid.variance import ESTIMATORS
from experiments.hybrid.world import Episodes
from experiments.hybrid.world import Task
from experiments.hybrid.world import make_tasks
from experiments.hybrid.world import play
from experiments.run_folder import RunFolder
from jaxrl_llm import categorical
from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.tabular import TabularMdp

STATES, ACTIONS, LAMBDA = 3, 2, 1.5
STEPS = (0, 25, 50, 99)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn(horizon):
    """A student, and a task with random moves and rewards on every step, whose last state is the end."""
    rng = np.random.default_rng(horizon)
    moves = rng.dirichlet(np.ones(STATES), size=(horizon, STATES, ACTIONS))
    rewards = rng.uniform(size=(horizon, STATES, ACTIONS))
    moves[:, -1], rewards[:, -1] = np.eye(STATES)[-1], 0.0
    mdp = TabularMdp(jnp.asarray(moves), jnp.asarray(rewards), jnp.array([0.6, 0.4, 0.0]))
    student, teacher = (jnp.asarray(rng.normal(size=rewards.shape)) for _ in range(2))
    return student, Task(mdp, teacher, jnp.array([True, True, False]))


def every_episode(policy, task):
    """All sequences of states and actions with their probabilities."""
    horizon = policy.shape[0]
    pairs = list(itertools.product(itertools.product(range(STATES), range(ACTIONS)), repeat=horizon))
    states, actions = np.moveaxis(np.array(pairs), 2, 0)
    law, steps = np.asarray(jax.nn.softmax(policy)), np.arange(horizon)
    chances = np.asarray(task.mdp.initial)[states[:, 0]] * law[steps, states, actions].prod(1)
    moves = np.asarray(task.mdp.transitions)[steps[:-1], states[:, :-1], actions[:, :-1], states[:, 1:]]
    rewards = np.asarray(task.mdp.rewards)[steps, states, actions]
    met = Episodes(*(jnp.asarray(x) for x in (states, actions, rewards, np.asarray(task.running)[states])))
    return jnp.asarray(chances * moves.prod(1)), met


def by_hand(policy, task, *, discount=1.0, sign=1.0):
    """E sum_t [grad k_t + G_t grad log pi_t], G_t written out; `sign` is that of the later divergences."""
    chances, met = every_episode(policy, task)
    steps = jnp.arange(policy.shape[0])

    def at(moving):
        return jnp.take_along_axis(categorical.log_probs(moving)[steps, met.states], met.actions[..., None], 2)[..., 0]

    log_ratio = jnp.where(met.mask, at(policy) - at(task.teacher), 0.0)
    horizon, terms = policy.shape[0], []
    for t in range(horizon):
        later = sum((discount ** (u - t) * log_ratio[:, u] for u in range(t + 1, horizon)), jnp.zeros(len(chances)))
        earned = sum(discount ** (u - t) * met.rewards[:, u] for u in range(t, horizon))
        terms.append(sign * later - LAMBDA * earned)

    def loss(moving):
        kl = categorical.kl(moving, task.teacher)[steps, met.states]
        return jnp.sum(chances[:, None] * met.mask * (kl + jnp.stack(terms, 1) * at(moving)))

    return jax.grad(loss)(policy)


def objective(policy, task):
    return worth(policy, task).objective(LAMBDA)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_exact_field_is_what_enumeration_says(discount):
    policy, task = drawn(3)
    field = Field(LAMBDA, discount=discount)
    found = jax.grad(field_loss)(policy, field, task)
    np.testing.assert_allclose(found, by_hand(policy, task, discount=discount), atol=1e-13)
    if discount == 1:
        np.testing.assert_allclose(found, jax.grad(objective)(policy, task), atol=1e-13)
        for wrong in (by_hand(policy, task, sign=-1.0), by_hand(policy, task, discount=0.5)):
            assert np.abs(found - wrong).max() > 1e-2
        for wrong in (field._replace(future=0.0), field._replace(reward_weight=-LAMBDA), field._replace(own=1.0)):
            assert np.abs(found - jax.grad(field_loss)(policy, wrong, task)).max() > 1e-2


def averaged(policy, field, task, chances, groups):
    """The mean over groups of episodes of the gradient of the sampled loss."""

    def loss(moving):
        losses = jax.vmap(lambda met: sampled_loss(moving, field, task, met, met))(groups)
        return jnp.sum(chances * losses)

    return jax.grad(loss)(policy)


@pytest.mark.parametrize("name", ["rl", "kl_loss", "hybrid_0.5", "hybrid", "rao_blackwell", "reinforce"])
def test_estimates_have_the_exact_field_as_their_mean(name):
    policy, task = drawn(3)
    field = ARMS[name].field._replace(step_baseline=0.0, reward_weight=LAMBDA)
    chances, met = every_episode(policy, task)
    groups = jax.tree.map(lambda leaf: leaf[:, None], met)
    expected = jax.grad(field_loss)(policy, field, task)
    np.testing.assert_allclose(averaged(policy, field, task, chances, groups), expected, atol=1e-13)
    assert np.abs(expected).max() > 1e-2


def test_baselines_of_the_group_change_no_mean():
    policy, task = drawn(2)
    chances, met = every_episode(policy, task)
    one, two = (x.ravel() for x in np.indices((len(chances), len(chances))))
    groups = jax.tree.map(lambda leaf: jnp.stack([leaf[one], leaf[two]], 1), met)
    exact = jax.grad(objective)(policy, task)
    for name, (_, field) in ESTIMATORS.items():
        found = averaged(policy, field._replace(reward_weight=LAMBDA), task, chances[one] * chances[two], groups)
        assert (np.abs(found - exact).max() < 1e-13) == (name.split("_")[0] in ("reinforce", "hybrid", "rao")), name


def test_imitation_offline_is_the_forward_kl_on_the_teachers_states():
    policy, task = drawn(3)
    field = ARMS["offline"].field
    chances, met = every_episode(task.teacher, task)
    groups = jax.tree.map(lambda leaf: leaf[:, None], met)
    found = jax.grad(field_loss)(policy, field, task)
    np.testing.assert_allclose(found, averaged(policy, field, task, chances, groups), atol=1e-13)
    np.testing.assert_allclose(jax.grad(field_loss)(task.teacher, field, task), 0.0, atol=1e-13)


@pytest.mark.parametrize("name", RESTING)
def test_fields_vanish_where_backward_induction_says(name):
    _, task = drawn(7)
    field = ARMS[name].field._replace(reward_weight=LAMBDA)
    rests, best = stationary(field, task), stationary(Field(LAMBDA), task)
    np.testing.assert_allclose(jax.grad(field_loss)(rests, field, task), 0.0, atol=1e-14)
    away = distance(rests, best, task)
    np.testing.assert_allclose(away, objective(rests, task) - objective(best, task), atol=1e-13)
    if name != "hybrid":
        assert float(away) > 1e-3
        assert np.abs(jax.grad(objective)(rests, task)).max() > 1e-3


def test_the_optimum_is_the_teacher_tilted_by_the_reward_in_rooms():
    rooms = Rooms(rows=2, columns=2, extra=1, turns=8)
    tasks = make_tasks(rooms, count=2, sharpness=2.0, wrong=0.3, seed=1)
    optimum = jax.vmap(stationary, in_axes=(None, 0))(Field(4.0), tasks)
    earned = jax.vmap(worth)(tasks.teacher, tasks).reward
    found = jax.vmap(worth)(optimum, tasks).objective(4.0)
    np.testing.assert_allclose(found, -np.log(1 - earned + earned * np.exp(4.0)), rtol=1e-6)
    assert np.all((earned > 0.01) & (earned < 0.99))
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    met = play(task.teacher, task, jax.random.key(0), episodes=4000)
    assert abs(float(met.rewards.sum(1).mean()) - float(earned[0])) < 4 * 0.5 / 4000**0.5
    assert not np.any(np.asarray(met.mask)[np.asarray(met.rewards).cumsum(1) - met.rewards > 0])  # over once rewarded


def test_schedules_end_at_the_weight_of_the_arm():
    def weights(schedule):
        fields = (scheduled(Field(4.0), jnp.asarray(schedule), jnp.asarray(step), updates=100) for step in STEPS)
        return [float(field.reward_weight) for field in fields]

    np.testing.assert_allclose(weights(0), [4, 4, 4, 4])
    np.testing.assert_allclose(weights(1), [0, 2, 4, 4])
    np.testing.assert_allclose(weights(2), [0, 2, 4, 4], atol=1e-12)
    np.testing.assert_allclose(weights(3), [0.2, 0.2 * 20**0.5, 4, 4])


def synthetic(settings):
    """Parts of a run that was not made."""
    rng = np.random.default_rng(0)
    table = (len(RESTING), len(settings.weights) + 1)
    results = {"resting": {name: rng.uniform(0.2, 0.9, table) for name in ("kl", "reward", "distance")}}
    results["resting"] |= {f"{who}_{what}": np.array(0.3) for who in ("teacher", "start") for what in ("kl", "reward")}
    results["resting"]["best"] = np.array(-9.0)
    for kind, names, seeds in (("exact", EXACT, 1), ("sampled", ARMS, settings.seeds)):
        for name in names:
            shape = (seeds, settings.updates + 1)
            results[f"{kind}_{name}"] = {"kl": rng.uniform(1, 2, shape), "reward": rng.uniform(0, 1, shape)}
    rows = (len(settings.points) + 1, len(ESTIMATORS))
    names = ("variance", "bias", "distance", "along", "along_error", "norm")
    results["variance"] = {name: rng.uniform(0.5, 2, rows) for name in names}
    return results


def test_the_page_says_what_is_resolved():
    settings = dataclasses.replace(study.SETTINGS, updates=250)
    results = synthetic(settings)
    hybrid, other = results["sampled_hybrid"], results["sampled_kl_loss"]
    other |= {name: values.copy() for name, values in hybrid.items()}
    other["kl"] += 0.5 + 0.01 * np.arange(settings.seeds)[:, None]
    summary = study.EXPERIMENT.summarise(settings, results)
    np.testing.assert_allclose(summary["kl_loss_minus_hybrid"], 0.575)
    assert 0.5 < summary["kl_loss_minus_hybrid_low"] < 0.575
    page = study.EXPERIMENT.page(settings, results, summary)
    assert page.value == "+0.575"
    assert "not resolved" not in page.sentence
    rows = {row[0]: row for row in page.sections[1].table.rows}
    for name, arm in ARMS.items():
        resolved = difference(settings, results, name, "hybrid").resolved
        assert ("not resolved" in rows[arm.label][2]) == (not resolved and name != "hybrid")
    other["kl"] = hybrid["kl"] + np.where(np.arange(settings.seeds) % 2, 0.1, -0.1)[:, None]
    page = study.EXPERIMENT.page(settings, results, study.EXPERIMENT.summarise(settings, results))
    assert "paired: not resolved" in page.sentence
    for section in page.sections:
        assert all(len(row) == len(section.table.head) for row in section.table.rows)
        assert all(picture.svg.startswith("<?xml") for picture in section.pictures)


def test_the_tiny_twin_from_end_to_end(tmp_path):
    with jax.enable_x64(False):
        assert main(["run", "hybrid_imitation_rl", "--tiny", "--id", "one", "--runs-folder", str(tmp_path)]) == 0
    folder = RunFolder(tmp_path / "hybrid_imitation_rl" / "one")
    summary = json.loads(folder.summary.read_text())
    assert abs(summary["resting"]["hybrid"]["gap"]) < 1e-12 < 0.1 < summary["resting"]["kl_loss"]["gap"]
    # All arms start alike; the exact gradient and its estimates are in their first updates.
    assert summary["exact"]["hybrid"] < summary["exact"]["kl_loss"]
    assert 0.5 < summary["distance_range"][0] < 1 < summary["distance_range"][1] < 2
    assert "Where each gradient comes to rest" in folder.report.read_text()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seeds": 1}, "--seeds is 1; it must be at least 2"),
        ({"group_size": 1}, "--group-size is 1; it must be at least 2"),
        ({"reward_weight": 0.0}, "--reward-weight is 0.*; it must be above 0"),
        ({"tasks": 400}, "--tasks is 400; this map has 336"),
        ({"points": (300,)}, "--points has 300; it must be below --updates 300"),
        ({"weights": ()}, "--weights and --points need a number each"),
        ({"turns": 4}, "turns is 4; the longest task"),
    ],
)
def test_settings_that_cannot_be(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        parts(dataclasses.replace(study.SETTINGS, **changed))
