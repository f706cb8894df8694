"""Every theorem of the papers checked by exact enumeration in float64: `python -m theory_checks`."""
