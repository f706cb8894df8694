"""`export`: the trained policy of a run as a Hugging Face folder or a GGUF file, adapters merged."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from experiments import run_folder
from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import reject_unknown_fields
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from jaxrl_llm import SavedRun
from jaxrl_llm import load_run
from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.files import whole_folder
from jaxrl_llm.models.gguf_io import GGUFType
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.models.weights import save_hf
from jaxrl_llm.training import StorageError

GGUF_FILE = "model.gguf"


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write the model of a run for other programs, with its tokenizer; adapters are merged into the matrices."""

    run: tyro.conf.Positional[str]
    """A folder, experiment/id, an id, or an experiment's name (its newest run)."""
    folder: tyro.conf.Positional[Path]
    """New or empty; it appears whole or not at all."""
    to: Literal["hf", "gguf"]
    """A Hugging Face folder, or model.gguf for llama.cpp in the folder."""
    dtype: GGUFType = "F32"
    """Of the matrices in a GGUF file; a Hugging Face folder has those of the model."""
    step: int | None = None
    """The checkpoint of this step; the newest by default, 0 is the model before training."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def command(arguments: Sequence[str]) -> int:
    """`export` with these words; returns the exit status.

    Raises:
        UserError: it cannot be done as asked.
    """
    reject_unknown_fields(arguments, ["to", "dtype", "step", "runs-folder"], "export")
    asked = tyro.cli(ExportArguments, args=list(arguments), prog=f"{PROGRAM} export")
    run = run_folder.find_run(asked.run, asked.runs_folder)
    print(export_run(run, asked.folder, to=asked.to, dtype=asked.dtype, step=asked.step))
    return 0


def export_run(
    run: RunFolder, folder: Path, *, to: Literal["hf", "gguf"], dtype: GGUFType = "F32", step: int | None = None
) -> str:
    """Write the model; returns sentences that say what was written.

    Args:
        run: whose model.
        folder: new or empty.
        to: "hf" or "gguf".
        dtype: of the matrices of a GGUF file.
        step: of which checkpoint; None is the newest one.

    Raises:
        UserError: the folder is not empty or cannot be written, the run has no such checkpoint, or the model or its
            tokenizer cannot be written so.
    """
    if to == "hf" and dtype != "F32":
        raise UserError(f"Field --dtype is {dtype}; it is of GGUF files, a Hugging Face folder has the model's own.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not an empty folder; choose a new one.")
    try:
        saved = load_run(run.path, step=step)
        if to == "hf":
            save_hf(saved.model, folder, tokenizer=saved.tokenizer)
        else:
            size = 4 * num_parameters(saved.model.config)
            with whole_folder(folder, size=size) as draft:
                name = f"{run.label} step {saved.step}"
                save_gguf(saved.model, draft / GGUF_FILE, tokenizer=saved.tokenizer, dtype=dtype, name=name)
    except StorageError as error:
        raise UserError(str(error)) from error
    except (ValueError, OSError) as error:
        raise UserError(f"Run {run.label} cannot be exported: {error}") from error
    return _said(saved, folder, to)


def _said(saved: SavedRun, folder: Path, to: str) -> str:
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    said = f"written: {folder} ({files}), the model after {saved.step} steps."
    if isinstance(saved.tokenizer, ByteTokenizer):
        what = "tokenizer.json" if to == "hf" else "the file's vocabulary"
        said += (
            f" Its tokenizer is one token per byte, which no checkpoint comes with: {what} is a byte-level BPE without "
            "merges, which gives the same ids."
        )
    return said
