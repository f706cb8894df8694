"""Tokenizers with a chat format, files of JSON lines, and the tiny run."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.weights import conversion_or_none
from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.trajectory import single_step


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


class Counting:
    """Batches whose tokens, rewards and cursor say their number; nobody's weights are needed."""

    def __init__(self, *, rows: int = 4, group_size: int = 2, width: int = 3, first_group: int = 0) -> None:
        self.shape = BatchShape(rows, group_size, width, width - 1)
        self.first_group, self.calls = first_group, []

    def collect(self, policy, key, step, cursor) -> Experience:
        number, shape = cursor.get("number", 0) + 1, self.shape
        self.calls.append((step, number, policy.version))
        tokens = np.full((shape.rows, shape.width), step, np.int32)
        chosen = np.broadcast_to(np.arange(shape.width) > 0, tokens.shape).copy()
        trajectories = single_step(
            tokens,
            np.ones_like(chosen),
            chosen,
            group_ids=self.first_group + np.arange(shape.rows, dtype=np.int32) // shape.group_size,
            outcomes=np.arange(shape.rows) + 10.0 * step,
            ended=np.ones(shape.rows, bool),
            log_prob_behaviour=np.where(chosen, np.float32(-step - 1), np.float32(0)),
            version=policy.version,
        )
        return Experience(
            trajectories,
            per_row={"own": np.linspace(0.1, 0.9, shape.rows, dtype=np.float32) + np.float32(step)},
            metrics={"own/number": np.float32(number)},
            samples=({"number": number},),
            texts=tuple(f"row {row}" for row in range(shape.rows)),
            cursor={"number": number},
        )


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


@pytest.fixture(scope="session")
def at_version() -> Callable[[int], PolicySnapshot]:
    """A policy of that version, with one array."""
    return lambda version: PolicySnapshot(
        None,  # pyright: ignore[reportArgumentType]
        nnx.State({"weight": nnx.Param(jnp.full(2, version))}),
        version,
    )
