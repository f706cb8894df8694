"""Objectives, bounds and training for LLM reinforcement learning in JAX."""

from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from jaxrl_llm.training.saved_run import SavedRun as SavedRun
    from jaxrl_llm.training.saved_run import load_run as load_run


def __getattr__(name: str) -> Any:
    """`load_run` and `SavedRun`, imported when they are asked for: who takes an objective needs no model."""
    if name not in ("SavedRun", "load_run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxrl_llm.training import saved_run

    return saved_run.load_run if name == "load_run" else saved_run.SavedRun
