"""Batches that are written down before they are learned: the same again, or sampled anew where they are damaged."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrl_llm.rollouts.collect import CollectError
from jaxrl_llm.rollouts.collect import KeptCollector
from jaxrl_llm.rollouts.collect import Store

KEY = jax.random.key(0)


def same(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one.trajectories), jax.tree.leaves(other.trajectories), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert list(one.per_row) == list(other.per_row)
    np.testing.assert_array_equal(one.per_row["own"], other.per_row["own"])
    for name in ("metrics", "samples", "texts", "cursor"):
        assert getattr(one, name) == getattr(other, name), name


def test_a_batch_is_read_instead_of_sampled_again(counting, at_version, tmp_path) -> None:
    inner = counting()
    kept = KeptCollector(inner, Store(tmp_path))
    assert kept.shape == inner.shape
    first = kept.collect(at_version(0), KEY, 0, {})
    second = kept.collect(at_version(1), KEY, 1, first.cursor)
    again = KeptCollector(inner, Store(tmp_path)).collect(at_version(7), KEY, 1, {})
    same(again, second)
    assert inner.calls == [(0, 1, 0), (1, 2, 1)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "experience.json").unlink(),
        lambda folder: (folder / "experience.json").write_text("{"),
        lambda folder: (folder / "experience.json").write_text("[]"),
        lambda folder: (folder / "experience.json").write_text('{"per_row": 3}'),
        lambda folder: (folder / "arrays.safetensors").write_bytes((folder / "arrays.safetensors").read_bytes()[:-1]),
        lambda folder: (folder / "episodes.jsonl").unlink(),
        lambda folder: [path.unlink() for path in folder.iterdir()],
        lambda folder: (folder / "experience.json").rename(folder / "experience.draft"),
    ],
)
def test_a_damaged_or_half_batch_is_sampled_again_and_replaced(damage, counting, at_version, tmp_path) -> None:
    inner = counting()
    kept = KeptCollector(inner, Store(tmp_path))
    before = kept.collect(at_version(0), KEY, 0, {})
    damage(tmp_path / "0")
    same(kept.collect(at_version(0), KEY, 0, {}), before)
    same(kept.collect(at_version(0), KEY, 0, {}), before)
    assert len(inner.calls) == 2, "sampled once more, and kept"


def test_batches_of_other_sizes_are_sampled_again(counting, at_version, tmp_path) -> None:
    KeptCollector(counting(rows=4), Store(tmp_path)).collect(at_version(0), KEY, 0, {})
    larger = counting(rows=6)
    assert KeptCollector(larger, Store(tmp_path)).collect(at_version(0), KEY, 0, {}).trajectories.tokens.shape[0] == 6
    assert larger.calls


def test_what_is_forgotten_is_gone_and_the_rest_stays(counting, at_version, tmp_path) -> None:
    store, collector = Store(tmp_path), counting()
    store.forget(3)  # of a folder that is not there
    for step in range(12):
        store.save(step, collector.collect(at_version(0), KEY, step, {}))
    (tmp_path / "notes").mkdir()
    store.forget(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "notes"]
    assert store.load(9) is None
    assert store.load(10) is not None


def test_what_cannot_be_kept_is_one_sentence(counting, at_version, tmp_path) -> None:
    experience = counting().collect(at_version(0), KEY, 4, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(CollectError, match=r"The batch of step 5 cannot be kept in .*file"):
        Store(tmp_path / "file").save(4, experience)
    broken = dataclasses.replace(experience, cursor={"number": np.int64(3)})
    with pytest.raises(CollectError, match="not JSON serializable"):
        Store(tmp_path).save(4, broken)
    assert Store(tmp_path).load(4) is None


def test_numbers_of_rows_come_back_exactly(counting, at_version, tmp_path) -> None:
    """A mean over float32 is another one than over float64, so metrics take every column in float64."""
    store, experience = Store(tmp_path), counting(rows=6).collect(at_version(0), KEY, 0, {})
    store.save(0, experience)
    loaded = store.load(0)
    assert loaded is not None
    column, again = (np.asarray(each.per_row["own"]) for each in (experience, loaded))
    assert column.astype(np.float64).mean() == again.mean()
    assert column.mean() != again.mean()
    assert json.loads((tmp_path / "0" / "experience.json").read_text())["step"] == 0
