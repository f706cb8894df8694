import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import hybrid

STUDENT = jnp.array([[0.5, -0.2, 1.0, -1.5, 0.1], [2.0, 0.3, -0.4, 0.0, 0.6]])
TEACHER = jnp.array([[0.1, 0.4, 0.2, -0.3, 0.9], [1.0, 1.2, -1.0, 0.5, -0.2]])


def test_fixture_of_the_notes():
    z, w = jnp.log(jnp.array([0.6, 0.4])), jnp.log(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(categorical.kl(z, w), 0.0201355, rtol=1e-4)
    np.testing.assert_allclose(hybrid.dense_gradient(z, w), [0.0973116, -0.0973116], rtol=1e-5)


def test_dense_gradient_is_that_of_the_kl():
    gradient = jax.vmap(jax.grad(categorical.kl))(STUDENT, TEACHER)
    np.testing.assert_allclose(hybrid.dense_gradient(STUDENT, TEACHER), gradient, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(gradient, axis=1), [0, 0], atol=1e-6)
    backward = jax.vmap(jax.grad(lambda z, w: categorical.kl(w, z)))(STUDENT, TEACHER)
    assert float(jnp.max(jnp.abs(backward - gradient))) > 0.01


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_top_k_values_and_gradients(k):
    for z, w in zip(STUDENT, TEACHER, strict=True):
        p, q = np.asarray(jax.nn.softmax(z), np.float64), np.asarray(jax.nn.softmax(w), np.float64)
        top = np.argsort(-p)[:k]
        inside = np.isin(np.arange(5), top)
        log_ratio = np.log(p / q)

        value, slope = jax.value_and_grad(lambda z, w=w: hybrid.top_k_kl_partial(z, w, k=k))(z)
        np.testing.assert_allclose(value, (p * log_ratio)[inside].sum(), rtol=1e-4, atol=1e-6)
        expected = p * (inside * (log_ratio + 1) - (p * (log_ratio + 1))[inside].sum())
        np.testing.assert_allclose(slope, expected, atol=1e-5)

        value, slope = jax.value_and_grad(lambda z, w=w: hybrid.top_k_kl_renormalised(z, w, k=k))(z)
        rp, rq = p[inside] / p[inside].sum(), q[inside] / q[inside].sum()
        np.testing.assert_allclose(value, (rp * np.log(rp / rq)).sum(), rtol=1e-4, atol=1e-6)
        expected = np.zeros(5)
        expected[inside] = rp * (np.log(rp / rq) - value)
        np.testing.assert_allclose(slope, expected, atol=1e-5)

        value, slope = jax.value_and_grad(lambda z, w=w: hybrid.top_k_kl_with_tail(z, w, k=k))(z)
        bp, bq = np.append(p[inside], p[~inside].sum()), np.append(q[inside], q[~inside].sum())
        kept = bp > 0
        np.testing.assert_allclose(value, (bp[kept] * np.log(bp[kept] / bq[kept])).sum(), rtol=1e-4, atol=1e-6)
        assert float(value) <= float(categorical.kl(z, w)) + 1e-6
        assert np.all(np.isfinite(slope))


def test_top_k_forms_at_the_whole_vocabulary_are_the_kl():
    exact = categorical.kl(STUDENT, TEACHER)
    for form in (hybrid.top_k_kl_partial, hybrid.top_k_kl_renormalised, hybrid.top_k_kl_with_tail):
        np.testing.assert_allclose(form(STUDENT, TEACHER, k=5), exact, rtol=1e-5)
    np.testing.assert_allclose(hybrid.top_k_kl_with_tail(STUDENT, TEACHER, k=4), exact, rtol=1e-5)


def test_the_partial_form_can_be_negative():
    z, w = jnp.log(jnp.array([0.6, 0.39, 0.01])), jnp.log(jnp.array([0.65, 0.345, 0.005]))
    assert float(hybrid.top_k_kl_partial(z, w, k=1)) < 0


def test_sparse_coefficient_against_the_sums():
    rng = np.random.default_rng(0)
    divergence, rewards = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    baseline = np.array([0.3, -0.1, 5.0], np.float32)
    dirty = [jnp.where(jnp.asarray(mask), jnp.asarray(x), jnp.nan) for x in (divergence, rewards)]
    for discount in (0.0, 0.7, 1.0):
        value = hybrid.sparse_coefficient(
            *dirty, jnp.asarray(mask), discount=discount, reward_weight=1.7, baseline=jnp.asarray(baseline)
        )
        expected = np.zeros((3, 6))
        for i in range(3):
            s = np.flatnonzero(mask[i])
            for n, t in enumerate(s):
                future = sum(discount**m * divergence[i, u] for m, u in enumerate(s[n:]) if m > 0)
                reward = sum(discount**m * rewards[i, u] for m, u in enumerate(s[n:]))
                expected[i, t] = future - 1.7 * (reward - baseline[i])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_terminal_rewards_sit_on_the_last_response_token():
    mask = jnp.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    placed = hybrid.terminal_rewards(jnp.array([2.0, 3.0, 4.0]), mask)
    np.testing.assert_array_equal(placed, [[0, 0, 2, 0], [0, 0, 0, 3], [0, 0, 0, 0]])


def test_chunked_loss_has_the_gradient_of_the_dense_plus_the_sparse_part(key):
    from jaxrl_kernels import Reference

    keys = jax.random.split(key, 6)
    hidden, head = jax.random.normal(keys[0], (7, 4)), jax.random.normal(keys[1], (4, 9))
    teacher = Reference(jax.random.normal(keys[2], (7, 3)), jax.random.normal(keys[3], (3, 9)))
    targets, coefficient = jax.random.randint(keys[4], (7,), 0, 9), jax.random.normal(keys[5], (7,))
    mask = jnp.array([1, 1, 0, 1, 1, 1, 0], bool)

    def chunked(hidden, head):
        total, count = hybrid.chunked_hybrid_loss(hidden, head, targets, coefficient, teacher, mask=mask)
        return total / count

    slopes = jax.grad(chunked, argnums=(0, 1))(hidden, head)
    z = hidden @ head
    per_logit = hybrid.dense_gradient(z, teacher.hidden @ teacher.head)
    residual = jax.nn.one_hot(targets, 9) - jax.nn.softmax(z)
    per_logit = jnp.where(mask[:, None], per_logit + coefficient[:, None] * residual, 0.0) / 5
    np.testing.assert_allclose(slopes[0], per_logit @ head.T, atol=1e-5)
    np.testing.assert_allclose(slopes[1], hidden.T @ per_logit, atol=1e-5)


def test_schedules():
    for schedule in (hybrid.linear_warmup, hybrid.cosine_warmup):
        values = [float(schedule(s, steps=10, final=2.0)) for s in (0, 5, 10, 50)]
        np.testing.assert_allclose(values, [0.0, 1.0, 2.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(hybrid.cosine_warmup(2, steps=10), (1 - np.cos(np.pi / 5)) / 2, rtol=1e-5)
    values = [float(hybrid.log_linear(s, steps=4, start=0.01, final=4.0)) for s in (0, 2, 4, 9)]
    np.testing.assert_allclose(values, [0.01, 0.2, 4.0, 4.0], rtol=1e-5)


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match="k is 9; it must lie between 1 and the vocabulary size 5"):
        hybrid.top_k_kl_with_tail(STUDENT, TEACHER, k=9)
    with pytest.raises(ValueError, match="their shapes must be equal"):
        hybrid.hybrid_losses(jnp.ones(2), jnp.ones(3), jnp.ones(2))
