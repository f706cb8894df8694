"""`python -m theory_checks`: float64 must be on before anything is computed."""

import sys

import jax

jax.config.update("jax_enable_x64", True)

from theory_checks.cli import main  # noqa: E402

sys.exit(main())
