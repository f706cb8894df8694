"""Agents trained with all seeds in one program: what it measures is what the parts say, and arms are paired."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import empg_agents
from experiments.agents import scan as scans
from experiments.agents.settings import arms
from experiments.agents.settings import keys
from experiments.agents.settings import sizes_of
from experiments.agents.settings import trainer
from jaxrl_llm import categorical
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.rollouts.play import as_trajectories
from jaxrl_llm.trajectory import check_trajectory

TINY = dataclasses.replace(empg_agents.TINY, imitation_steps=40)


@pytest.fixture(scope="module")
def started():
    """(trainer, policies after imitation, key of training)."""
    start_key, train_key = keys(TINY)
    panels = split_panels(TINY.world)
    # Two of the arms: each is compiled with all others.
    some = [arms()[name] for name in ("dapo_plain", "dapo_all_groups")]
    scan = scans.AgentScan(TINY.world, panels, some, sizes_of(TINY))
    policies, measured = scan.start(TINY.seeds, start_key)
    assert np.asarray(measured["solved"]).shape == (2, len(panels[1].seeds))
    return scan, policies, train_key


@pytest.fixture(scope="module")
def batch(started):
    """A batch of the first seed: (episodes, turns, logits of its contexts)."""
    scan, policies, key = started
    state = jax.tree.map(lambda leaf: leaf[0], policies)

    @jax.jit
    def play(state):
        prompt, turns = scan._train_play(state, jnp.arange(2), key, 0, jnp.arange(2))
        episodes = scan._episodes(prompt, turns)
        return prompt, turns, episodes, scan._logits(state, episodes.rows)

    return play(state)


def test_contexts_are_those_that_the_actions_were_drawn_in(batch) -> None:
    _, turns, episodes, logits = batch
    scored = np.where(episodes.mask, categorical.log_prob(logits, episodes.tokens), 0)
    assert episodes.mask.any()
    np.testing.assert_allclose(scored, turns.log_probs.T, atol=2e-5)


def test_rows_under_jit_are_those_of_the_host(batch) -> None:
    prompt, turns, episodes, _ = batch
    prompt, turns = jax.device_get((prompt, turns))
    host = as_trajectories(prompt, turns, group_ids=np.arange(8) // 4, version=0, recorded=False)
    check_trajectory(host)
    for name, column in vars(host).items():
        if column is not None:
            np.testing.assert_array_equal(column, getattr(episodes.rows, name), err_msg=name)


def test_every_arm_differs_from_the_plain_one_and_from_the_others(batch) -> None:
    _, turns, episodes, logits = batch
    # One solved episode in each group, so that there is something to modulate.
    rewards = turns.rewards.at[:].set(0).at[0, ::4].set(1.0)
    inputs = scans._signal_inputs(episodes, turns._replace(rewards=rewards), logits)
    found = {name: np.asarray(scans._signal_of(recipe)(inputs)) for name, recipe in arms().items()}
    dapo = {name: values for name, values in found.items() if name.startswith("dapo")}
    np.testing.assert_array_equal(found["grpo_empg"], found["dapo_empg"])
    # Where every group differs, all groups are those that differ.
    np.testing.assert_array_equal(dapo.pop("dapo_all_groups"), dapo["dapo_empg"])
    names = list(dapo)
    for number, name in enumerate(names):
        for other in names[:number]:
            assert np.abs(dapo[name] - dapo[other]).max() > 1e-3, (name, other)
    plain = advantages_of(arms()["dapo_plain"], inputs)[:, None]
    np.testing.assert_allclose(dapo["dapo_plain"], np.where(episodes.mask, plain, 0))


def test_arms_begin_alike_and_part_ways(started) -> None:
    scan, policies, key = started
    plain, empg = (jax.device_get(scan.train(name, policies, key)) for name in ("dapo_plain", "dapo_all_groups"))
    for name in ("reward", "entropy", "turns"):
        np.testing.assert_array_equal(plain[name][:, 0, 0], empg[name][:, 0, 0])
    assert np.abs(plain["entropy"] - empg["entropy"]).max() > 1e-4
    # The mean of the advantages after centring, and the bonus that the last step does not get.
    np.testing.assert_allclose(empg["scaled_mean"], 0, atol=1e-5)
    # Where nothing was solved there is no advantage, and the bonus pushes last steps down.
    nothing = plain["reward"][:, 0, 0] == 0
    assert nothing.any()
    assert (plain["last_step"][nothing, 0, 0] == 0).all()
    assert (empg["last_step"][nothing, 0, 0] < 0).all()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="--tasks is 99; a batch has a task at most once, and rooms-2x2-0-0 has"):
        trainer(dataclasses.replace(TINY, tasks=99))
    with pytest.raises(ValueError, match="--width is 24; it must be a multiple of 16"):
        trainer(dataclasses.replace(TINY, width=24))
    with pytest.raises(ValueError, match="turns is 2; the longest task of this map takes"):
        trainer(dataclasses.replace(TINY, turns=2))
