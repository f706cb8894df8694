"""Weights in Hugging Face folders: safetensors files, one or several with an index, read lazily and written whole."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import MissingModelFileError
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import is_there
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.files import write_json
from jaxrl_llm.models.hf_config import config_to_hf
from jaxrl_llm.models.safetensors_header import read_safetensors_header
from jaxrl_llm.models.stored import StoredTensors
from jaxrl_llm.models.stored import shortened as shortened

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder(StoredTensors):
    """The tensors of a folder by name; each is read when it is asked for, from a memory map.

    Where an index names the file of a tensor, that file counts: another file may hold an old copy of it.

    Attributes:
        metadata: the text entries of the file's header (of the first file, where there are several).
        shapes, dtypes: see `StoredTensors`.

    Raises:
        MissingModelFileError: no weights in the folder, or files missing that its index names.
        ModelFileError: a file that is truncated or no safetensors file, a tensor of unknown place or of a kind that
            numpy has not, or an index that names tensors its files lack.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, safetensors.safe_open] = {}
        if not folder.is_dir():
            raise MissingModelFileError(f"{folder} is not a folder; expected a Hugging Face checkpoint with {SINGLE}.")
        index = _index(folder)
        names = sorted(set(index.values())) if index else [SINGLE]
        missing = [name for name in names if not is_there(folder / name)]
        if missing:
            named = f", which {INDEX} names" if index else f", nor {INDEX}"
            raise MissingModelFileError(f"{folder} has no {shortened(missing)}{named}.")
        headers = {name: read_safetensors_header(folder / name) for name in names}
        self.metadata = headers[names[0]].metadata
        self._places = _places(folder, index, {name: header.shapes for name, header in headers.items()})
        self.shapes = {tensor: headers[name].shapes[tensor] for tensor, name in self._places.items()}
        self.dtypes = {tensor: headers[name].dtypes[tensor] for tensor, name in self._places.items()}
        for name in names:
            with read_from(folder / name):
                self._files[name] = safetensors.safe_open(folder / name, framework="np")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._places[name]].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _index(folder: Path) -> dict[str, str]:
    """File of each tensor, as the folder's index names it; empty without an index."""
    path = folder / INDEX
    content = read_json(path, default={})
    if not content:
        return {}
    index = content.get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ModelFileError(f"{path} has no weight_map of tensors and names of files.")
    outside = sorted({name for name in index.values() if name in ("", ".", "..") or set(name) & set("/\\\0")})
    if outside:
        raise ModelFileError(f"{path} names {shortened(outside)!r:.300}; expected names of files of the same folder.")
    return index


def _places(folder: Path, index: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The file that counts for each tensor; what the index does not name must lie in one file only."""
    absent = sorted(tensor for tensor, name in index.items() if tensor not in held[name])
    if absent:
        raise ModelFileError(f"{folder / INDEX} names tensors that its files do not hold: {shortened(absent)}.")
    places = dict(index)
    for name, tensors in held.items():
        for tensor in tensors:
            if tensor not in index and places.setdefault(tensor, name) != name:
                raise ModelFileError(
                    f"{folder} has {tensor} in {places[tensor]} and in {name}, and {INDEX} names neither."
                )
    return places


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
