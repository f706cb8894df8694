"""Which implementation of an op runs: chosen by platform, or named by the caller and then never replaced by another."""

DEFAULTS = {"cpu": "xla", "gpu": "xla", "cuda": "xla", "rocm": "xla", "tpu": "xla"}
"""Implementation per platform when the caller names none."""


def resolve(op: str, implementation: str | None, available: tuple[str, ...], platform: str) -> str:
    """Name of the implementation of `op` that will run.

    Args:
        op: name of the public function, for messages.
        implementation: the caller's choice, or None for the platform's default.
        available: implementations that exist for this op.
        platform: platform that the program is traced for, as `jax.default_backend()` names it.

    Raises:
        ValueError: the name is not an implementation.
    """
    choices = ", ".join(repr(name) for name in available)
    if implementation is None:
        return DEFAULTS.get(platform, "xla")
    if implementation in available:
        return implementation
    raise ValueError(f"{op}: implementation must be None or one of {choices}, not {implementation!r}.")
