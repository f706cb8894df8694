"""Models from checkpoints and back: Hugging Face folders and GGUF files, without torch.

A tensor is known here by its Hugging Face name. `hf_io` and `gguf_io` turn files into mappings from those names to
arrays; this module turns such a mapping into a `Transformer`, and a `Transformer` into such a mapping.
"""

import hashlib
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jaxrl_llm.models import gguf_io
from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import cache_folder
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.files import whole_folder
from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.gguf_io import GGUFType
from jaxrl_llm.models.gguf_io import write_gguf
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.hf_io import SafetensorsFolder
from jaxrl_llm.models.hf_io import write_hf
from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.sharding import shardings
from jaxrl_llm.models.stored import Tensors
from jaxrl_llm.models.stored import check_fit
from jaxrl_llm.models.stored import check_memory
from jaxrl_llm.models.stored import require_finite
from jaxrl_llm.models.stored_parts import Stored
from jaxrl_llm.models.stored_parts import stored_parts
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import check_vocabulary
from jaxrl_llm.models.transformer import Transformer

CONVERSION = 2
"""Version of what `converted_gguf` writes; a new one makes old conversions be made again."""


def load_hf(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """The model of a Hugging Face folder: config.json and safetensors, in one file or several.

    Args:
        folder: of a checkpoint in float weights, of an architecture in `models.architectures`. Layers for further
            tokens that its configuration counts and that are not in it are left out.
        dtype: of the parameters.
        compute_dtype: of the products; by default `dtype`.
        mesh: devices to spread the parameters over by the rules of `models.sharding`; None for the default device.

    Raises:
        MissingModelFileError: no folder, no config.json or no weights.
        ModelFileError: a damaged file, another architecture, or tensors that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    tensors = SafetensorsFolder(folder)
    config = config_from_hf(read_json(folder / "config.json"), source=str(folder / "config.json"))
    if config.mtp_layers and not any(name.startswith(f"model.layers.{config.num_layers}.") for name in tensors):
        config = replace(config, mtp_layers=0)  # transformers counts these layers and does not write them
    return build_model(config, tensors, source=str(folder), dtype=dtype, compute_dtype=compute_dtype, mesh=mesh)


def load_gguf(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """The model of a GGUF file of an architecture in `models.architectures`; quantised weights are dequantised.

    The first load converts the file into a Hugging Face folder in the cache (`converted_gguf`); later ones read that.
    Where the cache cannot be written, a warning says so and the file is dequantised every time.

    Args:
        path: the GGUF file.
        dtype: see `load_hf`, as for the other arguments.
        compute_dtype: see `load_hf`.
        mesh: see `load_hf`.

    Raises:
        MissingModelFileError: no such file.
        ModelFileError: a damaged file, another architecture, or tensors that are missing, unknown or of another shape.
    """
    folder = conversion_or_none(path)
    if folder is not None:
        return load_hf(folder, dtype=dtype, compute_dtype=compute_dtype, mesh=mesh)
    source = GGUFFile(Path(path))
    return build_model(source.config, source, source=str(path), dtype=dtype, compute_dtype=compute_dtype, mesh=mesh)


def conversion_or_none(path: str | Path) -> Path | None:
    """`converted_gguf`, or None and a warning where the cache cannot be written."""
    try:
        return converted_gguf(path)
    except OSError as error:
        if isinstance(error, ModelFileError):
            raise
        warnings.warn(f"{error} The model is dequantised again at every load until it can be.", stacklevel=3)
        return None


def converted_gguf(path: str | Path) -> Path:
    """The Hugging Face folder in the cache that holds a GGUF file in float32, made by the first call.

    It is named by the SHA-256 of the GGUF file, which also stands in the header of its weights, so a changed file is
    never served from the conversion of another. The folder appears whole or not at all, whoever else is at it. The
    file's header is checked before the file is hashed, which reads all of it.

    Raises:
        MissingModelFileError: no such file.
        ModelFileError: the file cannot be read; see `GGUFFile`.
        OSError: the cache cannot be written or has no room.
    """
    path = Path(path)
    check_gguf(path)
    with read_from(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"source_sha256": digest, "source_size": str(path.stat().st_size), "conversion": str(CONVERSION)}
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"
    if _is_conversion(folder, origin):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    source = GGUFFile(path)
    try:
        with whole_folder(folder, size=4 * num_parameters(source.config)) as draft:
            finite = {name: require_finite(source[name], name, source=str(path)) for name in source}
            write_hf(draft, source.config, finite, metadata=origin)
            # A model whose tokenizer cannot be rebuilt is still a model.
            with suppress(ValueError):
                Tokenizer.from_gguf_metadata(source.metadata).save(draft)
    except OSError:
        # Another process may have been faster; its folder is as good.
        if not _is_conversion(folder, origin):
            raise
    return folder


def check_gguf(path: Path) -> None:
    """Raise a ModelFileError unless the header of a GGUF file is that of a model that can be read here."""
    file = gguf_io.GGUFFile(path)
    check_fit(file.config, file, source=str(path))
    check_memory(file.config, 4, source=str(path))


def save_hf(model: Transformer, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
    """Write a model as a Hugging Face folder: config.json, model.safetensors in the dtype of the parameters, tokenizer.

    Adapters are merged into the matrices they belong to.

    Args:
        model: the model.
        folder: new or empty; it appears whole or not at all.
        tokenizer: written as tokenizer.json where given.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the tokenizer does not belong to the model, or no architecture has these parts together.
        OSError: the place cannot be written or has no room.
    """
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab_size)
    tensors = model_tensors(model)
    with whole_folder(Path(folder), size=sum(tensor.nbytes for tensor in tensors.values())) as draft:
        write_hf(draft, model.config, tensors)
        if tokenizer is not None:
            tokenizer.save(draft)


def save_gguf(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: GGUFType = "F32",
    name: str = "jaxrl_llm model",
) -> None:
    """Write a model as a GGUF file that llama.cpp loads.

    Adapters are merged into the matrices they belong to.

    Args:
        model: the model.
        path: the file, replaced if it exists, once the new one is complete.
        tokenizer: byte-level BPE; None writes a file without vocabulary, which llama.cpp runs on token ids only.
        dtype: of the matrices: "F32", "F16", "BF16" or "Q8_0". llama.cpp computes Q8_0 with activations in 8 bits.
        name: shown by llama.cpp.

    Raises:
        ValueError: an unknown dtype, a tokenizer that does not belong to the model or cannot be written, or a model
            that GGUF cannot describe.
        OSError: the place cannot be written or has no room.
    """
    if dtype not in get_args(GGUFType):
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(GGUFType))}.")
    vocab_size = model.config.vocab_size
    metadata: dict[str, Any] = {"general.name": name, "tokenizer.ggml.model": "no_vocab"}
    if tokenizer is not None:
        check_vocabulary(tokenizer, vocab_size)
        metadata |= tokenizer.gguf_metadata(vocab_size=vocab_size)
    write_gguf(Path(path), model.config, model_tensors(model), dtype=dtype, metadata=metadata)


def build_model(
    config: TransformerConfig,
    tensors: Tensors,
    *,
    source: str = "tensors",
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """A model with the given tensors, under their Hugging Face names and in their layout [out, in].

    Args:
        config: sizes and variants.
        tensors: one for each parameter; a head beside tied embeddings is ignored.
        source: what error sentences call the tensors.
        dtype: see `load_hf`, as for the other arguments.
        compute_dtype: see `load_hf`.
        mesh: see `load_hf`.

    Raises:
        ModelFileError: tensors that are missing, unknown, of another shape or not of floats, or more of them than fit
            into the memory of this machine, or one with numbers that are not finite.
    """
    kept, products = jnp.dtype(dtype), jnp.dtype(dtype if compute_dtype is None else compute_dtype)
    check_fit(config, tensors, source=source)
    if mesh is None:
        check_memory(config, kept.itemsize, source=source)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), param_dtype=kept, compute_dtype=products))
    parts = _parts(model)
    placements = {} if mesh is None else _placements(parts, mesh)
    for number, part in enumerate(parts):
        held = []
        for name in part.names:
            with read_from(source):
                tensor = require_finite(tensors[name], name, source=source, dtype=kept)
            held.append(tensor.T if part.transposed else tensor)
        narrow = jnp.dtype(jnp.float32) if isinstance(part.parameter, RouterBias) else kept
        part.parameter.set_value(_on_device(held, part.stacked, narrow, placements.get(number)))
    return model


def model_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """All parameters of a model under their Hugging Face names, in their layout [out, in], adapters merged."""
    # A clone, because merging writes into the variables that models share.
    return {name: tensor for part in _parts(merge_lora(nnx.clone(model))) for name, tensor in part.tensors()}


def _parts(model: Transformer) -> list[Stored]:
    """Every parameter of the model with the tensors that hold it."""
    parts = [Stored(model.embedding, ("model.embed_tokens.weight",))]
    for index, block in enumerate([*model.layers, *model.further]):
        parts += [part.under(f"model.layers.{index}.") for part in stored_parts(block)]
    parts += model.final_norm.stored()
    if model.unembedding is not None:
        parts.append(Stored(model.unembedding, ("lm_head.weight",), transposed=True))
    return parts


def _on_device(tensors: list[np.ndarray], stacked: bool, dtype: jnp.dtype, placement: Sharding | None) -> jax.Array:
    """A JAX array that owns its memory, since parameters are donated and memory maps must not be."""
    whole = np.stack(tensors) if stacked else tensors[0]
    if placement is not None:
        return jax.device_put(whole.astype(dtype), placement)
    return jnp.array(whole, dtype=dtype, copy=True)


def _placements(parts: list[Stored], mesh: Mesh) -> dict[int, Sharding]:
    """Where each parameter goes on the mesh, by its number."""
    placed = shardings({number: part.parameter for number, part in enumerate(parts)}, mesh)
    return {number: variable.get_value() for number, variable in placed.items()}


def _is_conversion(folder: Path, origin: Mapping[str, str]) -> bool:
    """Whether the folder is a complete conversion of the GGUF file that `origin` describes."""
    try:
        header = SafetensorsFolder(folder).metadata
        read_json(folder / "config.json")
    except (ValueError, OSError):
        return False
    return all(header.get(key) == value for key, value in origin.items())
