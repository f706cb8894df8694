"""Plans take of equal actions the first, and values stay within what rewards can add up to."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.tabular import first_maxima
from jaxrl_llm.tabular import value_ranges


def test_first_maxima_are_argmax(key):
    values = jax.random.randint(key, (500, 6), 0, 4).astype(jnp.float32)
    np.testing.assert_array_equal(first_maxima(values), jnp.argmax(values, axis=1))
    np.testing.assert_array_equal(jax.vmap(first_maxima)(values), jnp.argmax(values, axis=1))
    assert int(first_maxima(jnp.full(4, jnp.nan))) == 3


def test_value_ranges_are_the_steps_that_are_left():
    np.testing.assert_array_equal(value_ranges(4), [3.0, 2.0, 1.0, 0.0])
