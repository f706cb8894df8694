"""GGUF files written and read back, their conversion in the cache, and the sentences that damaged ones give."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models import gguf_io
from jaxrl_llm.models import weights
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.gguf_io import deinterleave
from jaxrl_llm.models.gguf_io import interleave
from jaxrl_llm.models.gguf_io import rope_factors
from jaxrl_llm.models.gguf_io import write_gguf
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.stored import COPIES
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import build_model
from jaxrl_llm.models.weights import converted_gguf
from jaxrl_llm.models.weights import load_gguf
from jaxrl_llm.models.weights import load_hf
from jaxrl_llm.models.weights import model_tensors
from jaxrl_llm.models.weights import save_gguf
from tests.golden.tiny_checkpoints import CHECKPOINTS
from tests.golden.tiny_checkpoints import tensors_of
from tests.models.llama_cpp_reader import reader_of

NAME = "llama_grouped_tied"
SCALED = "llama_scaled_rotation_untied"
WRITTEN = [name for name, settings in CHECKPOINTS.items() if settings.get("n_group", 1) == 1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_model(name: str = NAME) -> Transformer:
    return build_model(config_from_hf(CHECKPOINTS[name]), tensors_of(name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_gguf(tiny_model(), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", WRITTEN)
def test_float32_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    save_gguf(tiny_model(name), tmp_path / "model.gguf")
    loaded = load_gguf(tmp_path / "model.gguf")
    assert loaded.config == config_from_hf(CHECKPOINTS[name])
    found = model_tensors(loaded)
    for key, tensor in tensors_of(name).items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize(("dtype", "rounded"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_half_precision_rounds_matrices_and_keeps_vectors(dtype: Any, rounded: type, tmp_path: Path) -> None:
    save_gguf(tiny_model("qwen2_biases"), tmp_path / "model.gguf", dtype=dtype)
    found = model_tensors(load_gguf(tmp_path / "model.gguf"))
    for key, tensor in tensors_of("qwen2_biases").items():
        expected = tensor.astype(rounded).astype(np.float32) if tensor.ndim == 2 else tensor
        np.testing.assert_array_equal(found[key], expected, err_msg=key)


def test_eight_bits_round_each_block_of_32(tmp_path: Path) -> None:
    config = tiny()
    model = Transformer(config, rngs=nnx.Rngs(0))
    save_gguf(model, tmp_path / "model.gguf", dtype="Q8_0")
    found, source = model_tensors(load_gguf(tmp_path / "model.gguf")), model_tensors(model)
    for key, tensor in source.items():
        blocks = np.abs(tensor.reshape(-1, 32))
        # Half a step of 1/127 of the block's largest entry, and the rounding of that step to float16.
        bound = blocks.max(axis=1, keepdims=True) * (0.5 / 127 + 2**-11)
        error = np.abs(found[key] - tensor).reshape(-1, 32)
        assert (error <= (bound if tensor.ndim == 2 else 0)).all(), key


def q8_0(values: np.ndarray) -> np.ndarray:
    """ggml's rule, written out: per 32 entries a float16 scale max|x| / 127, and round(x / scale), ties away from 0."""
    blocks = values.reshape(-1, 32).astype(np.float32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = blocks * inverse
    levels = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), levels.view(np.uint8)], axis=1).ravel()


BITS = {
    "F32": lambda values: values.view(np.uint8).ravel(),
    "F16": lambda values: values.astype(np.float16).view(np.uint8).ravel(),
    "BF16": lambda values: values.astype(ml_dtypes.bfloat16).view(np.uint8).ravel(),
    "Q8_0": q8_0,
}


@pytest.mark.parametrize("dtype", BITS)
def test_what_lies_in_the_file_is_right_bit_for_bit(dtype: Any, tmp_path: Path) -> None:
    """Against the quantizer of the package gguf, and against the format written out here."""
    model = Transformer(tiny(), rngs=nnx.Rngs(0))
    table = np.array(model.embedding[...])
    table[0], table[1, :4], table[2, 0] = 0, (0.5 / 127, -0.5 / 127, 1.0, 2**-20), 3e-40
    model.embedding[...] = jnp.asarray(table)
    save_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, values in {"token_embd": table, "blk.0.ffn_up": np.asarray(model.layers[0].mlp.up.kernel[...]).T}.items():
        tensor = stored[f"{name}.weight"]
        assert tensor.tensor_type.name == dtype
        found, values = tensor.data.view(np.uint8).ravel(), np.ascontiguousarray(values)
        packaged = gguf.quantize(values, tensor.tensor_type).view(np.uint8).ravel()
        np.testing.assert_array_equal(found, packaged)
        np.testing.assert_array_equal(found, BITS[dtype](values))


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"down_proj\.weight has rows of 48 elements; Q8_0 needs a multiple of 32"):
        save_gguf(tiny_model(), tmp_path / "model.gguf", dtype="Q8_0")
    assert not (tmp_path / "model.gguf").exists()


