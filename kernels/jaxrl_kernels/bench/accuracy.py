"""Errors of the log-probabilities of bfloat16 inputs, at several sizes of the logits."""

import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import token_statistics

SCALES = (0.1, 1.0, 10.0, 30.0)
"""Standard deviations of the logits; the largest logit is four to five times that."""


def bfloat16_log_prob_errors(implementation: str | None = None) -> dict[str, float]:
    """Largest |error| of log_prob [nats] against float64 of the same bfloat16 inputs, by scale of the logits.

    Targets are drawn from the policy. For one drawn at random log_prob may be -280 at the largest scale, where the
    spacing of float32 is 3e-5.
    """
    rng = np.random.default_rng(0)
    rows, width, vocabulary = 64, 576, 4096
    found = {}
    for scale in SCALES:
        hidden, head = rng.standard_normal((rows, width)), rng.standard_normal((width, vocabulary))
        low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head * scale / width**0.5)]
        z = np.matmul(*(np.asarray(x.astype(jnp.float32), np.float64) for x in low))
        targets = np.argmax(z + rng.gumbel(size=z.shape), axis=1).astype(np.int32)
        top = z.max(axis=1)
        right = z[np.arange(rows), targets] - top - np.log(np.exp(z - top[:, None]).sum(axis=1))
        value = token_statistics(
            low[0], low[1], jnp.asarray(targets), statistics=("log_prob",), implementation=implementation
        ).log_prob
        found[str(scale)] = float(f"{np.abs(np.asarray(value, np.float64) - right).max():.2g}")
    return found
