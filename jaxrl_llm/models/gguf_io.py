"""GGUF files of llama.cpp: read as tensors in the Hugging Face layout, and written so that llama.cpp loads them.

llama.cpp rotates neighbouring pairs of a head's elements where Hugging Face rotates halves, so its `llama` architecture
stores the rows of the query and key projections in another order; `interleave` and `deinterleave` convert it.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import Literal
from typing import NamedTuple

import gguf
import numpy as np

from jaxrl_llm.models.config import LARGEST_FACTOR
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import whole_file
from jaxrl_llm.models.gguf_config import config_from_gguf
from jaxrl_llm.models.gguf_header import read_header
from jaxrl_llm.models.hf_config import ARCHITECTURES
from jaxrl_llm.models.hf_config import architecture_of
from jaxrl_llm.models.layers import rotary_frequencies
from jaxrl_llm.models.stored import StoredTensors

GGUFType = Literal["F32", "F16", "BF16", "Q8_0"]

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES_BACK = {hf: name for name, hf in LAYER_NAMES.items()}
_TOP_NAMES_BACK = {hf: name for name, hf in TOP_NAMES.items()}
ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile(StoredTensors):
    """The tensors of a GGUF file under their Hugging Face names; each is dequantised to float32 when it is asked for.

    Attributes:
        reader: the header and the open file, a memory map.
        metadata: its key-value entries.
        config: the configuration they describe.
        shapes, dtypes: see `StoredTensors`.

    Raises:
        MissingModelFileError: no such file.
        ModelFileError: a truncated file, none in the GGUF format, one part of several, or an unsupported architecture.
    """

    def __init__(self, path: Path) -> None:
        self.reader = read_header(path)
        self.metadata = self.reader.entries
        tensors = {_hf_name(name): name for name in self.reader.tensors if name != ROPE_FACTORS}
        if len(tensors) < len(self.reader.tensors) - (ROPE_FACTORS in self.reader.tensors):
            raise ModelFileError(f"{path} has a tensor twice, under its names in GGUF and in Hugging Face folders.")
        self._names = tensors
        self.shapes = {hf: self.reader.tensors[name].shape for hf, name in tensors.items()}
        self.dtypes = dict.fromkeys(tensors, "float32")
        self.config = config_from_gguf(self.metadata, self.shapes, source=str(path))
        if ROPE_FACTORS in self.reader.tensors:
            self.config = _with_rope_factors(self.config, self.reader.values(ROPE_FACTORS), source=str(path))

    def __getitem__(self, name: str) -> np.ndarray:
        values = self.reader.values(self._names[name])
        heads = _heads_to_reorder(name, self.config)
        return deinterleave(values, heads) if heads else values

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def deinterleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo `interleave`: bring the rows of every head from the order of `llama` GGUF into that of Hugging Face."""
    rows = weight.shape[0] // num_heads
    return weight.reshape(num_heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows 0, 1, ... h - 1 of every head in the order 0, h/2, 1, h/2 + 1, ..., so that rotated pairs are neighbours."""
    rows = weight.shape[0] // num_heads
    return weight.reshape(num_heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


class _Stored(NamedTuple):
    """How a tensor lies in the file: its format, and shape and dtype of the array of stored numbers or bytes."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: GGUFType) -> "_Stored":
        kind = gguf.GGMLQuantizationType[dtype if len(shape) > 1 else "F32"]
        if kind.name in ("F32", "F16"):
            return cls(kind, tuple(shape), np.dtype(np.float32 if kind.name == "F32" else np.float16))
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]} elements; {dtype} needs a multiple of {block}.")
        return cls(kind, (*shape[:-1], shape[-1] // block * block_bytes), np.dtype(np.uint8))


def write_gguf(
    path: Path,
    config: TransformerConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: GGUFType,
    metadata: Mapping[str, Any],
) -> None:
    """Write a GGUF file; it appears under its name only when it is complete.

    Args:
        path: the file, replaced if it exists.
        config: the model's configuration.
        tensors: all tensors under their Hugging Face names.
        dtype: of the matrices; vectors are float32 always.
        metadata: further key-value entries, those of the tokenizer among them.

    Raises:
        ValueError: a matrix whose rows the blocks of `dtype` do not divide, or a model that GGUF cannot describe.
        OSError: the place cannot be written or has no room.
    """
    layout = {name: _Stored.of(name, tensor.shape, dtype) for name, tensor in tensors.items()}
    architecture = ARCHITECTURES[architecture_of(config)]
    with whole_file(path, size=sum(stored.size for stored in layout.values())) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        try:
            for key, value in {**_entries(config, architecture, dtype), **metadata}.items():
                _add_entry(writer, key, value)
            if config.rope_scaling is not None:
                writer.add_tensor_info(ROPE_FACTORS, (config.head_dim // 2,), np.dtype(np.float32), config.head_dim * 2)
            for name, stored in layout.items():
                writer.add_tensor_info(_gguf_name(name), stored.shape, stored.dtype, stored.size, stored.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if config.rope_scaling is not None:
                writer.write_tensor_data(rope_factors(config))
            for name, tensor in tensors.items():
                heads = _heads_to_reorder(name, config)
                values = interleave(tensor, heads) if heads else tensor
                writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values, np.float32), layout[name].kind))
        finally:
            writer.close()


def rope_factors(config: TransformerConfig) -> np.ndarray:
    """What llama.cpp divides the rotary frequencies by [head_dim / 2], float32: 1 without scaling."""
    plain = rotary_frequencies(replace(config, rope_scaling=None))
    return np.asarray(plain / rotary_frequencies(config), np.float32)


def _with_rope_factors(config: TransformerConfig, factors: np.ndarray, *, source: str) -> TransformerConfig:
    """The configuration with Llama 3's scaling, its original context (a power of two) found from the stored factors."""
    largest = round(float(factors.max()), 4)
    if factors.shape == (config.head_dim // 2,) and np.isfinite(factors).all() and 1 <= largest <= LARGEST_FACTOR:
        for context in (8192, *(2**power for power in range(4, 21))):
            guess = replace(config, rope_scaling=RopeScaling(factor=largest, original_max_positions=context))
            if np.allclose(factors, rope_factors(guess), rtol=1e-4):
                return guess
    raise ModelFileError(
        f"{source} scales rotary positions by {ROPE_FACTORS} in another way than Llama 3; "
        "load such a model from its Hugging Face folder."
    )


def _entries(config: TransformerConfig, architecture: str, dtype: GGUFType) -> dict[str, Any]:
    """The entries that llama.cpp reads the sizes from; the inverse of `config_from_gguf`."""
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    file_type = gguf.LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"]
    general = {"general.type": "model", "general.file_type": int(file_type), "general.quantization_version": 2}
    return {**general, **{f"{architecture}.{name}": value for name, value in sizes.items()}}


def _add_entry(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key-value entry in the type that llama.cpp expects of it."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(
                f"{key} is a {type(value).__name__}; entries are numbers, texts, booleans or lists of them."
            )


def _heads_to_reorder(name: str, config: TransformerConfig) -> int:
    """Number of heads whose rows `llama` GGUF interleaves; 0 for other tensors and architectures."""
    if config.qkv_bias or config.qk_norm:
        return 0
    if name.endswith(".q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if name.endswith(".k_proj.weight") else 0


def _hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; unknown names are kept, to be reported."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{kind}"
    return name


def _gguf_name(name: str) -> str:
    """The inverse of `_hf_name`."""
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{_LAYER_NAMES_BACK[parts[3]]}.{kind}"
    return f"{_TOP_NAMES_BACK[stem]}.{kind}"
