"""log p^A and its gradient against float64 NumPy, finite differences and the same formula with a sign flipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollouts.constrained import allowed_log_probs
from jaxrl_llm.rollouts.constrained import unpack_mask
from jaxrl_llm.rollouts.constrained.scoring import ROWS_AT_ONCE

ROWS, WIDTH, VOCABULARY, TEMPERATURE = ROWS_AT_ONCE + 6, 5, 77, 0.7
GENERATOR = np.random.default_rng(0)
HIDDEN = GENERATOR.normal(size=(ROWS, WIDTH))
HEAD = GENERATOR.normal(size=(WIDTH, VOCABULARY))
WEIGHTS = GENERATOR.normal(size=ROWS)
TARGETS = GENERATOR.integers(VOCABULARY, size=ROWS)
ALLOWED = GENERATOR.random((ROWS, VOCABULARY)) < 0.2
ALLOWED[np.arange(ROWS), TARGETS] = True
ALLOWED[0] = np.arange(VOCABULARY) == TARGETS[0]  # forced


def packed(allowed: np.ndarray) -> np.ndarray:
    bits = np.zeros((len(allowed), -(-VOCABULARY // 32) * 32), bool)
    bits[:, :VOCABULARY] = allowed
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def oracle(hidden: np.ndarray, head: np.ndarray, sign: float = -1.0) -> np.ndarray:
    z = hidden @ head / TEMPERATURE
    return z[np.arange(ROWS), TARGETS] + sign * np.log(np.sum(np.where(ALLOWED, np.exp(z), 0), axis=1))


@jax.jit
def weighed(hidden: jax.Array, head: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = allowed_log_probs(hidden, head, jnp.asarray(TARGETS), mask, temperature=TEMPERATURE)
    return jnp.sum(jnp.where(jnp.isfinite(found), found, 0) * WEIGHTS), found


ARGUMENTS = (jnp.float32(HIDDEN), jnp.float32(HEAD))
gradients = jax.jit(jax.value_and_grad(weighed, (0, 1), has_aux=True))


def test_log_probs_are_renormalised_over_the_allowed_tokens() -> None:
    (_, found), _ = gradients(*ARGUMENTS, packed(ALLOWED))
    np.testing.assert_allclose(found, oracle(HIDDEN, HEAD), atol=1e-5)
    assert found[0] == 0
    assert np.abs(found - oracle(HIDDEN, HEAD, sign=1.0)).max() > 1
    tied = allowed_log_probs(
        ARGUMENTS[0], ARGUMENTS[1].T, jnp.asarray(TARGETS), packed(ALLOWED), vocabulary_axis=0, temperature=TEMPERATURE
    )
    np.testing.assert_allclose(tied, found, atol=1e-5)


def test_the_gradient_is_the_target_minus_the_allowed_softmax() -> None:
    _, (by_hidden, by_head) = gradients(*ARGUMENTS, packed(ALLOWED))
    z = np.where(ALLOWED, HIDDEN @ HEAD / TEMPERATURE, -np.inf)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    for sign, holds in ((-1.0, True), (1.0, False)):
        by_logits = (np.eye(VOCABULARY)[TARGETS] + sign * p) * WEIGHTS[:, None] / TEMPERATURE
        for found, expected in ((by_hidden, by_logits @ HEAD.T), (by_head, HIDDEN.T @ by_logits)):
            assert np.allclose(found, expected, atol=1e-5 * np.abs(expected).max()) == holds
    # A forced token teaches nothing, nor does a token that was not allowed.
    np.testing.assert_allclose(by_hidden[0], 0, atol=1e-6)
    unused = ~ALLOWED.any(axis=0)
    np.testing.assert_array_equal(np.asarray(by_head)[:, unused], 0)
    step, direction = 1e-6, GENERATOR.normal(size=HIDDEN.shape)
    ahead, behind = (np.sum(oracle(HIDDEN + sign * step * direction, HEAD) * WEIGHTS) for sign in (1, -1))
    np.testing.assert_allclose(np.sum(by_hidden * direction), (ahead - behind) / (2 * step), rtol=1e-4)


def test_a_target_outside_has_no_probability_and_no_gradient() -> None:
    allowed = ALLOWED.copy()
    allowed[1, TARGETS[1]], allowed[2] = False, False
    (_, found), (by_hidden, by_head) = gradients(*ARGUMENTS, packed(allowed))
    assert np.all(np.isneginf(found[1:3]))
    np.testing.assert_array_equal(by_hidden[1:3], 0)
    np.testing.assert_allclose(found[3:], oracle(HIDDEN, HEAD)[3:], atol=1e-5)
    assert np.isfinite(by_head).all()


def test_bits_are_tokens() -> None:
    np.testing.assert_array_equal(unpack_mask(jnp.asarray(packed(ALLOWED)), VOCABULARY), ALLOWED)


def test_arguments_that_do_not_fit() -> None:
    hidden, head = ARGUMENTS
    targets, mask = jnp.asarray(TARGETS), packed(ALLOWED)
    with pytest.raises(ValueError, match="targets has shape"):
        allowed_log_probs(hidden, head, targets[:3], mask)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        allowed_log_probs(hidden, head, targets, mask, temperature=0)
    with pytest.raises(ValueError, match="mask has dtype uint32 and 2 words; it must be uint32 with 3 words"):
        unpack_mask(mask[:, :2], VOCABULARY)
    with pytest.raises(ValueError, match="mask has dtype bool"):
        unpack_mask(ALLOWED[:, :3], VOCABULARY)
