"""Episodes of text: actions and answers of any length, the cache kept, every token read once; they are learned."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.collect import CollectError
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.rollouts.collect import TextAgentCollector
from jaxrl_llm.rollouts.collect import TextExpertCollector
from jaxrl_llm.rollouts.collect.protocol import check_experience
from jaxrl_llm.rollouts.text_play import play_texts
from jaxrl_llm.rollouts.text_turns import TextTurns
from jaxrl_llm.rollouts.wording import Wording
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.trajectory import Actions
from tests.rollouts.collect.stairs import Climb
from tests.rollouts.collect.stairs import Stairs

WORLD = Stairs()
TRAIN, MEASURE = split_panels(WORLD)
TOKENIZER = ByteTokenizer()
WORDING = Wording(opening="A house.\n")
SIZES = {"seed": 0, "tasks": 5, "group_size": 4, "width": 72, "action_tokens": 4, "wording": WORDING}


def favours_walking(layers: int = 2) -> Transformer:
    """A tiny policy that writes letters of an action or its end nearly always, in lengths that differ."""
    model = Transformer(tiny(vocab_size=TOKENIZER.vocab_size, num_layers=layers), rngs=nnx.Rngs(0))
    embedding = np.array(model.embedding[...])
    # Tied: the states of random weights have a mean along which these columns stand out.
    states = model(jnp.asarray(TOKENIZER.encode("attic? cellar\n> uud\ngallery\n> "))[None])[0]
    direction = np.asarray(states.mean(0))
    for letter, weight in {"u": 25.0, "d": 24.0, "\n": 25.0, "x": 23.0}.items():
        embedding[ord(letter)] += weight * direction / (direction @ direction)
    model.embedding[...] = jnp.asarray(embedding)
    return model


def snapshot(model: Transformer, version: int = 3) -> PolicySnapshot:
    return PolicySnapshot(*nnx.split(model), version)


@pytest.fixture(scope="module")
def played():
    """(policy, collector, its first batch)."""
    model = favours_walking()
    collector = TextAgentCollector(WORLD, TRAIN, model, TOKENIZER, samples=2, **SIZES)
    return snapshot(model), collector, collector.collect(snapshot(model), jax.random.key(0), 0, {})


def log_probs_of_one_pass(model: Transformer, t, temperature: float = 1.0) -> np.ndarray:
    """Of the chosen tokens, [B, R], by a pass over whole texts that are padded on the left."""
    count = np.asarray(t.token_mask).sum(axis=1)
    move = np.asarray(t.tokens).shape[1] - count
    tokens, mask = (np.stack([*map(np.roll, x, move)]) for x in (t.tokens, t.token_mask))
    logits = model.logits(model(jnp.asarray(tokens), jnp.asarray(mask)))[:, :-1] / temperature
    found = np.asarray(categorical.log_prob(logits, jnp.asarray(tokens)[:, 1:]))
    actions = Actions.of(t)
    places = np.where(actions.mask, actions.columns + move[:, None] - 1, 0)
    return np.where(actions.mask, np.take_along_axis(found, places, axis=1), 0)


def test_episodes_keep_every_rule_and_differ(played) -> None:
    _, collector, experience = played
    check_experience(experience, collector.shape, vocab_size=TOKENIZER.vocab_size, name="agents")
    t, numbers = experience.trajectories, experience.per_row
    assert 0 < t.ended.mean() < 1
    assert 0 < numbers["world/cut_off"].mean() < 1
    assert 0 < numbers["world/refused"].mean() < 1
    assert len(np.unique(numbers["world/turns"])) > 2
    assert len(np.unique(numbers["world/tokens"])) > 5
    np.testing.assert_array_equal(numbers["world/tokens"], t.token_mask.sum(axis=1))
    assert set(np.unique(t.versions)) == {-1, 3}
    np.testing.assert_array_equal(t.group_ids, np.repeat(np.arange(5), 4))
    assert 0 < experience.metrics["perf/world_share"] < 1
    json.dumps(experience.samples)
    assert experience.samples[1]["prompt"].startswith("A house.\n")
    assert all(episode.closed for episode in WORLD.begun)


def test_every_row_is_the_walk_of_its_actions(played) -> None:
    _, collector, experience = played
    t, tasks = experience.trajectories, np.repeat(collector.tasks(0), 4)
    for row, task in enumerate(tasks):
        episode, step, refused, done, reply = WORLD.reset(int(task)), 0, 0, False, None
        tokens = [*b"A house.\n", *episode.prompt.encode(), *b"\n> "]
        rewards, steps = [0.0] * len(tokens), [-1] * len(tokens)
        while step < WORLD.turns:
            action = t.tokens[row][t.step_ids[row] == step].tolist()
            ends = action[-1] in (*b"\n", TOKENIZER.eos_id)
            assert ends or len(action) == 4
            assert not {*b"\n", TOKENIZER.eos_id} & set(action[:-1])
            reply = episode.step(bytes(token for token in action if token < 256).decode(errors="replace").strip())
            refused, step, done = refused + (not reply.valid), step + 1, reply.done
            tokens, rewards = tokens + action, rewards + [0.0] * (len(action) - 1) + [reply.reward]
            steps += [step - 1] * len(action)
            shown = [*b"\n"] * (not ends) + [*reply.text.encode(), *b"\n> "]
            if done or step == WORLD.turns or len(tokens) + len(shown) + 4 > 72:
                break
            tokens, rewards, steps = tokens + shown, rewards + [0.0] * len(shown), steps + [-1] * len(shown)
        count = len(tokens)
        assert t.tokens[row, :count].tolist() == tokens
        assert t.token_mask[row].sum() == count
        assert t.step_ids[row, :count].tolist() == steps
        assert t.rewards[row, :count].tolist() == rewards
        assert t.ended[row] == done
        assert experience.per_row["world/cut_off"][row] == (not done and step < WORLD.turns)
        assert experience.per_row["world/turns"][row] == step
        assert experience.per_row["world/refused"][row] == refused / step


def test_the_log_probs_of_every_turn_are_those_of_one_pass(played) -> None:
    """Cache and places are right through all turns: of prompts, of rows, of answers, each of its own length."""
    policy, _, experience = played
    t = experience.trajectories
    expected, actions = log_probs_of_one_pass(policy.model(), t), Actions.of(t)
    np.testing.assert_allclose(actions.take(t.log_prob_behaviour), expected, atol=2e-4)
    assert np.std(expected[actions.mask]) > 0.5
    assert not t.log_prob_behaviour[~t.action_mask].any()
    # A row's later turns depend on its earlier ones: another answer of the world gives other log-probs.
    tokens = np.array(t.tokens)
    tokens[t.token_mask & ~t.action_mask & (tokens == ord(" "))] = ord("_")
    other = log_probs_of_one_pass(policy.model(), dataclasses.replace(t, tokens=tokens))
    assert np.abs(other - expected).max() > 0.05


def test_adapters_a_temperature_and_an_opening_of_nothing(monkeypatch) -> None:
    """Answers are read in several chunks here, too."""
    adapted = add_lora(favours_walking(1), LoraSettings(rank=2), rngs=nnx.Rngs(3))
    for path, parameter in nnx.to_flat_state(nnx.state(adapted)):
        if path[-1] == "b":
            parameter[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), parameter.shape)
    monkeypatch.setattr("jaxrl_llm.rollouts.text_turns.LARGEST_CHUNK", 8)
    sampling = SamplingSettings(temperature=0.7)
    changes = {"wording": Wording(), "sampling": sampling, "tasks": 3}
    collector = TextAgentCollector(WORLD, TRAIN, adapted, TOKENIZER, **SIZES | changes)
    experience = collector.collect(snapshot(adapted), jax.random.key(1), 0, {})
    t = experience.trajectories
    expected = log_probs_of_one_pass(adapted, t, 0.7)
    np.testing.assert_allclose(Actions.of(t).take(t.log_prob_behaviour), expected, atol=2e-4)
    plain = log_probs_of_one_pass(favours_walking(1), t, 0.7)
    assert np.abs(plain - expected).max() > 0.01
    assert experience.metrics["world/recomputed"] == 0


def test_every_token_is_read_once_and_a_second_time_would_be_counted(played, monkeypatch) -> None:
    policy, collector, experience = played
    assert experience.metrics["world/recomputed"] == 0
    read, again = TextTurns.read, []

    def reads_twice(self, session, rows):
        again.append(sum(map(len, rows)))
        return read(self, read(self, session, rows), rows)

    monkeypatch.setattr(TextTurns, "read", reads_twice)
    found = collector.collect(policy, jax.random.key(0), 0, {})
    assert found.metrics["world/recomputed"] == sum(again) > 0


def test_an_episode_is_the_same_alone_as_in_a_batch(played) -> None:
    policy, collector, experience = played
    t, stage = experience.trajectories, collector.stage
    options = {"group_size": 1, "slots": 72 - len(stage.script.opening), "action_tokens": 4, "pad_id": 0}
    alone = TextTurns(
        policy.model(),
        opening=stage.script.opening,
        sampling=SamplingSettings(),
        end_ids=stage.script.end_ids,
        **options,
    )
    key, seeds = jax.random.fold_in(jax.random.key(0), 0), collector.tasks(0)
    task, sample = 3, 2
    index = (jnp.array([task]), jnp.array([sample]))
    (told,) = play_texts(stage, alone, policy.state, seeds[[task]], key, 0, *index).episodes
    row = 4 * task + sample
    assert told.tokens == t.tokens[row][t.token_mask[row]].tolist()
    np.testing.assert_allclose(told.log_probs, t.log_prob_behaviour[row][t.token_mask[row]], atol=1e-4)


def test_a_batch_is_the_same_again_and_other_with_another_key(played) -> None:
    policy, collector, experience = played
    again = collector.collect(policy, jax.random.key(0), 0, {})
    for one, other in zip(*map(jax.tree.leaves, (again.trajectories, experience.trajectories)), strict=True):
        np.testing.assert_array_equal(one, other)
    other = collector.collect(policy, jax.random.key(1), 0, {})
    assert (other.trajectories.tokens != experience.trajectories.tokens).any()
    assert not np.isin(collector.tasks(5), MEASURE.seeds).any()


def test_the_expert_says_what_the_policy_would_have_read_and_said(played) -> None:
    _, agent, acted = played
    sizes = {name: value for name, value in SIZES.items() if name != "group_size"} | {"action_tokens": 5}
    collector = TextExpertCollector(WORLD, TRAIN, TOKENIZER, samples=1, **sizes)
    policy: PolicySnapshot = None  # type: ignore[assignment]  # nobody's weights are needed
    experience = collector.collect(policy, jax.random.key(0), 0, {})
    check_experience(experience, collector.shape, vocab_size=TOKENIZER.vocab_size, name="expert")
    t = experience.trajectories
    assert t.log_prob_behaviour is None
    assert t.ended.all()
    np.testing.assert_array_equal(t.returns, 1)
    np.testing.assert_array_equal(agent.tasks(0), collector.tasks(0))
    for row, task in enumerate(collector.tasks(0)):
        start, goal = WORLD.pairs[task]
        text = "u" * (goal - start) + "d" * (start - goal) + "\n"
        assert bytes(t.tokens[row][t.action_mask[row]].tolist()).decode() == text
        first = int(np.argmax(t.action_mask[row]))
        np.testing.assert_array_equal(t.tokens[row, :first], acted.trajectories.tokens[4 * row, :first])
        assert not t.action_mask[row, first + len(text) :].any()
    assert experience.samples[0]["reward"] == 1


def test_what_does_not_fit_is_refused() -> None:
    model = Transformer(tiny(vocab_size=TOKENIZER.vocab_size), rngs=nnx.Rngs(0))

    def make(world=WORLD, panel=TRAIN, tokenizer=TOKENIZER, **changes):
        return TextAgentCollector(world, panel, model, tokenizer, **SIZES | changes)

    with pytest.raises(ValueError, match=r"the panel is of stairs-5-3; the world is stairs-5-4\."):
        make(panel=split_panels(Stairs(3))[0])
    with pytest.raises(ValueError, match=r"the panel of stairs-5-4 has no tasks"):
        make(panel=Panel(WORLD.name, np.array([], int)))
    empty = Stairs()
    empty.tasks = 0
    with pytest.raises(ValueError, match=r"stairs-5-4 has 0 tasks and 4 turns; it must have one of each\."):
        make(world=empty)
    with pytest.raises(ValueError, match=r"writes 'end', which ends an action, as 3 tokens; it must be one\."):
        make(wording=Wording(end="end"))
    with pytest.raises(ValueError, match=r"asks is ''; it must have a token"):
        make(wording=Wording(asks=""))
    with pytest.raises(ValueError, match=r"width is 72 tokens; an opening of 9 and an action of up to 63"):
        make(action_tokens=63)
    with pytest.raises(ValueError, match=r"action_tokens is 0; it must be at least 1"):
        make(action_tokens=0)
    with pytest.raises(ValueError, match=r"width is 500; the model has 256 positions\."):
        make(width=500)
    with pytest.raises(
        ValueError, match=r"the prompt of task \d+ of stairs-5-4 has \d+ tokens; with an action of up to 4"
    ):
        make(width=25).collect(snapshot(model), jax.random.key(0), 0, {})
    twofold = Stairs()
    reset = twofold.reset

    def begins_otherwise(seed):
        episode = reset(seed)
        episode.prompt += "!" * len(twofold.begun)
        return episode

    twofold.reset = begins_otherwise
    with pytest.raises(ValueError, match=r"task \d+ of stairs-5-4 begins in two ways"):
        make(world=twofold).collect(snapshot(model), jax.random.key(0), 0, {})
    assert all(episode.closed for episode in twofold.begun)


def test_an_episode_that_hangs_is_dropped_and_the_others_go_on(monkeypatch) -> None:
    """Its return is NaN, which the trainer drops and counts."""
    model, hung = favours_walking(), []
    collector = TextAgentCollector(Stairs(), TRAIN, model, TOKENIZER, **SIZES)
    step = Climb.step

    def hangs(self, action):
        if not hung:
            hung.append(self)
            time.sleep(5)
        return step(self, action)

    monkeypatch.setattr(Climb, "step", hangs)
    collector.stage.seconds = 0.2
    experience = collector.collect(snapshot(model), jax.random.key(0), 0, {})
    t = experience.trajectories
    assert experience.metrics["world/dropped"] == 1 / len(t.returns)
    assert np.isnan(t.returns[0])
    assert np.isfinite(t.returns[1:]).all()
    assert experience.per_row["world/turns"][0] == 1
    assert not t.ended[0]
    check_experience(experience, collector.shape, vocab_size=TOKENIZER.vocab_size, name="text agents")

    monkeypatch.setattr(Climb, "step", lambda self, action: time.sleep(5))
    collector.stage.seconds = 0.02
    with pytest.raises(CollectError, match="stairs-5-4 took too long in every episode"):
        collector.collect(snapshot(model), jax.random.key(0), 0, {})
    sizes = {name: value for name, value in SIZES.items() if name != "group_size"} | {"action_tokens": 5}
    expert = TextExpertCollector(Stairs(), TRAIN, TOKENIZER, **sizes)
    expert.stage.seconds = 0.02
    with pytest.raises(CollectError, match=r"the expert of stairs-5-4 in task \d+ took longer than 0.02 s"):
        expert.collect(None, None, 0, {})  # type: ignore[arg-type]

    def never_begins(seed):
        time.sleep(5)

    collector.stage.world.reset = never_begins
    with pytest.raises(CollectError, match=r"task \d+ of stairs-5-4 did not begin within 0.02 s"):
        collector.collect(snapshot(model), jax.random.key(0), 0, {})


def test_an_expert_that_cannot_be_learned_is_refused(monkeypatch) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "group_size"}
    collector = TextExpertCollector(WORLD, Panel(WORLD.name, np.array([3])), TOKENIZER, **sizes)

    def collect(expert=None):
        if expert is not None:
            monkeypatch.setattr("tests.rollouts.collect.stairs.Climb.expert", expert)
        return collector.collect(None, None, 0, {})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"says 'uuuu' in task 3, 5 tokens with its end; action_tokens is 4"):
        collect()
    with pytest.raises(ValueError, match=r"the expert of stairs-5-4 knows no action in turn 1 of task 3"):
        collect(lambda self: None)
    with pytest.raises(ValueError, match=r"the action 'u\\nd' becomes tokens that say"):
        collect(lambda self: "u\nd")


def test_it_learns_from_the_expert_and_then_by_itself(tiny_run, tmp_path) -> None:
    world = Stairs(turns=3)
    learn, _ = split_panels(world)
    sizes = {"seed": 0, "tasks": 8, "width": 96, "action_tokens": 5, "wording": WORDING}
    expert = TextExpertCollector(world, learn, TOKENIZER, **sizes)
    parts = tiny_run.make_parts("grpo", task=None, collector=expert, objective="nll")
    one = dataclasses.replace(tiny_run.SETTINGS, steps=30, prompts=8, group_size=1, update=UpdateSettings())
    warm = train(parts, one, tmp_path / "warm")
    lines = [json.loads(line) for line in (tmp_path / "warm" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["actor/loss"] < 0.5 * lines[0]["actor/loss"]
    assert lines[0]["world/solved"] == 1

    def run(folder, steps):
        model = nnx.merge(nnx.graphdef(parts.model), jax.tree.map(jnp.copy, warm.model_state))
        agent = TextAgentCollector(world, learn, model, TOKENIZER, group_size=4, **sizes)
        own = tiny_run.make_parts("grpo", task=None, model=model, collector=agent)
        settings = dataclasses.replace(one, steps=steps, group_size=4, update=UpdateSettings(minibatches=2))
        return train(own, settings, folder, allow_changed_settings=True)

    whole = run(tmp_path / "whole", 2)
    assert int(whole.state.updates) > 0
    run(tmp_path / "parts", 1)
    assert state_hash(run(tmp_path / "parts", 2).state) == state_hash(whole.state)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"world/solved", "world/turns", "world/refused", "world/cut_off", "world/dropped", "world/tokens"} <= set(
        rows[0]
    )
    assert all(row["world/recomputed"] == 0 for row in rows)
    # The trainer scores what was sampled at the same weights: the sampler and it agree.
    assert all(row["rollout_corr/log_ratio_abs_max"] < 2e-4 for row in rows)
    timings = [json.loads(line) for line in (tmp_path / "whole" / "timings.jsonl").read_text().splitlines()]
    assert 0 < timings[0]["perf/world_share"] < 1
