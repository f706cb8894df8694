"""A run's folder as a model again: the weights of a checkpoint bit for bit, and the sentences for what is missing."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrl_llm import load_run
from jaxrl_llm.models import merge_lora
from jaxrl_llm.models import trainable
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import load_hf
from jaxrl_llm.models.weights import save_hf
from jaxrl_llm.training import Checkpoints
from jaxrl_llm.training import Progress
from jaxrl_llm.training import StorageError
from jaxrl_llm.training import TrainingError
from jaxrl_llm.training import TrainState
from jaxrl_llm.training import split_policy
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.training.run.seals import write_seal
from jaxrl_llm.training.saved_run import write_model
from jaxrl_llm.training.text.policy import describe_model

TOKENS = jnp.arange(12).reshape(2, 6)


def logits(model: Transformer) -> np.ndarray:
    return np.asarray(model.logits(model(TOKENS, jnp.ones(TOKENS.shape, bool))))


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """A run of three steps that trains adapters, and its last model."""
    folder = tmp_path_factory.mktemp("saved")
    parts = tiny_run.make_parts(choice=trainable.lora(2, top=1), layers=2)
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=3, checkpoint_every=1)
    graphdef = nnx.graphdef(parts.model)
    write_model(folder, parts.model, parts.trainable, parts.tokenizer, source=None, seed=0)
    outcome = train(parts, settings, folder)
    return folder, nnx.merge(graphdef, outcome.model_state)


@pytest.fixture
def folder(trained, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_the_newest_checkpoint_is_the_trained_model_bit_for_bit(trained) -> None:
    folder, model = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = load_run(folder)
    assert run.step == 3
    assert run.settings["train.steps"] == 3
    assert run.tokenizer.encode("ab") == ByteTokenizer().encode("ab")
    np.testing.assert_array_equal(logits(run.model), logits(model))
    for found, expected in zip(*(jax.tree.leaves(nnx.state(one)) for one in (run.model, model)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_step_chooses_a_checkpoint_and_none_of_it_is_before_training(trained, tiny_run) -> None:
    folder, model = trained
    second, start = (load_run(folder, step=step) for step in (2, 0))
    fresh = tiny_run.make_parts(layers=2).model
    np.testing.assert_array_equal(logits(start.model), logits(fresh))
    assert (second.step, start.step) == (2, 0)
    assert np.abs(logits(second.model) - logits(model)).max() > 0
    assert np.abs(logits(second.model) - logits(fresh)).max() > 0
    with pytest.raises(StorageError, match=r"no checkpoint of step 1; there are those of 2, 3"):
        load_run(folder, step=1)


def test_settings_are_those_of_config_json_where_there_is_one(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"settings": {"task": "copy_digits"}}))
    assert load_run(folder, step=0).settings == {"task": "copy_digits"}


def test_a_model_from_a_folder_with_a_tokenizer_of_its_own(tiny_run, tmp_path: Path, monkeypatch) -> None:
    parts, tokenizer = tiny_run.make_parts(choice=trainable.top_layers(1), layers=2), ByteTokenizer()
    save_hf(parts.model, tmp_path / "weights", tokenizer=tokenizer)
    model = load_hf(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    write_model("run", model, parts.trainable, tokenizer, source="weights")
    monkeypatch.chdir("/")  # the path was written down whole
    run = load_run(tmp_path / "run", step=0)
    np.testing.assert_array_equal(logits(run.model), logits(parts.model))
    shutil.rmtree(tmp_path / "weights")
    model.embedding[...] = model.embedding[...] + 1e-3
    save_hf(model, tmp_path / "weights", tokenizer=tokenizer)
    with pytest.raises(StorageError, match=r"did not train differ from those it started from .*weights"):
        load_run(tmp_path / "run", step=0)
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(StorageError, match=r"cannot be made: .*weights does not exist"):
        load_run(tmp_path / "run", step=0)


def test_a_tokenizer_without_a_source_is_kept_in_the_folder(tiny_run, tmp_path: Path) -> None:
    parts, tokenizer = tiny_run.make_parts(layers=1), ByteTokenizer(specials=("<|new|>",))
    write_model(tmp_path, parts.model, parts.trainable, tokenizer, source=None, seed=0)
    assert load_run(tmp_path, step=0).tokenizer.encode("a<|new|>") == [97, 259]


def test_smollm2_is_taken_from_its_package_again(tmp_path: Path) -> None:
    """Its checkpoint is written without training: adapters of the top layer, moved by a hundredth."""
    choice = trainable.lora(2, top=1)
    model, tokenizer = smollm2_135m()
    model = choice.prepare(model, rngs=nnx.Rngs(0))
    write_model(tmp_path, model, choice, tokenizer, source="smollm2_135m")
    _, params, frozen = split_policy(model, choice)
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        state = TrainState.create(params, optax.sgd(0.1), seed=0)
        progress = Progress(
            step=7,
            settings={"recipe": "trm"},
            frozen_hash="",
            file_bytes={},
            model=describe_model(model, choice),
        )
        checkpoints.save(state, progress)
    run = load_run(tmp_path)
    assert (run.step, run.settings) == (7, {"recipe": "trm"})
    assert run.tokenizer.encode("Sum: 1 + 1 =") == tokenizer.encode("Sum: 1 + 1 =")
    learned, rest = choice.partition(nnx.state(run.model))
    assert (state_hash(learned), state_hash(rest)) == (state_hash(params), state_hash(frozen))


def test_adapters_are_still_beside_the_matrices(trained) -> None:
    model = load_run(trained[0]).model
    assert model.layers[1].mlp.up.low_rank is not None
    assert model.layers[0].mlp.up.low_rank is None
    np.testing.assert_allclose(logits(merge_lora(model)), logits(model), atol=1e-5)


def test_what_is_missing_or_damaged_is_said(folder: Path, tmp_path: Path) -> None:
    def refused(sentence: str, place: Path = folder, **step) -> None:
        with pytest.raises(StorageError, match=sentence):
            load_run(place, **step)

    (tmp_path / "empty").mkdir()
    refused("nowhere is not a folder", tmp_path / "nowhere")
    refused(r"empty has no model\.json; it is not the folder of a run", tmp_path / "empty")
    shutil.rmtree(folder / "checkpoints" / "3" / "state" / "d")
    refused(r"Checkpoint .*3 cannot be read: state/d/\w+ is missing; step=2 is sound\.")
    assert load_run(folder, step=2).step == 2
    described = json.loads((folder / "model.json").read_text())

    def rewrite(**changes) -> None:
        (folder / "model.json").write_text(json.dumps({**described, **changes}))

    rewrite(format=9)
    refused("has the format 9; this version reads 1")
    rewrite(trainable={"top": 2, "adapters": described["trainable"]["adapters"]})
    refused(r"Checkpoint .*2 holds other arrays than the model .* params\.layers\.0\.", step=2)
    rewrite(config={**described["config"], "num_heads": 3})
    refused("cannot be made: num_heads must be a multiple")
    rewrite(seed=1)
    refused("did not train differ from those it started from .random weights.")
    (folder / "model.json").write_text("{")
    refused("not valid JSON")
    (folder / "model.json").write_text('{"format": 1}')
    refused("lacks config, frozen_sha256")
    (folder / "model.json").write_text(json.dumps(described))
    shutil.rmtree(folder / "checkpoints")
    refused("has no complete checkpoint yet; step=0")
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        __import__("jaxrl_llm").load_runs  # noqa: B018


def without_model(folder: Path, step: int) -> None:
    """A checkpoint as versions wrote it that did not say which model it belongs to."""
    place = folder / "checkpoints" / str(step)
    about = json.loads((place / "progress" / "metadata").read_text())
    del about["model"]
    (place / "progress" / "metadata").write_text(json.dumps(about))
    (place / "seal.json").unlink()
    write_seal(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.rope_theta": 20_000.0}, r"config\.rope_theta: 10000\.0 -> 20000\.0"),
        ({"config.num_heads": 8, "config.head_dim": 4, "config.num_kv_heads": 4}, r"config\.head_dim: 8 -> 4; "),
        ({"config.norm_eps": 1e-3}, r"config\.norm_eps: 1e-05 -> 0\.001"),
        ({"trainable.adapters.alpha": 3.0}, r"trainable\.adapters\.alpha: \S+ -> 3\.0"),
        ({"compute_dtype": "bfloat16"}, r"compute_dtype: 'float32' -> 'bfloat16'"),
    ],
)
@pytest.mark.parametrize("step", [0, 3])
def test_another_model_of_the_same_arrays_is_refused(folder: Path, change, said: str, step: int) -> None:
    described = json.loads((folder / "model.json").read_text())
    for name, value in change.items():
        *way, last = name.split(".")
        part = described
        for word in way:
            part = part[word]
        assert last in part
        part[last] = value
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(StorageError, match=rf"describes another model than checkpoint .*3 was trained as: .*{said}"):
        load_run(folder, step=step)


def test_an_older_checkpoint_is_read_with_a_warning(folder: Path) -> None:
    without_model(folder, 3)
    with pytest.warns(UserWarning, match=r"3 does not say which model it belongs to"):
        assert load_run(folder).step == 3


def test_a_run_does_not_go_on_with_another_model_of_the_same_arrays(tiny_run, folder: Path) -> None:
    parts = tiny_run.make_parts(choice=trainable.lora(2, top=1), layers=2)
    other = dataclasses.replace(parts.model.config, rope_theta=20_000.0)
    model = Transformer(other, rngs=nnx.Rngs(0))
    model = parts.trainable.prepare(model, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(parts.model))
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=3, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"trained another model, .*rope_theta: 10000\.0 -> 20000\.0"):
        train(dataclasses.replace(parts, model=model), settings, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2**70}, "cannot be made: "),
        ({"seed": "x"}, "cannot be made: "),
        ({"param_dtype": "bfloat16"}, "holds other arrays than the model|did not train differ"),
        ({"param_dtype": "no"}, "cannot be made: "),
        ({"trainable": []}, "cannot be made: "),
        ({"config.intermediate_size": 2**31 - 1, "config.num_layers": 1000}, r"cannot be made: .* this machine has"),
        ({"config.head_dim": 2**30}, r"cannot be made: .* this machine has"),
        ({"config.rope_scaling": {"factor": []}}, "cannot be made: "),
    ],
)
def test_what_no_model_can_be_is_a_sentence(folder: Path, change, said: str) -> None:
    described = json.loads((folder / "model.json").read_text())
    for name, value in change.items():
        part, _, last = name.rpartition(".")
        (described[part] if part else described)[last] = value
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(StorageError, match=said):
        load_run(folder)


def test_arrays_of_another_dtype_are_refused(tiny_run, tmp_path: Path) -> None:
    parts = tiny_run.make_parts(layers=1)
    write_model(tmp_path, parts.model, parts.trainable, parts.tokenizer, source=None, seed=0)
    _, params, _ = split_policy(parts.model, parts.trainable)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        state = TrainState.create(params, optax.sgd(0.1), seed=0)
        checkpoints.save(state, Progress(step=1, settings={}, frozen_hash="", file_bytes={}))
    with pytest.raises(StorageError, match="holds other arrays than the model"):
        load_run(tmp_path)
