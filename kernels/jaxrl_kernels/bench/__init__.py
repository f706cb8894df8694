"""Timing of every op against plain autodiff: `python -m jaxrl_kernels.bench`."""