def test_routers_that_llama_cpp_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experts in 4 groups cannot be written as GGUF"):
        save_gguf(tiny_model("glm4_moe_groups"), tmp_path / "model.gguf")
    config = replace(config_from_hf(CHECKPOINTS["qwen3_moe"]), experts=None)
    experts = ExpertsConfig(count=4, chosen=2, width=8, scores="softmax", bias=False, normalise=False)
    with pytest.raises(ValueError, match=r"llama\.cpp normalises the weights of Qwen3's experts"):
        save_gguf(Transformer(replace(config, experts=experts), rngs=nnx.Rngs(0)), tmp_path / "model.gguf")


def test_parts_that_no_architecture_has_together(tmp_path: Path) -> None:
    """What would be written and could not be read."""
    for config in (
        replace(tiny(), mtp_layers=1),
        tiny(qkv_bias=True, rotary_fraction=0.5),
        tiny(qk_norm=True, rotary_fraction=0.5),
        replace(config_from_hf(CHECKPOINTS["qwen3_moe"]), mtp_layers=1),
    ):
        with pytest.raises(ValueError, match="the parts of this model go together in none of"):
            save_gguf(Transformer(config, rngs=nnx.Rngs(0)), tmp_path / "model.gguf")


def glm_of(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the tiny GLM with other entries."""
    plain = gguf_io._entries
    monkeypatch.setattr(gguf_io, "_entries", lambda *given: plain(*given) | changes)
    save_gguf(tiny_model("glm4_moe_scaled_head_norms"), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_groups_of_experts_in_a_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = glm_of(tmp_path, {"glm4moe.expert_group_count": 2}, monkeypatch)
    with pytest.raises(ModelFileError, match="has groups of experts; supported is one group"):
        load_gguf(path)


def test_copies_beside_a_layer_for_further_tokens_are_passed_by(tmp_path: Path, monkeypatch) -> None:
    model = tiny_model("glm4_moe_further_token")
    copies = {f"model.layers.2.{name}": tensors_of("glm4_moe_further_token")["lm_head.weight"] for name in COPIES}
    tensors = model_tensors(model) | copies
    write_gguf(tmp_path / "model.gguf", model.config, tensors, dtype="F32", metadata={})
    loaded = load_gguf(tmp_path / "model.gguf")
    np.testing.assert_array_equal(loaded.further[0].join.kernel[...], model.further[0].join.kernel[...])


def test_scaled_positions_of_heads_that_turn_in_part(tmp_path: Path) -> None:
    """A file has the factors; of two of them more than one scaling could be the cause."""
    scaling = RopeScaling(original_max_positions=32)
    config = replace(config_from_hf(CHECKPOINTS["glm4_moe_plain_weights"]), rope_scaling=scaling)
    save_gguf(build_model(config, tensors_of("glm4_moe_plain_weights")), tmp_path / "model.gguf")
    found = rope_factors(load_gguf(tmp_path / "model.gguf").config)
    assert len(found) == 2
    assert found[-1] > 1
    np.testing.assert_allclose(found, rope_factors(config), rtol=1e-4)


def test_a_single_expert_and_routers_in_few_bits(tmp_path: Path) -> None:
    config = tiny(experts=ExpertsConfig(count=1, chosen=1, width=32))
    model = Transformer(config, rngs=nnx.Rngs(0))
    assert model_tensors(model)["model.layers.0.mlp.experts.0.down_proj.weight"].shape == (32, 32)
    save_gguf(model, tmp_path / "model.gguf", dtype="Q8_0")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q8_0"


@pytest.mark.parametrize("further", [0, 1])
def test_llama_cpp_computes_what_we_do_with_experts(further: int, tmp_path: Path) -> None:
    """Half a rotation, a router with a bias, a shared expert, a dense layer; with a layer that llama.cpp passes by."""
    experts = ExpertsConfig(count=6, chosen=2, width=32, shared=1, dense_layers=1, scale=1.5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 259, "rotary_fraction": 0.5}
    config = replace(tiny(**sizes, qkv_bias=True, qk_norm=True, experts=experts), mtp_layers=further)
    model = Transformer(replace(config, tie_embeddings=False), rngs=nnx.Rngs(0))
    model.layers[1].mlp.router.bias[...] = jnp.linspace(-0.3, 0.3, 6)
    save_gguf(model, tmp_path / "model.gguf", tokenizer=ByteTokenizer())
    prompt = [*b"a router"]
    with reader_of(tmp_path / "model.gguf") as reader:
        found = reader.log_probs(prompt, 259)
    expected = jax.nn.log_softmax(model.logits(model(jnp.asarray([prompt])))[0, -1])
    seen = np.isfinite(found)
    assert seen.sum() > 250
    np.testing.assert_allclose(found[seen], expected[seen], atol=2e-3)


def test_impossible_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'Q4_0'; expected one of F32, F16, BF16, Q8_0"):
        save_gguf(tiny_model(), tmp_path / "model.gguf", dtype="Q4_0")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tokenizer has 259 ids, the model 97 rows"):
        save_gguf(tiny_model(), tmp_path / "model.gguf", tokenizer=ByteTokenizer())
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_gguf(tiny_model(), tmp_path)
    with pytest.raises(TypeError, match="is a bytes; entries are numbers"):
        write_gguf(tmp_path / "model.gguf", tiny(), {}, dtype="F32", metadata={"general.name": b"x"})


def test_interleave_makes_rotated_pairs_neighbours() -> None:
    rows = np.arange(16.0)[:, None]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    np.testing.assert_array_equal(deinterleave(interleave(rows, 2), 2), rows)


@pytest.mark.parametrize("name", WRITTEN)
def test_only_the_llama_architecture_stores_rows_in_pairs(name: str, tmp_path: Path) -> None:
    """The order in the file itself: reading back would undo any order that writing made."""
    save_gguf(tiny_model(name), tmp_path / "model.gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    config, tensors = config_from_hf(CHECKPOINTS[name]), tensors_of(name)
    half = config.head_dim // 2
    in_pairs = [row for first in range(half) for row in (first, first + half)]
    order = in_pairs if name.startswith(("llama", "mistral")) else list(range(config.head_dim))
    for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        rows = [head * config.head_dim + row for head in range(heads) for row in order]
        source = tensors[f"model.layers.1.self_attn.{part}_proj.weight"]
        np.testing.assert_array_equal(stored[f"blk.1.attn_{part}.weight"], source[rows])
    np.testing.assert_array_equal(stored["blk.1.attn_v.weight"], tensors["model.layers.1.self_attn.v_proj.weight"])


def test_rope_factors_are_those_of_llama_3() -> None:
    """Low frequencies are divided by the factor, high ones are not."""
    factors = rope_factors(config_from_hf(CHECKPOINTS[SCALED]))
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) >= 0).all()
    assert (rope_factors(tiny()) == 1).all()


def test_saved_tokenizer_and_model_come_back_together(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    settings = {**CHECKPOINTS[NAME], "vocab_size": tokenizer.vocab_size}
    tensors = tensors_of(NAME)
    table = np.resize(tensors["model.embed_tokens.weight"], (tokenizer.vocab_size, settings["hidden_size"]))
    model = build_model(config_from_hf(settings), tensors | {"model.embed_tokens.weight": table})
    save_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    loaded, found = load_pretrained(tmp_path / "model.gguf")
    assert found.encode("é<|eos|>") == tokenizer.encode("é<|eos|>")
    assert (found.eos_id, found.pad_id, found.bos_id) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id)
    np.testing.assert_array_equal(loaded.embedding[...], table)


def test_a_file_without_vocabulary_gives_a_model_but_no_tokenizer(path: Path) -> None:
    assert load_gguf(path).config.vocab_size == 97
    with pytest.raises(ValueError, match="of the kind 'no_vocab'"):
        load_pretrained(path)


@pytest.mark.parametrize("size", [0, 3, 10, 100, 700, 5000, 70_000, -1])
def test_truncated_files(size: int, path: Path) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"model\.gguf \(\d+ bytes\) is truncated or not a GGUF file"):
        load_gguf(path)


def test_files_that_are_something_else(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; expected a GGUF file"):
        load_gguf(tmp_path / "nowhere.gguf")
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ValueError, match="is truncated or not a GGUF file"):
        load_gguf(path)


def write_other(path: Path, architecture: str, **entries: int | float | str) -> Path:
    """A GGUF file with the sizes of a tiny llama and the given entries on top."""
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 48, "context_length": 64}
    values = {**sizes, "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5, **entries}
    for key, value in values.items():
        if value is None:
            continue
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{architecture}.{key}", value)  # pyright: ignore
    writer.add_tensor("token_embd.weight", np.zeros((97, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "entries", "sentence"),
    [
        ("gemma3", {}, "has the architecture 'gemma3'; supported are llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "is a mixture of 8 experts"),
        ("llama", {"rope.scaling.type": "yarn"}, r"scales rotary positions \(yarn\)"),
        ("llama", {"rope.dimension_count": 4}, "rotates 4 of 8 elements"),
        ("llama", {"block_count": None}, r"lacks the entry llama\.block_count"),
        ("llama", {}, "lacks 10 tensors: model.layers.0.input_layernorm.weight, "),
    ],
)
def test_files_that_are_refused(architecture: str, entries: dict, sentence: str, tmp_path: Path) -> None:
    path = write_other(tmp_path / "other.gguf", architecture, **entries)
    with pytest.raises(ValueError, match=sentence):
        load_gguf(path)


def test_unknown_scaling_of_rotary_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = np.asarray([1, 2, 1, 2, 1, 2], np.float32)
    monkeypatch.setattr("jaxrl_llm.models.gguf_io.rope_factors", lambda config: wrong)
    save_gguf(tiny_model(SCALED), tmp_path / "model.gguf")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="in another way than Llama 3"):
        GGUFFile(tmp_path / "model.gguf")


def test_second_load_reads_the_conversion(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_tensors(load_gguf(path))
    folder = converted_gguf(path)
    assert folder.parent == cache / "gguf"
    assert_equal(model_tensors(load_hf(folder)), first)

    def never(path: Path) -> None:
        raise AssertionError("the GGUF file was parsed again")

    monkeypatch.setattr(weights, "GGUFFile", never)
    assert_equal(model_tensors(load_gguf(path)), first)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_a_changed_file_is_converted_anew(path: Path) -> None:
    load_gguf(path)
    tensors = tensors_of(NAME)
    changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}
    save_gguf(build_model(config_from_hf(CHECKPOINTS[NAME]), changed), path)
    np.testing.assert_array_equal(load_gguf(path).final_norm.scale[...], changed["model.norm.weight"])


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no config"])
def test_a_damaged_conversion_is_made_again(damage: str, path: Path) -> None:
    folder = converted_gguf(path)
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 20_000)
    elif damage == "foreign":
        other = path.with_name("other.gguf")
        save_gguf(tiny_model("mistral_untied"), other)
        shutil.rmtree(folder)
        shutil.copytree(converted_gguf(other), folder)
    else:
        (folder / "config.json").unlink()
    assert_equal(model_tensors(load_gguf(path)), tensors_of(NAME))


def test_a_cache_that_cannot_be_written_costs_time_only(path: Path, cache: Path) -> None:
    cache.write_text("a file is in the way")
    with pytest.warns(UserWarning, match=r"cannot be written: .* The model is dequantised again at every load"):
        model = load_gguf(path, dtype=jnp.bfloat16)
    assert model.embedding[...].dtype == jnp.bfloat16
    expected = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors_of(NAME).items()}
    assert_equal(model_tensors(model), expected)
    with pytest.raises(OSError, match="cannot be written"):
        converted_gguf(path)


@pytest.mark.parametrize("name", ["x", "x" * 33])
def test_parameters_own_their_memory(name: str, tmp_path: Path) -> None:
    """A donated parameter is overwritten in place; in the read-only memory map of a float32 file that would crash.

    JAX takes over memory that is aligned to 64 bytes, which one of the two names brings about.
    """
    save_gguf(tiny_model(), tmp_path / "model.gguf", name=name)
    file = GGUFFile(tmp_path / "model.gguf")
    mapped = file.reader.data
    pointer = build_model(file.config, file).embedding[...].unsafe_buffer_pointer()
    assert not 0 <= pointer - mapped.ctypes.data < mapped.nbytes


def test_two_processes_may_convert_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes while this one reads: its folder is taken, and nothing is left over."""
    plain = weights.GGUFFile

    def overtaken(source: Path) -> GGUFFile:
        monkeypatch.setattr(weights, "GGUFFile", plain)
        converted_gguf(source)
        return plain(source)

    monkeypatch.setattr(weights, "GGUFFile", overtaken)
    folder = converted_gguf(path)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert_equal(model_tensors(load_hf(folder)), tensors_of(NAME))
