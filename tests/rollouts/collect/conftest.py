"""Tokenizers with a chat format, files of JSON lines, and the tiny run."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.weights import conversion_or_none


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """One token per byte, with the control tokens of ChatML."""
    return ByteTokenizer(("<|im_start|>", "<|im_end|>"))


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The tokenizer of SmolLM2, from the conversion that other tests share."""
    folder = conversion_or_none(smollm2_path())
    return Tokenizer.from_gguf(smollm2_path()) if folder is None else Tokenizer.from_folder(folder)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of JSON lines."""

    def write(*records: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_run() -> ModuleType:
    """The tiny run of the tests of training."""
    path = Path(__file__).parents[2] / "training" / "tiny_run.py"
    spec = importlib.util.spec_from_file_location("tiny_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module
