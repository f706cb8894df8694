"""Weights in Hugging Face folders: safetensors files, one or several with an index, read lazily and written whole."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.files import write_json
from jaxrl_llm.models.hf_config import config_to_hf

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """The tensors of a folder by name; each is read when it is asked for, from a memory map.

    Attributes:
        metadata: the text entries of the file's header (of the first file, where there are several).

    Raises:
        FileNotFoundError: no weights in the folder, or files missing that its index names.
        ValueError: a file that is truncated or no safetensors file, or an index that names tensors its files lack.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, safetensors.safe_open] = {}
        self.metadata: dict[str, str] = {}
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected a Hugging Face checkpoint with {SINGLE}.")
        index = read_json(folder / INDEX, default={}).get("weight_map")
        names = sorted(set(index.values())) if index else [SINGLE]
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            named = f", which {INDEX} names" if index else f", nor {INDEX}"
            raise FileNotFoundError(f"{folder} has no {', '.join(missing)}{named}.")
        for name in reversed(names):
            handle = _open(folder / name)
            self._places |= dict.fromkeys(handle.keys(), handle)
            self.metadata = handle.metadata() or {}
        absent = sorted(set(index or ()) - set(self._places))
        if absent:
            raise ValueError(f"{folder / INDEX} names tensors that its files do not hold: {shortened(absent)}.")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._places[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_hf(
    folder: Path,
    config: TransformerConfig,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and model.safetensors into an existing folder.

    Args:
        folder: where to.
        config: the model's configuration.
        tensors: all tensors under their Hugging Face names.
        metadata: text entries for the header of the safetensors file.

    Raises:
        OSError: the disk refused.
    """
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    dtype = next(iter(arrays.values())).dtype.name
    write_json(folder / "config.json", config_to_hf(config, dtype=dtype))
    # transformers reads files only whose header names a framework; "pt" is what every writer puts there.
    header = {"format": "pt", **(metadata or {})}
    try:
        save_file(arrays, folder / SINGLE, header)
    except safetensors.SafetensorError as error:  # the library does not raise OSError for a full disk
        raise OSError(None, str(error)) from error
    # The library makes a file that only its owner may read, whatever the umask says.
    (folder / SINGLE).chmod((folder / "config.json").stat().st_mode)


def shortened(names: Sequence[str], *, most: int = 8) -> str:
    """The names as a list in words, cut after `most` of them."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _open(path: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again."
        ) from error
