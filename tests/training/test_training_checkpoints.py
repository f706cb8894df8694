"""Checkpoints: bit-exact round trip, old ones dropped, failures named and harmless."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.training.run.checkpoints import Checkpoints
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.checkpoints import flatten_settings
from jaxrl_llm.training.run.checkpoints import refuse_changed_settings
from jaxrl_llm.training.run.errors import ChangedSettingsError
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.optimizer import OptimizerSettings
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.run.state import state_hash


def make_state(seed: int = 0, width: int = 3) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "a": jax.random.normal(keys[0], (width, 2)),
        "layers": [{"b.c": jax.random.normal(keys[1], (4,), jnp.bfloat16)}],
    }
    return TrainState.create(params, optax.adamw(0.1), seed)


def progress(step: int) -> Progress:
    return Progress(
        step=step,
        settings={"steps": 3},
        frozen_hash="f",
        file_bytes={"metrics.jsonl": 10 * step},
        cursor={"replaced": [[1, 2]]},
    )


def test_round_trip_is_bit_exact_and_keeps_the_newest(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.restore(make_state()) is None
    for step in (1, 2, 3):
        checkpoints.save(make_state(seed=step), progress(step))
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [2, 3]

    again = Checkpoints(tmp_path, keep=2)
    restored = again.restore(make_state(seed=9))
    assert restored is not None
    assert state_hash(restored[0]) == state_hash(make_state(seed=3)) != state_hash(make_state(seed=2))
    assert restored[1] == progress(3)
    assert again.latest() == tmp_path / "3"


def test_the_hash_sees_one_bit_a_name_and_a_dtype():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.int32)}
    others = [
        {"a": jnp.zeros(3).at[1].set(-0.0), "b": jnp.zeros((), jnp.int32)},
        {"c": jnp.zeros(3), "b": jnp.zeros((), jnp.int32)},
        {"a": jnp.zeros(3, jnp.int32), "b": jnp.zeros((), jnp.int32)},
        {"a": jnp.zeros((3, 1)), "b": jnp.zeros((), jnp.int32)},
    ]
    hashes = {state_hash(item) for item in [tree, *others]}
    assert len(hashes) == 5
    assert state_hash(jax.tree.map(jnp.copy, tree)) == state_hash(tree)


def test_an_incomplete_checkpoint_is_ignored_and_removed(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), progress(1))
    checkpoints.save(make_state(2), progress(2))
    # What a process killed in the middle of a save leaves: the temporary name, with part of the content.
    incomplete = next(iter(sorted(tmp_path.glob("2")))).rename(tmp_path / "3.orbax-checkpoint-tmp")
    (incomplete / "_CHECKPOINT_METADATA").unlink()
    again = Checkpoints(tmp_path)
    restored = again.restore(make_state())
    assert restored is not None
    assert restored[1].step == 1
    assert [folder.name for folder in tmp_path.iterdir()] == ["1"]


def test_other_arrays_than_the_model_has_are_named(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(), progress(1))
    with pytest.raises(TrainingError, match=r"(?s)holds other arrays.*params\.a: .*\(3, 2\).* -> .*\(5, 2\)"):
        Checkpoints(tmp_path).restore(make_state(width=5))


def test_changed_settings_are_refused_with_the_difference():
    saved = flatten_settings({"optimizer": OptimizerSettings(), "steps": 3, "old": 1})
    current = flatten_settings({"optimizer": OptimizerSettings(learning_rate=1.0), "steps": 3})
    refuse_changed_settings(saved, dict(saved))
    with pytest.raises(
        ChangedSettingsError,
        match=r"(?s)old: 1 -> '\(by default, or absent\)'\n  optimizer\.learning_rate: 3e-05 -> 1\.0\n",
    ):
        refuse_changed_settings(saved, current)


def test_models_are_told_apart_by_what_they_were_before_there_were_experts():
    """The fields of the first saved runs, and no other where a model has none of the later parts."""
    first = "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size rope_theta norm_eps"
    first += " tie_embeddings max_positions qkv_bias qk_norm rope_scaling"
    assert set(flatten_settings({"config": tiny()})) == {f"config.{name}" for name in first.split()}
    experts = ExpertsConfig(count=4, chosen=2, width=8)
    assert flatten_settings({"config": tiny(experts=experts)})["config.experts.count"] == 4


def test_a_field_that_came_later_changes_no_run_that_was_saved_before_it():
    later = {"optimizer.optimizer", "optimizer.momentum", "optimizer.decay_steps"}
    assert not later & set(flatten_settings({"optimizer": OptimizerSettings()}))
    before = flatten_settings({"optimizer": OptimizerSettings()})
    with pytest.raises(
        ChangedSettingsError, match=r"optimizer\.optimizer: '\(by default, or absent\)' -> 'muon'\nResume"
    ):
        refuse_changed_settings(before, flatten_settings({"optimizer": OptimizerSettings(optimizer="muon")}))


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^Cannot write checkpoints to .*file: (File exists|Not a directory)\.$"):
        Checkpoints(tmp_path / "file")


FILE_LIMIT = 200_000


def save_under_a_file_size_limit(folder: str) -> None:
    """Run in a process of its own: one save fits, the next does not, because the system refuses larger files."""
    checkpoints = Checkpoints(Path(folder), keep=3)
    checkpoints.save(make_state(1), progress(1))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
    try:
        checkpoints.save(make_state(2, width=FILE_LIMIT), progress(2))
    except StorageError as error:
        print(error, end="")


def test_a_disk_that_takes_no_more_is_one_sentence_and_keeps_the_last_checkpoint(tmp_path: Path):
    code = f"import runpy; runpy.run_path({__file__!r})['save_under_a_file_size_limit']({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    assert done.stdout.startswith(f"Cannot write checkpoint {tmp_path / '2'} (")
    assert done.stdout.endswith(f"; the last good one is {tmp_path / '1'}.")
    assert "\n" not in done.stdout
    restored = Checkpoints(tmp_path, keep=3).restore(make_state())
    assert restored is not None
    assert state_hash(restored[0]) == state_hash(make_state(1))
