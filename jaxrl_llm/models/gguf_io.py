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

from jaxrl_llm.models.blueprint import tensor_shapes
from jaxrl_llm.models.config import LARGEST_FACTOR
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import whole_file
from jaxrl_llm.models.gguf_config import config_from_gguf
from jaxrl_llm.models.gguf_config import expert_entries
from jaxrl_llm.models.gguf_header import read_header
from jaxrl_llm.models.hf_config import architecture_of
from jaxrl_llm.models.layers import rotary_frequencies
from jaxrl_llm.models.stored import COPIES
from jaxrl_llm.models.stored import StoredTensors
from jaxrl_llm.models.stored import check_layers

GGUFType = Literal["F32", "F16", "BF16", "Q8_0"]

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
        there = self.reader.tensors
        self.config = config_from_gguf(
            self.metadata, {name: one.shape for name, one in there.items()}, source=str(path)
        )
        if ROPE_FACTORS in there:
            self.config = _with_rope_factors(self.config, self.reader.values(ROPE_FACTORS), source=str(path))
        check_layers(self.config, len(there), source=str(path))
        places = _places(self.config, self.metadata["general.architecture"])
        named = {place.name for place in places.values()}
        self._places = {hf: place for hf, place in places.items() if place.name in there}
        # Others under their own names, to be reported.
        self._places |= {name: _Place(name) for name in there if name not in named and name != ROPE_FACTORS}
        self.shapes = {hf: there[place.name].shape[place.index is not None :] for hf, place in self._places.items()}
        self.dtypes = dict.fromkeys(self._places, "float32")
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        if place.index is not None:
            # The experts of a layer lie in one tensor and are asked for one after the other.
            if self._last is None or self._last[0] != place.name:
                self._last = (place.name, self.reader.values(place.name))
            whole = self._last[1]
            if place.index == len(whole) - 1:
                self._last = None
            return whole[place.index]
        values = self.reader.values(place.name)
        heads = _heads_to_reorder(name, self.config)
        return deinterleave(values, heads) if heads else values

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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
        # Routers stay as they are: their near ties would choose other experts.
        wide = len(shape) < 2 or name.endswith("mlp.gate.weight")
        kind = gguf.GGMLQuantizationType["F32" if wide else dtype]
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
        dtype: of the matrices; vectors and the matrices of routers are float32 always.
        metadata: further key-value entries, those of the tokenizer among them.

    Raises:
        ValueError: a matrix whose rows the blocks of `dtype` do not divide, or a model that GGUF cannot describe.
        OSError: the place cannot be written or has no room.
    """
    architecture = architecture_of(config).gguf
    parts = _together(config, architecture, tensors)
    layout = {name: _Stored.of(held[0], shape, dtype) for name, (shape, held) in parts.items()}
    with whole_file(path, size=sum(stored.size for stored in layout.values())) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        try:
            for key, value in {**_entries(config, architecture, dtype), **metadata}.items():
                _add_entry(writer, key, value)
            if config.rope_scaling is not None:
                writer.add_tensor_info(
                    ROPE_FACTORS, (config.rotary_dim // 2,), np.dtype(np.float32), config.rotary_dim * 2
                )
            for name, stored in layout.items():
                writer.add_tensor_info(name, stored.shape, stored.dtype, stored.size, stored.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if config.rope_scaling is not None:
                writer.write_tensor_data(rope_factors(config))
            for name, (_, held) in parts.items():
                heads = _heads_to_reorder(held[0], config)
                values = tensors[held[0]] if len(held) == 1 else np.stack([tensors[one] for one in held])
                values = interleave(values, heads) if heads else values
                writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values, np.float32), layout[name].kind))
        finally:
            writer.close()


def rope_factors(config: TransformerConfig) -> np.ndarray:
    """What llama.cpp divides the rotary frequencies by [rotary_dim / 2], float32: 1 without scaling."""
    plain = rotary_frequencies(replace(config, rope_scaling=None))
    return np.asarray(plain / rotary_frequencies(config), np.float32)


def _with_rope_factors(config: TransformerConfig, factors: np.ndarray, *, source: str) -> TransformerConfig:
    """The configuration with Llama 3's scaling, its original context (a power of two) found from the stored factors."""
    largest = round(float(factors.max()), 4)
    if factors.shape == (config.rotary_dim // 2,) and np.isfinite(factors).all() and 1 <= largest <= LARGEST_FACTOR:
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
        "block_count": config.num_layers + config.mtp_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    sizes |= expert_entries(config)
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
    if architecture_of(config).gguf != "llama":
        return 0
    if name.endswith(".q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if name.endswith(".k_proj.weight") else 0


class _Place(NamedTuple):
    """Where a tensor of a Hugging Face checkpoint lies in a GGUF file: in a tensor, or in one entry of it."""

    name: str
    index: int | None = None


def _places(config: TransformerConfig, architecture: str) -> dict[str, _Place]:
    """The place of every tensor of a model, by the names that llama.cpp's own converter gives."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_layers + config.mtp_layers)
    places = {}
    further = range(config.num_layers, config.num_layers + config.mtp_layers)
    copies = [f"model.layers.{layer}.{copy}" for layer in further for copy in COPIES]
    for hf in [*tensor_shapes(config), *copies]:
        # The bias is a part of the name there, and the kind of the tensor here.
        stem, kind = (hf[: -len("_bias")], "bias") if hf.endswith("e_score_correction_bias") else hf.rsplit(".", 1)
        outer, experts, inner = stem.partition(".experts.")
        expert, _, part = inner.partition(".")
        index = int(expert) if experts else None
        found = names.get_name(f"{outer}.experts.{part}" if experts else stem)
        if found is not None:
            places[hf] = _Place(f"{found}.{kind}", index)
    return places


def _together(
    config: TransformerConfig, architecture: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """The tensors of a GGUF file: shape of each, and what lies in it, in order."""
    places, held = _places(config, architecture), {}
    for hf in tensors:
        held.setdefault(places[hf].name, []).append(hf)
    shapes = {name: (len(inside),) * (places[inside[0]].index is not None) for name, inside in held.items()}
    return {name: ((*shapes[name], *tensors[inside[0]].shape), inside) for name, inside in held.items()}
