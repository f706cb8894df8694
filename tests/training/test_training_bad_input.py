"""What people pass by mistake: one sentence, before anything is spent, and nothing that was finished is lost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.dtypes import cast_model
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import DemonstrationCollector
from jaxrl_llm.rollouts.collect import EngineSampler
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect import KeptCollector
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import PreferenceCollector
from jaxrl_llm.rollouts.collect import Store
from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import TrainingError
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import make_collector
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.trajectory import single_step

TOKENIZER = ByteTokenizer()


def settings_of(tiny_run, **changes):
    update = UpdateSettings(minibatches=2, bounds_every=0)
    common = {"steps": 3, "prompts": 4, "group_size": 4, "update": update, "checkpoint_every": 10}
    return dataclasses.replace(tiny_run.SETTINGS, **common | changes)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reads_logits(batch):
    return batch.logits.sum()


def raises(batch):
    raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("objective", "kind", "sentence"),
    [
        (reads_logits, ValueError, "'reads_logits' reads batch.logits, which training never makes"),
        (raises, ValueError, "'raises' cannot be compiled; it says: no such thing"),
        (lambda batch: "loss", TypeError, "The objective '<lambda>': "),
        (lambda batch: batch.log_prob, TypeError, "The objective '<lambda>': "),
        (lambda batch: (batch.log_prob.sum(),), TypeError, "The objective '<lambda>': "),
        ("nil", ValueError, "objective is 'nil'; .*nll"),
    ],
)
def test_a_loss_that_is_none_is_refused_before_anything_is_sampled(objective, kind, sentence, tiny_run) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        tiny_run.make_trainer(tiny_run.make_parts(objective=objective), settings_of(tiny_run))
    assert len(str(caught.value).splitlines()) == 1


def test_a_loss_that_only_knows_the_small_batch_is_named(tiny_run, tmp_path) -> None:
    def for_eight_columns(batch):
        return (batch.log_prob * jnp.ones((12, 8))).sum(), 1.0

    parts = tiny_run.make_parts(objective=for_eight_columns)
    with pytest.raises(ValueError, match="The objective 'for_eight_columns' fails on a batch of"):
        train(parts, settings_of(tiny_run), tmp_path)


def test_parts_that_do_not_fit_each_other(tiny_run, tmp_path) -> None:
    settings = settings_of(tiny_run)
    with pytest.raises(ValueError, match="parts have neither a task nor a collector"):
        make_collector(tiny_run.make_parts(task=None), settings, tmp_path)
    with pytest.raises(ValueError, match="ahead is 2; the built-in sampler works on the devices that train"):
        make_collector(tiny_run.make_parts(), dataclasses.replace(settings, ahead=2), tmp_path)
    with pytest.raises(ValueError, match="ahead needs a sampler of its own"):
        make_collector(tiny_run.make_parts(collector=Bad()), dataclasses.replace(settings, ahead=2), tmp_path)
    larger = ByteTokenizer(("<|one|>", "<|two|>"))
    with pytest.raises(
        ValueError, match=r"the tokenizer has 261 tokens and the model 259; give the tokenizer that bel"
    ):
        tiny_run.make_trainer(tiny_run.make_parts(tokenizer=larger), settings)
    with pytest.raises(ValueError, match="the policy reads 256 positions and a row has up to 301"):
        tiny_run.make_trainer(tiny_run.make_parts(), dataclasses.replace(settings, prompt_length=300))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{d}>", "response": str(d)}) + "\n" for d in range(8)))
    return path


def test_demonstrations_are_learned_whatever_the_recipe_would_need(tiny_run, texts, tmp_path) -> None:
    collector = DemonstrationCollector(texts, TOKENIZER, rows=8, width=5)
    outcome = train(
        tiny_run.make_parts("trm", collector=collector, objective="nll", task=None), settings_of(tiny_run), tmp_path
    )
    assert outcome.finished
    losses = [row["actor/loss"] for row in rows_of(tmp_path)]
    assert losses[-1] < losses[0]


def test_recipes_that_need_who_sampled_are_refused_for_demonstrations(tiny_run, texts, tmp_path) -> None:
    def made(recipe):
        collector = DemonstrationCollector(texts, TOKENIZER, rows=8, width=5)
        return tiny_run.make_parts(recipe, collector=collector, task=None), settings_of(tiny_run)

    def evaluate(step, state):
        raise AssertionError("refused before anything is evaluated")

    corrected = dataclasses.replace(get_recipe("dapo"), correction="token_truncated")
    for recipe in ("trm", corrected):
        with pytest.raises(ValueError, match="reads the log-probs of the policy that sampled, which this experience"):
            train(*made(recipe), tmp_path, evaluate=evaluate)


def pairs_of(folder) -> PreferenceCollector:
    (folder / "pairs.jsonl").write_text('{"prompt": "1>", "chosen": "1", "rejected": "2"}\n' * 4)
    return PreferenceCollector(folder / "pairs.jsonl", TOKENIZER, pairs=4, width=5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_needs_rewards_is_refused_for_demonstrations(wrapped, tiny_run, texts, tmp_path) -> None:
    collector = DemonstrationCollector(texts, TOKENIZER, rows=8, width=5)
    if wrapped:
        collector = KeptCollector(collector, Store(tmp_path / "kept"))

    def refused(sentence, **doors):
        parts = tiny_run.make_parts("dapo", collector=collector, task=None, **doors)
        with pytest.raises(ValueError, match=sentence):
            make_collector(parts, settings_of(tiny_run), tmp_path)

    refused("the signal 'group_normalised' reads rewards, and demonstrations have none, so nothing would be learned")
    refused("the objective 'dpo' reads rewards", objective="dpo")

    def centred(x):
        return x.rewards - x.rewards.mean()

    def scaled(x):
        return x.rewards / (x.rewards.sum() + 1e-6)

    refused("the signal 'centred' reads rewards", signal=centred)
    refused("the signal 'scaled' reads rewards", signal=scaled)
    refused("the signal 'group_normalised' reads rewards", objective=lambda batch: -(batch.advantages.sum()))
    # One that reads none gives everybody's advantage, and is learned.
    fine = tiny_run.make_parts(
        "dapo", collector=collector, task=None, signal=lambda x: jnp.where(x.response_mask, 1.0, 0.0)
    )
    make_collector(fine, settings_of(tiny_run), tmp_path)


def test_what_nobody_sampled_is_learned_at_temperature_1(tiny_run, texts, tmp_path) -> None:
    warm = settings_of(tiny_run, sampling=SamplingSettings(temperature=0.5))
    demonstrations = DemonstrationCollector(texts, TOKENIZER, rows=8, width=5)
    for collector, objective in ((demonstrations, "nll"), (pairs_of(tmp_path), "dpo")):
        parts = tiny_run.make_parts(collector=collector, objective=objective, task=None)
        with pytest.raises(ValueError, match=r"sampling.temperature is 0.5; it belongs to sampling"):
            make_collector(parts, warm, tmp_path)
        make_collector(parts, settings_of(tiny_run), tmp_path)


@pytest.mark.parametrize("objective", ["nll", "distil_forward", "dpo", "ipo", "contrast"])
def test_the_sides_of_a_pair_are_told_apart(objective, tiny_run, tmp_path) -> None:
    def contrast(batch):
        sign = jnp.where(batch.rewards > 0, -1.0, 1.0)[:, None]
        return jnp.where(batch.response_mask, sign * batch.log_prob, 0.0).sum(), batch.response_mask.sum()

    given = contrast if objective == "contrast" else objective
    parts = tiny_run.make_parts(collector=pairs_of(tmp_path), objective=given, task=None)
    if objective in ("nll", "distil_forward"):
        with pytest.raises(ValueError, match=f"the objective '{objective}' learns both sides of a pair alike"):
            make_collector(parts, settings_of(tiny_run), tmp_path)
    else:
        make_collector(parts, settings_of(tiny_run), tmp_path)


class Said(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def say(self, message: str) -> None:
        self.sentences.append(message)


@pytest.mark.parametrize(
    ("recipe", "changes", "stale"),
    [
        ("dapo", {}, True),
        ("rloo", {}, True),
        ("dapo", {"denominator": "behaviour"}, False),
        ("rloo", {"denominator": "behaviour"}, True),
        ("dapo", {"correction": "token_truncated"}, False),
    ],
)
@pytest.mark.parametrize("replay", [1, 2])
def test_old_batches_without_a_ratio_to_their_sampler_are_said(recipe, changes, stale, replay, tiny_run, tmp_path):
    parts = tiny_run.make_parts(dataclasses.replace(get_recipe(recipe), **changes))
    said = Said()
    train(parts, settings_of(tiny_run, steps=1, replay=replay), tmp_path, reporter=said)
    found = [text for text in said.sentences if "has no ratio to the policy that sampled" in text]
    assert len(found) == (stale and replay > 1)


def test_a_loss_of_ones_own_has_the_ratio_where_it_reads_it(tiny_run, tmp_path) -> None:
    def off(batch):
        ratio = jnp.exp(batch.log_prob - batch.log_prob_behaviour)
        return -(ratio * batch.advantages * batch.response_mask).sum(), batch.response_mask.sum()

    def on(batch):
        return -(batch.log_prob * batch.advantages * batch.response_mask).sum(), batch.response_mask.sum()

    settings = settings_of(tiny_run, replay=2)
    assert tiny_run.make_trainer(tiny_run.make_parts(objective=off), settings)[0].stale is None
    assert "'on' has no ratio" in tiny_run.make_trainer(tiny_run.make_parts(objective=on), settings)[0].stale
    assert tiny_run.make_trainer(tiny_run.make_parts(objective="nll"), settings)[0].stale is None


def test_exact_masks_of_replayed_batches_are_refused_for_what_they_are(tiny_run, tmp_path) -> None:
    settings = dataclasses.replace(settings_of(tiny_run), replay=2)
    with pytest.raises(ValueError, match=r"masks by the exact KL.* or replayed; .* leave out ahead and replay"):
        train(tiny_run.make_parts("trm"), settings, tmp_path)


def test_files_without_anything_to_learn(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "1>", "response": "1"}\n{"prompt": "2>"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* has the keys \['prompt'\]; expected"):
        DemonstrationCollector(path, TOKENIZER, rows=2, width=5)
    pairs = [{"prompt": "1>", "chosen": "1", "rejected": "1"}, {"prompt": "2>", "chosen": "2", "rejected": "3"}]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = PreferenceCollector(path, TOKENIZER, pairs=2, width=5).collect(None, None, 0, {})
    assert found.metrics["preferences/equal"] >= 1
    assert set(found.texts) == {found.texts[0], found.texts[1]}
    path.write_text(json.dumps(pairs[0]) + "\n")
    with pytest.raises(ValueError, match="none of the 1 records can be used"):
        PreferenceCollector(path, TOKENIZER, pairs=2, width=5).collect(None, None, 0, {})


class Bad:
    """Rows of a prompt token and two chosen ones, until the step in which something is wrong with them."""

    def __init__(self, wrong=None, *, at: int = 0) -> None:
        self.shape, self.wrong, self.at = BatchShape(8, 4, 3, 2), wrong, at

    def collect(self, policy, key, step, cursor) -> Experience:
        tokens = np.asarray(jax.random.randint(jax.random.fold_in(key, step), (8, 3), 48, 58), np.int32)
        chosen = np.broadcast_to(np.arange(3) > 0, (8, 3)).copy()
        groups = np.arange(8, dtype=np.int32) // 4
        cursor = {"batches": cursor.get("batches", 0) + 1}
        if self.wrong is not None and step >= self.at:
            tokens, chosen, groups, cursor = self.wrong(tokens, chosen, groups, cursor)
        rows = len(tokens)
        trajectories = single_step(
            tokens,
            np.ones(tokens.shape, bool),
            chosen,
            group_ids=groups[:rows],
            outcomes=tokens[:, -1] / np.float32(58) * chosen.any(axis=1),
            ended=np.ones(rows, bool),
            log_prob_behaviour=np.where(chosen, np.float32(-5), np.float32(0)),
            version=policy.version,
        )
        return Experience(trajectories, cursor=cursor)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda t, c, g, n: (t[:4], c[:4], g, n), "Bad collected 4 rows of 3 tokens; it promised 8 of 3"),
        (lambda t, c, g, n: (t[:, :2], c[:, :2], g, n), "Bad collected 8 rows of 2 tokens; it promised 8 of 3"),
        (lambda t, c, g, n: (t, c, g[::-1] // 2 + np.arange(8, dtype=np.int32), n), "promised groups of 4 neighbours"),
        (lambda t, c, g, n: (t + 900, c, g, n), "Bad collected experience that cannot be: row 0 has a token outside"),
        (lambda t, c, g, n: (t, ~c, g, n), "has its first real token as an action"),
        (lambda t, c, g, n: (t, c & False, g, n), "rows in which the policy chose no token; it promised 1 to 2"),
        (lambda t, c, g, n: (t, c, g, {"batches": np.int64(1)}), "The cursor of Bad must be JSON"),
        (lambda t, c, g, n: {}["row"], "Step 3 failed, KeyError: 'row'"),
        (lambda t, c, g, n: t + None, "Step 3 failed, TypeError: unsupported operand"),
    ],
)
def test_a_collector_that_breaks_its_promise_loses_nothing(wrong, sentence, tiny_run, tmp_path) -> None:
    """Two steps are done, the third cannot be: it says so, and a mended collector goes on from there."""
    settings = settings_of(tiny_run, steps=3)

    def parts(collector):
        return tiny_run.make_parts(collector=collector, task=None)

    with pytest.raises(TrainingError, match=sentence) as caught:
        train(parts(Bad(wrong, at=2)), settings, tmp_path)
    place = tmp_path / "checkpoints" / "2"
    assert f"Everything up to step 2 is saved in {place}. Run the same command again to go on." in str(caught.value)
    assert place.is_dir()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    if "promised 8 of 3" in sentence:
        mended = train(parts(Bad()), settings, tmp_path)
        whole = train(parts(Bad()), settings, tmp_path.parent / f"{tmp_path.name}_whole")
        assert state_hash(mended.state) == state_hash(whole.state)
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_rows_without_a_chosen_token_are_only_empty(tiny_run, tmp_path) -> None:
    def some_empty(tokens, chosen, groups, cursor):
        chosen[[1, 4]] = False
        return tokens, chosen, groups, cursor

    outcome = train(tiny_run.make_parts(collector=Bad(some_empty), task=None), settings_of(tiny_run), tmp_path)
    assert outcome.finished
    for row in rows_of(tmp_path):
        assert all(np.isfinite(value) for value in row.values())
        assert row["response_length/min"] == 0


def test_a_signal_that_turns_out_not_finite_loses_nothing(tiny_run, tmp_path) -> None:
    def mine(x):
        return x.rewards - (jnp.nan if mine.broken else x.rewards.mean())

    mine.broken = False

    class Breaks(tiny_run.SayTheDigit):
        def train(self, seed, step, count):
            mine.broken = step == 1
            return super().train(seed, step, count)

    with pytest.raises(
        TrainingError, match=r"the signal 'mine' gave row 0 an advantage that is not finite .* saved in"
    ):
        train(tiny_run.make_parts(signal=mine, task=Breaks()), settings_of(tiny_run), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


def test_an_engine_that_dies_leaves_everything_finished(tiny_run, tmp_path) -> None:
    settings = settings_of(tiny_run, steps=4)

    class Dying(JaxEngine):
        alive = True

        def generate(self, *arguments, **options):
            if not self.alive and arguments[3] >= 2:
                raise EngineError("http://127.0.0.1:1 gave no usable answer in 5 attempts.")
            return super().generate(*arguments, **options)

    def parts():
        made = tiny_run.make_parts()
        engine_settings = EngineSettings(
            max_new_tokens=1, group_size=4, eos_ids=TOKENIZER.eos_ids, pad_id=TOKENIZER.pad_id
        )
        engine = Dying(made.model, engine_settings)
        return dataclasses.replace(made, sampler=EngineSampler(engine, Law(known=True))), engine

    made, engine = parts()
    engine.alive = False
    with pytest.raises(
        TrainingError, match=r"127\.0\.0\.1:1 gave no usable answer .* Everything up to step 2 is saved"
    ):
        train(made, settings, tmp_path / "cut")
    resumed = train(parts()[0], settings, tmp_path / "cut")
    whole = train(parts()[0], settings, tmp_path / "whole")
    assert state_hash(resumed.state) == state_hash(whole.state)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["ppo", "distil_reverse"])
def test_bfloat16_trains(name, tiny_run, texts, tmp_path) -> None:
    changes = {}
    if name != "ppo":
        changes = {"objective": name, "collector": DemonstrationCollector(texts, TOKENIZER, rows=8, width=5)}
    parts = tiny_run.make_parts("ppo" if name == "ppo" else "dapo", **changes)
    parts = dataclasses.replace(parts, model=cast_model(parts.model, jnp.bfloat16))
    train(parts, settings_of(tiny_run, steps=2), tmp_path)
    for row in rows_of(tmp_path):
        assert all(np.isfinite(value) for value in row.values())


def test_episodes_are_written_when_they_are_due_whether_or_not_bounds_are(tiny_run, tmp_path) -> None:
    train(tiny_run.make_parts(), settings_of(tiny_run, steps=4, episodes_every=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "episodes").iterdir()) == ["2", "4"]
    assert not any(name.startswith("shift/") for row in rows_of(tmp_path) for name in row)
