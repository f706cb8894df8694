import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import bound_inputs_from_scalars
from jaxrl_llm.bounds import largest_max_kl


@pytest.mark.parametrize("name", SHARP)
def test_the_bound_meets_its_target_there_and_not_beyond(name):
    delta = largest_max_kl(SHARP[name], target=0.5, horizon=64)
    for factor, fits in ((0.99, True), (1.01, False)):
        value = SHARP[name](bound_inputs_from_scalars(max_kl=factor * delta, horizon=64))
        assert bool(value <= 0.5) == fits


def test_against_the_closed_form():
    # T (T - 1) eps^2 with eps^2 = delta / 2.
    delta = largest_max_kl(SHARP["classical"], target=0.3, horizon=10)
    np.testing.assert_allclose(delta, 0.3 / 90 * 2, rtol=1e-4)
    assert float(largest_max_kl(SHARP["classical"], target=0.3, horizon=1)) == 50.0
    assert float(largest_max_kl(SHARP["classical"], target=-1.0, horizon=10)) == 0.0


def test_a_known_sequence_divergence_helps_and_jit_works():
    def solve(target, sequence_kl=None):
        return largest_max_kl(SHARP["mixed_kl"], target=target, horizon=512, sequence_kl=sequence_kl)

    alone = jax.jit(solve)(jnp.array(1.0))
    helped = jax.jit(solve)(jnp.array(1.0), jnp.array(1e-4))
    assert float(helped) > 2 * float(alone)
