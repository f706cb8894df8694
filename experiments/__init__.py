"""Experiments: one file is one claim. Run them with `python -m experiments`."""
