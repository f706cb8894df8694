import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import masks

NAN = jnp.nan
KL = jnp.array([[NAN, 0.02, 0.04, NAN], [NAN, 0.06, 0.0, 0.0], [NAN, 0.0, NAN, NAN], [NAN] * 4, [NAN, 0.0, NAN, 0.0]])
MASK = jnp.array([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)


def test_exact_tests():
    # Rows: all small; one spike; one token; no token (accepted); a NaN statistic inside (rejected).
    by_maximum = masks.accept_by_maximum(KL, MASK, threshold=0.05)
    np.testing.assert_array_equal(by_maximum, [True, False, True, True, False])
    by_average = masks.accept_by_average(KL, MASK, threshold=0.025)
    np.testing.assert_array_equal(by_average, [False, True, True, True, False])
    both = masks.accept_by_both(KL, MASK, maximum=0.05, average=0.025)
    np.testing.assert_array_equal(both, [False, False, True, True, False])


def test_an_infinite_divergence_rejects():
    kl = jnp.array([[0.0, jnp.inf]])
    every = jnp.ones((1, 2), bool)
    assert not bool(masks.accept_by_maximum(kl, every, threshold=1e9)[0])
    assert not bool(masks.accept_by_average(kl, every, threshold=1e9)[0])


@pytest.mark.parametrize(("threshold", "low", "high"), [(0.05, 0.729, 1.372), (0.1, 0.639, 1.564)])
def test_sampled_maximum_accepts_the_published_interval_of_ratios(threshold, low, high):
    ratios = jnp.array([low - 0.001, low + 0.001, high - 0.001, high + 0.001])
    accepted = masks.accept_by_sampled_maximum(jnp.log(ratios)[:, None], jnp.ones((4, 1), bool), threshold=threshold)
    np.testing.assert_array_equal(accepted, [False, True, True, False])


def test_sampled_average_uses_k3_of_the_right_direction():
    # k3 of a ratio of 100 is 94.4, of 1/100 it is 3.62; exchanged policies would exchange them.
    log_ratio = jnp.log(jnp.array([[100.0], [0.01]]))
    every = jnp.ones((2, 1), bool)
    np.testing.assert_array_equal(masks.accept_by_sampled_average(log_ratio, every, threshold=94.5), [True, True])
    np.testing.assert_array_equal(masks.accept_by_sampled_average(log_ratio, every, threshold=94.3), [False, True])
    np.testing.assert_array_equal(masks.accept_by_sampled_average(log_ratio, every, threshold=3.6), [False, False])
    both = masks.accept_by_sampled_both(log_ratio, every, maximum=11.0, average=50.0)
    np.testing.assert_array_equal(both, [False, True])
    np.testing.assert_array_equal(
        masks.accept_by_sampled_both(log_ratio, every, maximum=10.5, average=50.0), [False, False]
    )


def test_sampled_tests_miss_what_exact_ones_see():
    # Tokens 1 and 2 were exchanged, token 0 was sampled: its ratio is 1, the exact KL is not (errata F2.15).
    from jaxrl_llm import categorical

    mu, pi = jnp.log(jnp.array([0.5, 0.49, 0.01])), jnp.log(jnp.array([0.5, 0.01, 0.49]))
    kl = categorical.kl(mu, pi)[None, None]
    one = jnp.ones((1, 1), bool)
    assert bool(masks.accept_by_sampled_maximum((pi - mu)[:1][None], one, threshold=0.05)[0])
    assert not bool(masks.accept_by_maximum(kl, one, threshold=0.05)[0])


def test_length_neutral_tests():
    ratio = jnp.array([[1.1, 0.9, 1.0, 1.0], [1.2, 1.0, 1.0, 1.0]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(masks.accept_by_ratio_deviation(ratio, mask, threshold=0.06), [False, True])
    weights = jnp.array([3.0, 2.0, 1.0, 0.0])
    # sum |rho - 1| w / sum w: (0.3 + 0.2) / 5 = 0.1 and 0.6 / 6 = 0.1; without weights 0.1 and 0.05.
    accepted = masks.accept_by_weighted_ratio_deviation(ratio, mask, weights, threshold=0.1001)
    np.testing.assert_array_equal(accepted, [True, True])
    accepted = masks.accept_by_weighted_ratio_deviation(ratio, mask, weights, threshold=0.0999)
    np.testing.assert_array_equal(accepted, [False, False])


def test_rejected_mass_counts_tokens_and_sequences():
    accepted = jnp.array([True, False, False, True, False])
    np.testing.assert_array_equal(masks.rejected_sequences(accepted, MASK), [3, 4])
    np.testing.assert_array_equal(masks.rejected_tokens(accepted, MASK), [7, 9])


def test_a_mask_is_a_constant():
    def kept(kl):
        return jnp.sum(jnp.where(masks.accept_by_maximum(kl, MASK[:3], threshold=0.05), 1.0, 0.0))

    np.testing.assert_array_equal(jax.grad(kept)(jnp.nan_to_num(KL[:3])), np.zeros((3, 4)))


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match=r"response_mask is bool\[2, 4\] and kl_t is float32\[5, 4\]"):
        masks.accept_by_maximum(KL, MASK[:2], threshold=0.1)


TESTS = {
    "maximum": lambda x, m: masks.accept_by_maximum(x, m, threshold=0.05),
    "average": lambda x, m: masks.accept_by_average(x, m, threshold=0.05),
    "both": lambda x, m: masks.accept_by_both(x, m, maximum=0.05, average=0.05),
    "sampled_maximum": lambda x, m: masks.accept_by_sampled_maximum(x, m, threshold=0.05),
    "sampled_average": lambda x, m: masks.accept_by_sampled_average(x, m, threshold=0.05),
    "sampled_both": lambda x, m: masks.accept_by_sampled_both(x, m, maximum=0.05, average=0.05),
    "ratio_deviation": lambda x, m: masks.accept_by_ratio_deviation(1 + x, m, threshold=0.05),
    "weighted": lambda x, m: masks.accept_by_weighted_ratio_deviation(1 + x, m, jnp.ones(3), threshold=0.05),
}


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("broken", [jnp.inf, -jnp.inf, jnp.nan, 1e9, 3e38])
def test_one_token_that_is_not_a_small_number_rejects(name, broken):
    """A log-ratio of +inf made the mean of k3 -inf, which is below every threshold."""
    x = jnp.array([[0.0, 0.0, 0.0], [0.0, broken, 0.0], [0.0, 0.0, broken], [broken, broken, broken]])
    mask = jnp.array([[True] * 3, [True] * 3, [True, True, False], [False] * 3])
    np.testing.assert_array_equal(TESTS[name](x, mask), [True, False, True, True])
