"""Features of texts for exploration: computed once by an encoder or a language model and kept, or tuned with the agent.

Exploration takes features and knows of no model; this is where the two meet.
"""

import functools
import hashlib
import time
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.kept_arrays import KeptArrayError
from experiments.kept_arrays import read_array
from experiments.progress import PLAIN_SECONDS
from jaxrl_llm.exploration import Features
from jaxrl_llm.models import Transformer
from jaxrl_llm.models import combine
from jaxrl_llm.models.files import cache_folder
from jaxrl_llm.models.files import whole_file
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.sentences import all_minilm_l6
from jaxrl_llm.models.sentences import minilm_path
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.trainable import lora
from jaxrl_llm.pinned import sha256_of
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import PRNGKey

HASHED_WIDTH = 256
BATCH = 32
"""Texts that a language model reads at once."""

LENGTH = 48
"""Tokens of a text that a language model reads; few tweets are longer."""

LARGEST_ROW = 1 << 16
"""Bytes of one text's features, at most; no model here has a tenth of it."""

VERSION = 1
"""Of what is kept in the cache; a new one makes old files be made again."""


def hashed_words(texts: Sequence[str]) -> np.ndarray:
    """Counts of words, hashed into 256 signed places, scaled to unit length [N, 256]: no model, for tiny runs."""
    rows = np.zeros((len(texts), HASHED_WIDTH), np.float32)
    for place, text in enumerate(texts):
        for word in text.lower().split():
            code = zlib.crc32(word.encode())
            rows[place, code % HASHED_WIDTH] += 1.0 if code >> 31 else -1.0
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)


def minilm(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, 384] of all-MiniLM-L6-v2."""
    return all_minilm_l6().encode(texts, batch_size=BATCH)


def batches(count: int, model: str) -> Iterator[int]:
    """The first number of each batch of texts; says every ten seconds how far the model has read."""
    told = time.monotonic()
    for start in range(0, count, BATCH):
        yield start
        if time.monotonic() - told > PLAIN_SECONDS:
            told = time.monotonic()
            print(f"{model} has read {min(start + BATCH, count)} of {count} texts", flush=True)


class Tokens(NamedTuple):
    """Texts as left-padded rows."""

    ids: np.ndarray
    mask: np.ndarray


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Each text's first `length` tokens."""
    rows = [tokenizer.encode(text)[:length] for text in texts]
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), tokenizer.pad_id, np.int32), np.zeros((len(rows), width), bool)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, True
    return Tokens(ids, mask)


def smollm2(texts: Sequence[str], *, length: int = LENGTH) -> np.ndarray:
    """Hidden states [N, 576] of SmolLM2-135M at each text's last token."""
    model, tokenizer = smollm2_135m()
    read = nnx.jit(lambda model, ids, mask: model(ids, mask)[:, -1])
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    # Texts of like length together, in widths of which there are few.
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in batches(len(texts), "smollm2"):
        places = order[start : start + BATCH].tolist()
        ids, mask = tokens_of(tokenizer, [texts[int(place)] for place in places], length)
        room = ((BATCH - len(places), 0), (-ids.shape[1] % 16, 0))
        ids, mask = np.pad(ids, room), np.pad(mask, room)
        mask[: room[0][0], -1] = True  # rows without a text: one token, so that nothing is empty
        vectors[places] = np.asarray(read(model, jnp.asarray(ids), jnp.asarray(mask)))[room[0][0] :]
    return vectors


class Source(NamedTuple):
    """Where features come from.

    Attributes:
        compute: texts -> one row each.
        weights: the file that they depend on besides the texts; None where there is none.
    """

    compute: Callable[[Sequence[str]], np.ndarray]
    weights: Callable[[], Path] | None = None


SOURCES = {
    "hashed": Source(hashed_words),
    "minilm": Source(minilm, lambda: minilm_path() / "model.safetensors"),
    "smollm2": Source(smollm2, smollm2_path),
}


def require_source(name: str) -> None:
    """Raise a ModuleNotFoundError, which says how to install them, if the weights of these features are not there."""
    weights = SOURCES[name.removesuffix("_tuned")].weights
    if weights is not None:
        weights()


def text_features(name: str, texts: Sequence[str]) -> np.ndarray:
    """Features of the texts, from the cache if they were computed before.

    The file is named by the SHA-256 of the texts, of the weights and of what is computed, so it is never another's; one
    that is damaged is said to be so, and made again.

    Args:
        name: one of `SOURCES`.
        texts: N texts.

    Returns:
        one row per text, float32.
    """
    source = SOURCES[name]
    digest = hashlib.sha256(f"{name}/{VERSION}\0{chr(0).join(texts)}".encode())
    if source.weights is not None:
        digest.update(bytes.fromhex(sha256_of(source.weights())))
    path = cache_folder() / "features" / f"{name}-{digest.hexdigest()[:24]}.npy"
    if path.is_file():
        try:
            return _kept_rows(path, len(texts))
        except KeptArrayError as error:
            print(f"{error} The features are computed again.", flush=True)
    rows = source.compute(texts)
    with whole_file(path, size=rows.nbytes) as draft, draft.open("wb") as file:
        np.save(file, rows)
    return rows


