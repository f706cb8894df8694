"""Episodes of many turns: the log-probs of every turn, what the world answered, whose turn it was; they are learned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.collect import AgentCollector
from jaxrl_llm.rollouts.collect import ExpertCollector
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.rollouts.collect.protocol import check_experience
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import make_collector
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.trajectory import Actions

WORLD = Rooms(2, 2, extra=0, turns=24)
TRAIN, MEASURE = split_panels(WORLD)
TOKENIZER = ByteTokenizer()


def favours_actions() -> Transformer:
    """A tiny policy that says an action of the world nearly always, so that episodes come to their end too."""
    model = Transformer(tiny(vocab_size=TOKENIZER.vocab_size), rngs=nnx.Rngs(0))
    ids = np.array([TOKENIZER.encode(action)[0] for action in WORLD.actions])
    embedding = np.array(model.embedding[...])
    # Tied: the states of random weights have a mean along which these columns stand out.
    states = model(jnp.asarray(TOKENIZER.encode("kAdD|B->"))[None])[0]
    direction = np.asarray(states.mean(0))
    embedding[ids] += 6 * direction / (direction @ direction)
    model.embedding[...] = jnp.asarray(embedding)
    return model


@pytest.fixture(scope="module")
def played():
    """(model, collector, its first batch)."""
    model = favours_actions()
    collector = AgentCollector(WORLD, TRAIN, model, TOKENIZER, seed=0, tasks=6, group_size=8, samples=2)
    policy = PolicySnapshot(*nnx.split(model), 3)
    return policy, collector, collector.collect(policy, jax.random.key(0), 0, {})


def test_episodes_keep_every_rule_and_differ(played) -> None:
    _, collector, experience = played
    check_experience(experience, collector.shape, vocab_size=TOKENIZER.vocab_size, name="agents")
    t = experience.trajectories
    assert t.ended.any()
    assert not t.ended.all()
    assert 0 < experience.per_row["world/solved"].mean() < 1
    assert 0 < experience.per_row["world/refused"].mean() < 1
    assert set(np.unique(t.versions)) == {-1, 3}
    np.testing.assert_array_equal(t.group_ids, np.repeat(np.arange(6), 8))
    json.dumps(experience.samples)


def test_every_row_is_the_walk_of_its_actions(played) -> None:
    _, collector, experience = played
    t, tasks = experience.trajectories, np.repeat(collector.tasks(0), 8)
    actions = Actions.of(t, width=WORLD.turns)
    steps, rewards = actions.take(t.step_ids, fill=-1), actions.take(t.rewards)
    state, prompt = WORLD.reset(jnp.asarray(tasks))
    rows = [[ord(WORLD.symbols[symbol]) for symbol in row] for row in np.asarray(prompt)]
    done = np.zeros(len(tasks), bool)
    for turn in range(WORLD.turns):
        letters = [chr(token) if token < 256 else "?" for token in actions.take(t.tokens)[:, turn]]
        chosen = [WORLD.actions.index(one) if one in WORLD.actions else -1 for one in letters]
        state, answer = WORLD.step(state, jnp.asarray(chosen))
        np.testing.assert_array_equal(actions.mask[:, turn], ~done)
        np.testing.assert_array_equal(steps[:, turn], np.where(done, -1, turn))
        np.testing.assert_array_equal(rewards[:, turn], np.where(done, 0, answer.reward))
        for row in np.flatnonzero(~done):
            rows[row].append(int(actions.take(t.tokens)[row, turn]))
            if not answer.done[row] and turn + 1 < WORLD.turns:
                rows[row] += [ord(WORLD.symbols[symbol]) for symbol in np.asarray(answer.observation[row])]
        done |= np.asarray(answer.done)
    np.testing.assert_array_equal(t.ended, done)
    assert [t.tokens[row][t.token_mask[row]].tolist() for row in range(len(rows))] == rows


def test_the_log_probs_of_every_turn_are_those_of_one_pass(played) -> None:
    """The cache was kept through all turns: observations were read in it at their own places."""
    policy, _, experience = played
    t, model = experience.trajectories, policy.model()
    logits = model.logits(model(jnp.asarray(t.tokens), jnp.asarray(t.token_mask)))[:, :-1]
    found = np.asarray(categorical.log_prob(logits, jnp.asarray(t.tokens)[:, 1:]))
    actions = Actions.of(t)
    expected = np.take_along_axis(found, np.maximum(actions.columns - 1, 0), axis=1)
    recorded = actions.take(t.log_prob_behaviour)
    np.testing.assert_allclose(recorded, np.where(actions.mask, expected, 0), atol=2e-4)
    # Turns later than the first have log-probs that one place further would not give.
    shifted = np.take_along_axis(found, np.minimum(actions.columns, found.shape[1] - 1), axis=1)
    assert np.abs(np.where(actions.mask, shifted - recorded, 0)).max() > 0.5
    assert not np.asarray(t.log_prob_behaviour)[~np.asarray(t.action_mask)].any()


def test_a_batch_is_the_same_again_and_other_with_another_step(played) -> None:
    policy, collector, experience = played
    again = collector.collect(policy, jax.random.key(0), 0, {})
    for one, other in zip(*map(jax.tree.leaves, (again.trajectories, experience.trajectories)), strict=True):
        np.testing.assert_array_equal(one, other)
    other = collector.collect(policy, jax.random.key(0), 1, {})
    assert (other.trajectories.tokens != experience.trajectories.tokens).any()
    assert not np.isin(collector.tasks(5), MEASURE.seeds).any()


def test_greedy_episodes_of_a_group_are_one() -> None:
    model = favours_actions()
    greedy = SamplingSettings(temperature=0)
    collector = AgentCollector(WORLD, MEASURE, model, TOKENIZER, seed=0, tasks=2, group_size=3, sampling=greedy)
    tokens = collector.collect(PolicySnapshot(*nnx.split(model), 0), jax.random.key(0), 0, {}).trajectories.tokens
    np.testing.assert_array_equal(tokens.reshape(2, 3, -1), np.repeat(tokens[::3, None], 3, axis=1))


def test_the_expert_solves_every_task_and_nobody_sampled_it() -> None:
    collector = ExpertCollector(WORLD, TRAIN, TOKENIZER, seed=0, tasks=9, samples=1)
    policy: PolicySnapshot = None  # type: ignore[assignment]  # nobody's weights are needed
    experience = collector.collect(policy, jax.random.key(0), 2, {})
    check_experience(experience, collector.shape, vocab_size=TOKENIZER.vocab_size, name="expert")
    t, tasks = experience.trajectories, collector.tasks(2)
    assert t.log_prob_behaviour is None
    assert t.ended.all()
    np.testing.assert_array_equal(t.returns, 1)
    np.testing.assert_array_equal(experience.per_row["world/turns"], WORLD.solution_length[tasks])
    assert experience.samples[0]["text"].endswith("o")


def test_what_does_not_fit_is_refused() -> None:
    model = Transformer(tiny(vocab_size=TOKENIZER.vocab_size), rngs=nnx.Rngs(0))
    sizes = {"seed": 0, "tasks": 2, "group_size": 2}
    with pytest.raises(ValueError, match=r"the panel is of rooms-2x3-2-0; the world is rooms-2x2-0-0\."):
        AgentCollector(WORLD, split_panels(Rooms(2, 3))[0], model, TOKENIZER, **sizes)
    long = Rooms(2, 2, extra=0, turns=5000)
    collector = AgentCollector(long, split_panels(long)[0], model, TOKENIZER, **sizes)
    with pytest.raises(ValueError, match="has up to 20005 tokens; the model has"):
        collector.collect(PolicySnapshot(*nnx.split(model), 0), jax.random.key(0), 0, {})

    class Words(ByteTokenizer):
        def encode(self, text, **options):
            return [*super().encode(text, **options), 0]

    with pytest.raises(ValueError, match="the tokenizer writes 'k' of rooms-2x2-0-0 as 2 tokens; it must be one"):
        AgentCollector(WORLD, TRAIN, model, Words(), **sizes)


def test_a_collector_at_another_temperature_than_the_run_is_refused(tiny_run, tmp_path) -> None:
    model = Transformer(tiny(vocab_size=TOKENIZER.vocab_size), rngs=nnx.Rngs(0))
    sizes = {"seed": 0, "tasks": 2, "group_size": 2}
    for temperature in (0.5, 1.0):
        sampling = SamplingSettings(temperature=temperature)
        collector = AgentCollector(WORLD, TRAIN, model, TOKENIZER, sampling=sampling, **sizes)
        parts = tiny_run.make_parts("grpo", task=None, model=model, collector=collector)
        if temperature == 1:
            assert make_collector(parts, tiny_run.SETTINGS, tmp_path).law.known
            continue
        with pytest.raises(
            ValueError, match=r"samples at temperature 0.5, and sampling.temperature of the settings is 1"
        ):
            make_collector(parts, tiny_run.SETTINGS, tmp_path)
    truncated = AgentCollector(WORLD, TRAIN, model, TOKENIZER, sampling=SamplingSettings(top_k=5), **sizes)
    assert not truncated.law.known


def test_it_trains_and_goes_on_bit_for_bit(tiny_run, tmp_path) -> None:
    # Masked by exact divergences, of which an episode has one per action.
    empg = dataclasses.replace(get_recipe("empg"), mask="maximum", mask_maximum=0.05)

    def run(folder, steps):
        model = favours_actions()
        collector = AgentCollector(WORLD, TRAIN, model, TOKENIZER, seed=0, tasks=4, group_size=4)
        parts = tiny_run.make_parts(empg, task=None, model=model, collector=collector)
        update = UpdateSettings(minibatches=2)
        settings = dataclasses.replace(tiny_run.SETTINGS, steps=steps, prompts=4, group_size=4, update=update)
        return train(parts, settings, folder, allow_changed_settings=True)

    whole = run(tmp_path / "whole", 3)
    assert int(whole.state.updates) > 0
    run(tmp_path / "parts", 2)
    assert state_hash(run(tmp_path / "parts", 3).state) == state_hash(whole.state)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"world/solved", "world/turns", "world/refused", "actor/acceptance"} <= set(rows[0])
    # The world's tokens cancel in every ratio: the bounds are those of the policy's actions.
    assert rows[0]["bounds/unified_printed"] >= rows[0]["bounds/unified_sharp"] > 0
