"""Batches sampled ahead in a thread: their order, whose weights, whose errors, and where a stopped run goes on."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from jaxrl_llm.rollouts.collect import AheadCollector
from jaxrl_llm.rollouts.collect import CollectError
from jaxrl_llm.rollouts.collect import EngineSampler
from jaxrl_llm.rollouts.collect import KeptCollector
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import Store
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train

KEY = jax.random.key(0)


def drained(ahead: AheadCollector, at_version, steps: int):
    cursor, found = {}, []
    for step in range(steps):
        found.append(ahead.collect(at_version(step), KEY, step, cursor))
        cursor = found[-1].cursor
    ahead.close()
    return found


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_batches_follow_each_other_as_they_do_without_it(count, counting, at_version) -> None:
    inner = counting()
    found = drained(AheadCollector(inner, ahead=count, last_step=4), at_version, 5)
    assert [(step, number) for step, number, _ in inner.calls] == [(step, step + 1) for step in range(5)]
    assert [batch.cursor["number"] for batch in found] == [1, 2, 3, 4, 5]
    # A batch is up to `count` updates old, and its tokens say so.
    versions = [int(np.asarray(batch.trajectories.versions).max()) for batch in found]
    assert versions == [max(0, step - count) for step in range(5)]
    assert all(0 <= batch.metrics["perf/ahead_saved"] <= 1 for batch in found)


def test_nothing_beyond_the_last_step_is_sampled(counting, at_version) -> None:
    inner = counting()
    ahead = AheadCollector(inner, ahead=3, last_step=1)
    drained(ahead, at_version, 2)
    assert [step for step, *_ in inner.calls] == [0, 1]


def test_the_policy_and_the_key_are_read_as_they_were(counting, at_version) -> None:
    """The update takes the buffers over while the thread still samples."""
    seen, may_go = [], threading.Event()

    class Slow(counting):
        def collect(self, policy, key, step, cursor):
            if step == 1:
                assert may_go.wait(20)
            drawn = int(jax.random.randint(jax.random.fold_in(key, step), (), 0, 1 << 30))
            seen.append((np.asarray(jax.tree.leaves(policy.state)[0]).tolist(), drawn))
            return super().collect(policy, key, step, cursor)

    ahead = AheadCollector(Slow(), ahead=1, last_step=1)
    policy, key = at_version(5), jax.random.key(7)
    expected = [int(jax.random.randint(jax.random.fold_in(key, step), (), 0, 1 << 30)) for step in range(2)]
    first = ahead.collect(policy, key, 0, {})
    for leaf in jax.tree.leaves((policy.state, key)):
        leaf.delete()
    may_go.set()
    ahead.collect(at_version(6), KEY, 1, first.cursor)
    ahead.close()
    assert seen == [([5, 5], drawn) for drawn in expected]


def test_what_fails_in_the_thread_reaches_the_caller_and_can_be_asked_again(counting, at_version) -> None:
    broken = [True]

    class Failing(counting):
        def collect(self, policy, key, step, cursor):
            if step == 1 and broken[0]:
                raise CollectError("the engine is down")
            return super().collect(policy, key, step, cursor)

    inner = Failing()
    ahead = AheadCollector(inner, ahead=2, last_step=3)
    first = ahead.collect(at_version(0), KEY, 0, {})
    with pytest.raises(CollectError, match="the engine is down"):
        ahead.collect(at_version(1), KEY, 1, first.cursor)
    broken[0] = False
    second = ahead.collect(at_version(1), KEY, 1, first.cursor)
    third = ahead.collect(at_version(1), KEY, 2, second.cursor)
    ahead.close()
    assert [batch.cursor["number"] for batch in (first, second, third)] == [1, 2, 3]


def test_closing_drops_what_was_not_begun(counting, at_version) -> None:
    class Slow(counting):
        def collect(self, policy, key, step, cursor):
            time.sleep(0.05)
            return super().collect(policy, key, step, cursor)

    inner = Slow()
    ahead = AheadCollector(inner, ahead=30, last_step=100)
    ahead.collect(at_version(0), KEY, 0, {})
    ahead.close()
    assert len(inner.calls) <= 3
    assert not any(thread.name.startswith("sampling-ahead") for thread in threading.enumerate())


def test_kept_batches_are_taken_again_where_a_run_goes_on(counting, at_version, tmp_path) -> None:
    inner = counting()
    found = drained(AheadCollector(KeptCollector(inner, Store(tmp_path)), ahead=2, last_step=5), at_version, 4)
    calls = len(inner.calls)
    ahead = AheadCollector(KeptCollector(inner, Store(tmp_path)), ahead=2, last_step=5)
    again = ahead.collect(at_version(9), KEY, 2, found[1].cursor)
    assert again.trajectories.versions.max() == found[2].trajectories.versions.max() == 0
    np.testing.assert_array_equal(again.trajectories.tokens, found[2].trajectories.tokens)
    assert again.cursor == found[2].cursor
    ahead.close()
    assert len(inner.calls) <= calls + 1


def with_engine(tiny_run, **changes):
    """The tiny run whose answers another engine samples: the built-in one, with weights of its own."""
    parts = tiny_run.make_parts("dapo")
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=5, checkpoint_every=2, **changes)
    engine_settings = EngineSettings(
        max_new_tokens=settings.response_length,
        group_size=settings.group_size,
        eos_ids=parts.tokenizer.eos_ids,
        pad_id=parts.tokenizer.pad_id,
    )
    engine = JaxEngine(parts.model, engine_settings)
    return dataclasses.replace(parts, sampler=EngineSampler(engine, Law(known=True))), settings


def test_a_run_with_an_engine_that_samples_ahead(tiny_run, tmp_path) -> None:
    outcome = train(*with_engine(tiny_run, ahead=2), tmp_path / "ahead")
    rows = [json.loads(line) for line in (tmp_path / "ahead/metrics.jsonl").read_text().splitlines()]
    # Four minibatches a step: the first three batches are of the first weights.
    assert [row["rollout/staleness"] for row in rows] == [0, 4, 8, 8, 8]
    assert "perf/ahead_saved" not in rows[0]
    timings = [json.loads(line) for line in (tmp_path / "ahead/timings.jsonl").read_text().splitlines()]
    assert all("perf/ahead_saved" in row for row in timings)
    assert int(outcome.state.updates) == 20
    # Without it the engine has the newest weights, and samples what the built-in sampler does.
    own = train(*with_engine(tiny_run), tmp_path / "engine")
    parts, settings = with_engine(tiny_run)
    built_in = train(dataclasses.replace(parts, sampler=None), settings, tmp_path / "built_in")
    assert state_hash(own.state) == state_hash(built_in.state)
