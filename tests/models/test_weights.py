"""Checkpoints written and read back, and the sentences that damaged ones give."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.files import ABANDONED_AFTER
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import cache_folder
from jaxrl_llm.models.files import whole_file
from jaxrl_llm.models.files import whole_folder
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.hf_config import config_to_hf
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.sharding import make_mesh
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.weights import build_model
from jaxrl_llm.models.weights import load_gguf
from jaxrl_llm.models.weights import load_hf
from jaxrl_llm.models.weights import model_tensors
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.models.weights import save_hf
from tests.golden.tiny_checkpoints import CHECKPOINTS
from tests.golden.tiny_checkpoints import tensors_of

NAME = "llama_grouped_tied"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CHECKPOINTS[NAME] if settings is None else settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tensors_of(NAME))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_folder_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model = load_hf(write_checkpoint(tmp_path / "source", tensors_of(name), CHECKPOINTS[name]))
    save_hf(model, tmp_path / "saved")
    loaded = load_hf(tmp_path / "saved")
    assert loaded.config == model.config == config_from_hf(CHECKPOINTS[name])
    assert_same_tensors(model_tensors(loaded), tensors_of(name))


def test_bfloat16_folder_round_trip_is_exact(checkpoint: Path, tmp_path: Path) -> None:
    model = load_hf(checkpoint, dtype=jnp.bfloat16)
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors_of(NAME).items()}
    assert_same_tensors(model_tensors(model), rounded)
    save_hf(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == "bfloat16"
    assert_same_tensors(model_tensors(load_hf(tmp_path / "saved", dtype=jnp.bfloat16)), rounded)


def test_parameters_and_products_may_differ_in_dtype(checkpoint: Path) -> None:
    model = load_hf(checkpoint, compute_dtype=jnp.bfloat16)
    assert model.embedding[...].dtype == jnp.float32
    assert model(jnp.zeros((1, 2), jnp.int32)).dtype == jnp.bfloat16


def test_sharded_files_with_an_index(checkpoint: Path) -> None:
    tensors = tensors_of(NAME)
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[:7], "model-2-of-2.safetensors": names[7:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, checkpoint / file)
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_tensors(model_tensors(load_hf(checkpoint)), tensors)
    save_file({name: tensors[name] for name in names[8:]}, checkpoint / "model-2-of-2.safetensors")
    with pytest.raises(ValueError, match=f"names tensors that its files do not hold: {names[7]}"):
        load_hf(checkpoint)
    (checkpoint / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-2-of-2\.safetensors, which .* names"):
        load_hf(checkpoint)


def test_loading_onto_a_mesh(checkpoint: Path) -> None:
    mesh = make_mesh()
    model = load_hf(checkpoint, mesh=mesh)
    assert model.layers[1].attention.query.kernel[...].sharding.mesh.axis_names == mesh.axis_names
    assert_same_tensors(model_tensors(model), tensors_of(NAME))


def test_adapters_are_merged_when_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = add_lora(load_hf(checkpoint), LoraSettings(rank=2), rngs=nnx.Rngs(0))
    low_rank = model.layers[1].mlp.down.low_rank
    low_rank.b[...] = jnp.ones_like(low_rank.b[...])
    tokens = jnp.arange(6)[None]
    before = model(tokens)
    save_hf(model, tmp_path / "saved")
    np.testing.assert_array_equal(model(tokens), before, err_msg="saving must leave the model as it was")
    merged = load_hf(tmp_path / "saved")
    assert merged.layers[1].mlp.down.low_rank is None
    np.testing.assert_allclose(merged(tokens), before, atol=1e-4)
    assert np.abs(merged(tokens) - load_hf(checkpoint)(tokens)).max() > 0.1


def test_names_that_follow_from_the_configuration_are_ignored(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": tensors_of(NAME)["model.embed_tokens.weight"],
    }
    assert_same_tensors(model_tensors(load_hf(write_checkpoint(tmp_path, tensors_of(NAME) | extra))), tensors_of(NAME))


def without(tensors: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: without(t, QUERY, "model.norm.weight"), rf"lacks 2 tensors: {QUERY}, model.norm.weight\."),
        (
            lambda t: t | {"model.extra": t["model.norm.weight"]},
            r"has 1 tensors that this architecture lacks: model.extra",
        ),
        (
            lambda t: t | {QUERY: t[QUERY][:16], "model.norm.weight": np.ones(31, np.float32)},
            rf"{QUERY} is float32 \[16, 32\], expected floats \[32, 32\], model.norm.weight .* \[31\], expected",
        ),
        (lambda t: t | {QUERY: t[QUERY].astype(np.int8)}, rf"{QUERY} is int8 \[32, 32\], expected floats"),
    ],
)
def test_tensors_that_do_not_fit(change, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_hf(write_checkpoint(tmp_path, change(tensors_of(NAME))))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_counted_and_named(number: float, stored, tmp_path: Path) -> None:
    tensors = {name: tensor.astype(stored) for name, tensor in tensors_of(NAME).items()}
    tensors[QUERY] = tensors[QUERY].copy()
    tensors[QUERY][3, [0, 7]] = number
    with pytest.raises(ModelFileError, match=rf"has 2 of 1024 numbers in {QUERY} that are NaN or infinite in float32"):
        load_hf(write_checkpoint(tmp_path, tensors))


def test_weights_that_a_narrow_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(NAME)
    tensors[QUERY] = tensors[QUERY].copy()
    tensors[QUERY][3, 0] = 1e5
    folder = write_checkpoint(tmp_path, tensors)
    load_hf(folder, dtype=jnp.bfloat16)
    with pytest.raises(ModelFileError, match=rf"has 1 of 1024 numbers in {QUERY} that are NaN or infinite in float16"):
        load_hf(folder, dtype=jnp.float16)


def test_weights_of_a_gguf_file_that_are_no_numbers_are_named_with_the_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))
    model = load_hf(checkpoint)
    model.final_norm.scale[...] = model.final_norm.scale[...].at[5].set(jnp.nan)
    save_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=r"model\.gguf has 1 of 32 numbers in model\.norm\.weight that are NaN"):
        load_gguf(tmp_path / "model.gguf")


def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path) -> None:
    only = {"model.norm.weight": tensors_of(NAME)["model.norm.weight"]}
    with pytest.raises(ValueError, match=r"lacks 19 tensors: model.embed_tokens.weight, .* and 11 more"):
        load_hf(write_checkpoint(tmp_path, only))


@pytest.mark.parametrize("size", [0, 4, 500, 20_000, -1])
def test_truncated_weights(size: int, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_hf(checkpoint)


def test_folders_without_what_is_needed(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder; expected a Hugging Face checkpoint"):
        load_hf(tmp_path / "nowhere")
    (checkpoint / "config.json").write_text('{"hidden_size": 3')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_hf(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_hf(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors, nor"):
        load_hf(checkpoint)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "names GPT2LMHeadModel, model_type llama; supported are LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "gemma3"}, "names gemma3; supported"),
        ({"architectures": None, "model_type": None}, "names no architecture; supported"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"attention_bias": True}, "sets attention_bias"),
        ({"mlp_bias": True}, "sets mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}, "of 64 positions"),
        ({"use_sliding_window": True, "sliding_window": 64}, "of 64 positions"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scales rotary positions by 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scales rotary positions by 'linear'"),
        ({"partial_rotary_factor": 0.5}, "rotates the fraction 0.5"),
    ],
)
def test_configurations_that_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config_from_hf({**CHECKPOINTS[NAME], **changes})


def test_windows_that_do_not_bite_and_old_files_are_read() -> None:
    qwen2 = CHECKPOINTS["qwen2_biases"]
    assert config_from_hf({**qwen2, "sliding_window": 64}) == config_from_hf(qwen2)
    llama = CHECKPOINTS[NAME]
    assert config_from_hf({**llama, "sliding_window": 128}) == config_from_hf(llama)
    assert config_from_hf({**llama, "architectures": None}) == config_from_hf(llama)
    few = {name: llama[name] for name in ("architectures", "vocab_size", "hidden_size", "intermediate_size")}
    old = config_from_hf({**few, "num_hidden_layers": 2, "num_attention_heads": 4})
    assert (old.num_kv_heads, old.head_dim, old.rope_theta, old.norm_eps, old.tie_embeddings) == (
        4,
        8,
        1e4,
        1e-6,
        False,
    )


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(tie_embeddings=False, qkv_bias=True),
        tiny(qk_norm=True),
        TransformerConfig(**{**vars(tiny()), "rope_scaling": RopeScaling(factor=32.0, original_max_positions=64)}),
    ],
)
@pytest.mark.parametrize("reader", ["transformers 4", "transformers 5"])
def test_configurations_survive_both_forms_of_the_file(config: TransformerConfig, reader: str) -> None:
    settings = config_to_hf(config, dtype="float32")
    forgotten = ("rope_parameters",) if reader == "transformers 4" else ("rope_theta", "rope_scaling")
    assert config_from_hf({name: value for name, value in settings.items() if name not in forgotten}) == config


def test_no_architecture_has_biases_and_norms() -> None:
    with pytest.raises(ValueError, match="qkv_bias and qk_norm are both set"):
        config_to_hf(tiny(qkv_bias=True, qk_norm=True), dtype="float32")


def test_saving_never_writes_into_a_used_folder(checkpoint: Path, tmp_path: Path) -> None:
    model = load_hf(checkpoint)
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        save_hf(model, checkpoint)
    (tmp_path / "empty").mkdir()
    save_hf(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="tokenizer has 259 ids, the model 97 rows"):
        save_hf(model, tmp_path / "other", tokenizer=ByteTokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "empty"]


def test_saved_files_can_be_read_by_whoever_may_read_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    save_hf(load_hf(checkpoint), tmp_path / "saved")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] != 0o600


def test_whole_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def half() -> None:
        with whole_folder(tmp_path / "it", size=0) as draft:
            (draft / "half").write_text("half")
            assert not (tmp_path / "it").exists()
            raise Stop

    with pytest.raises(Stop):
        half()
    assert list(tmp_path.iterdir()) == []


def test_whole_file_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path, size=0) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(IsADirectoryError, match="is a folder"), whole_file(tmp_path, size=0):
        pass


def test_drafts_of_killed_processes_are_removed_once_old(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f".{name}.draft" for name in ("it.1", "it.2", "else.1"))
    for draft in (old, young, other):
        draft.mkdir()
    past = time.time() - ABANDONED_AFTER - 1
    os.utime(old, (past, past))
    os.utime(other, (past, past))
    with whole_folder(tmp_path / "it", size=0):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"it", young.name, other.name}


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    sentence = r"it cannot be written: 4611686018427 MB needed, .* MB free"
    with pytest.raises(OSError, match=sentence) as caught, whole_folder(tmp_path / "it", size=2**62):
        pytest.fail("the body must not run")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, signal, sys
from jaxrl_llm.models.weights import load_hf, save_hf
model = load_hf(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_hf(model, sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a newer jax: no file size limits on Windows")
def test_a_disk_that_fills_while_saving_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails half way in the same call."""
    target = tmp_path / "saved"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-c", FULL, str(checkpoint), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert f"{target} cannot be written" in run.stdout, run.stdout + run.stderr
    assert "Nothing was changed there." in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("JAXRL_LLM_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxrl_llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "jaxrl_llm"


def test_built_models_run_compiled() -> None:
    model = build_model(config_from_hf(CHECKPOINTS[NAME]), tensors_of(NAME))
    tokens = jnp.arange(6)[None]
    np.testing.assert_allclose(nnx.jit(lambda model: model(tokens))(model), model(tokens), atol=1e-5)
