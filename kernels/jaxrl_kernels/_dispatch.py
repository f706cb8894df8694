"""Which implementation of an op runs: a default, or named by the caller and then never replaced by another."""

import jax

NEEDS = (0, 11)
"""First jax whose Mosaic GPU has what the kernels use."""

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])

DEFAULT = "xla"
"""Implementation when the caller names none. On one Hopper GPU an op may know a better one."""


def resolve(op: str, implementation: str | None, available: tuple[str, ...]) -> str:
    """Name of the implementation of `op` that will run.

    Args:
        op: name of the public function, for messages.
        implementation: the caller's choice, or None for the default.
        available: implementations that exist for this op.

    Raises:
        ValueError: the name is not an implementation.
    """
    choices = ", ".join(repr(name) for name in available)
    if implementation is None:
        return DEFAULT
    if implementation in available:
        return implementation
    raise ValueError(f"{op}: implementation must be None or one of {choices}, not {implementation!r}.")


def one_hopper() -> bool:
    """Whether the process computes on one Hopper GPU, with a jax that has what the kernels need.

    Over several GPUs the compiler shards an XLA program by itself, and a kernel it cannot.
    """
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    devices = jax.devices() if default is None else jax.devices(getattr(default, "platform", default))
    return len(devices) == 1 and getattr(devices[0], "compute_capability", None) == "9.0" and VERSION >= NEEDS