def _kept_rows(path: Path, count: int) -> np.ndarray:
    """Features that were kept.

    Raises:
        KeptArrayError: the file cannot be read, or does not hold one row of finite numbers for each text.
    """
    rows = read_array(path, limit=LARGEST_ROW * max(count, 1))
    if rows.ndim != 2 or len(rows) != count or rows.dtype != np.float32 or not np.isfinite(rows).all():
        raise KeptArrayError(
            f"Cannot read {path}: it holds {rows.dtype} of shape {rows.shape}, expected {count} rows of finite float32."
        )
    return rows


class Projection(NamedTuple):
    """An affine map to the leading principal components, scaled to unit mean square norm, with a constant 1 behind.

    Attributes:
        centre: mean of the texts it was made from [P].
        directions: [P, C].
    """

    centre: np.ndarray
    directions: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, components: int) -> "Projection":
        """That of the given rows, at most as many components as there are."""
        centre = rows.mean(axis=0)
        _, _, axes = np.linalg.svd(rows - centre, full_matrices=False)
        directions = axes[:components].T
        norm = np.sqrt(np.mean(np.sum(np.square((rows - centre) @ directions), axis=1)))
        return cls(centre, directions / norm)

    def __call__(self, rows: Array) -> Array:
        """[..., P] to [..., C + 1]."""
        made = (rows - self.centre) @ self.directions
        return jnp.concatenate([made, jnp.ones((*made.shape[:-1], 1), made.dtype)], axis=-1)


class TunedTexts(NamedTuple):
    """Texts as a language model's lower layers leave them, and the upper layers as a function of their parameters.

    Attributes:
        states: of every text and token after the frozen layers [N, T, D].
        mask: which tokens are real [N, T].
        start: parameters of the adapters at first.
        rest: (parameters, states, mask) -> hidden state at the last token [B, D].
    """

    states: Array
    mask: Array
    start: Any
    rest: Callable[[Any, Array, Array], Array]


def tuned_smollm2(texts: Sequence[str], *, top: int, rank: int, length: int = LENGTH) -> TunedTexts:
    """SmolLM2-135M with adapters on its `top` last layers; the layers below are computed once.

    Args:
        texts: N texts.
        top: how many layers learn.
        rank: of the adapters.
        length: tokens of a text that are read [tokens].

    Returns:
        the texts and the function; at first it gives what the model gives.
    """
    model, tokenizer = smollm2_135m()
    return tuned_texts(model, tokens_of(tokenizer, texts, length), top=top, rank=rank)


def tuned_texts(model: Transformer, tokens: Tokens, *, top: int, rank: int) -> TunedTexts:
    """As `tuned_smollm2`, for any model."""
    choice = lora(rank, top=top)
    first = choice.first_layer(len(model.layers))
    trunk = nnx.jit(lambda model, ids, mask: model.trunk(ids, mask, stop=first))
    states = np.zeros((*tokens.ids.shape, model.config.hidden_size), np.float32)
    for begin in batches(len(states), "the frozen part"):
        ids, mask = tokens.ids[begin : begin + BATCH], tokens.mask[begin : begin + BATCH]
        missing = BATCH - len(ids)
        ids, mask = np.pad(ids, ((0, missing), (0, 0))), np.pad(mask, ((0, missing), (0, 0)), mode="edge")
        states[begin : begin + BATCH] = np.asarray(trunk(model, jnp.asarray(ids), jnp.asarray(mask)))[: BATCH - missing]
    graph, state = nnx.split(choice.prepare(model, rngs=nnx.Rngs(0)))
    learned, frozen = choice.partition(state)

    def rest(parameters: Any, states: Array, mask: Array) -> Array:
        whole = nnx.merge(graph, combine(parameters, frozen))
        return whole.from_trunk(states, mask, start=first)[:, -1]

    return TunedTexts(jnp.asarray(states), jnp.asarray(tokens.mask), learned, rest)


def tuned_features(texts: TunedTexts, components: int, training: np.ndarray) -> tuple[Features, np.ndarray]:
    """Features of numbered texts whose parameters are the adapters, and their values before any learning [N, C + 1].

    Args:
        texts: the texts.
        components: see `Projection`; it is fixed, made from the untuned states of the training texts.
        training: numbers of these texts.
    """
    read = jax.jit(texts.rest)
    count = len(texts.mask)
    rows = np.concatenate(
        [
            np.asarray(read(texts.start, texts.states[begin : begin + BATCH], texts.mask[begin : begin + BATCH]))
            for begin in range(0, count, BATCH)
        ]
    )
    projection = Projection.of(rows[training], components)

    def apply(parameters: Any, numbers: Array) -> Array:
        return projection(texts.rest(parameters, texts.states[numbers], texts.mask[numbers]))

    first: Callable[[PRNGKey], Any] = functools.partial(_always, texts.start)
    before = np.asarray(projection(jnp.asarray(rows)))
    return Features(first, apply, before.shape[1], (), jnp.int32), before


def _always(value: Any, key: PRNGKey) -> Any:
    return value
