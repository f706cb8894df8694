"""Token trees: worlds of V tokens and T steps in which every context has its own distribution and everything is a
finite sum.

A policy is a list of T arrays; the t-th holds the logits of the V^t contexts at depth t, the context with tokens
a_1..a_t at row sum_i a_i V^(t-i). A sequence law is an array of V^T probabilities in the same order. float64
throughout, and every operation acts on all contexts of a depth at once.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.bounds import BoundInputs


def sequence_log_probs(policy):
    """log probability of every sequence."""
    return prefix_log_probs(policy)[-1]


def prefix_log_probs(policy):
    """log probability of reaching each context, one array per depth 0..T."""
    reached = [jnp.zeros(1)]
    for logits in policy:
        reached.append((reached[-1][:, None] + categorical.log_probs(logits)).reshape(-1))
    return reached


def responses(vocabulary, horizon):
    """Tokens of every response [V^T, T], and the row of its context at each depth, one array per depth."""
    tokens = np.indices((vocabulary,) * horizon).reshape(horizon, -1).T
    rows = [np.zeros(len(tokens), int)]
    for t in range(horizon - 1):
        rows.append(rows[-1] * vocabulary + tokens[:, t])
    return jnp.asarray(tokens), [jnp.asarray(row) for row in rows]


def token_log_probs(policy):
    """[V^T, T]: log probability of every token of every response in its context."""
    tokens, rows = responses(policy[0].shape[-1], len(policy))
    return jnp.stack(
        [categorical.log_probs(z)[row, tokens[:, t]] for t, (z, row) in enumerate(zip(policy, rows, strict=True))], 1
    )


def token_log_ratios(pi, mu):
    """[V^T, T]: log pi - log mu of every token of every sequence."""
    horizon, vocabulary = len(pi), pi[0].shape[-1]
    columns = []
    for t in range(horizon):
        ratio = (categorical.log_probs(pi[t]) - categorical.log_probs(mu[t])).reshape(-1)
        columns.append(jnp.repeat(ratio, vocabulary ** (horizon - t - 1)))
    return jnp.stack(columns, axis=1)


def error_of_surrogate(pi, mu, rewards):
    """(J(pi) - J(mu), L', Error) by enumeration, L' from its definition E_mu[R sum_t (rho_t - 1)]."""
    law_pi, law_mu = jnp.exp(sequence_log_probs(pi)), jnp.exp(sequence_log_probs(mu))
    gain = jnp.sum((law_pi - law_mu) * rewards)
    surrogate = jnp.sum(law_mu * rewards * jnp.sum(jnp.expm1(token_log_ratios(pi, mu)), axis=1))
    return gain, surrogate, gain - surrogate


def worst_error(pi, mu):
    """The largest |Error| over all rewards in [0, 1]: E_mu max(0, -X), X = prod_t rho_t - 1 - sum_t (rho_t - 1)."""
    ratios = token_log_ratios(pi, mu)
    after = jnp.cumsum(ratios[:, ::-1], axis=1)[:, ::-1] - ratios
    excess = jnp.sum(jnp.expm1(ratios) * jnp.expm1(after), axis=1)
    return jnp.sum(jnp.exp(sequence_log_probs(mu)) * jnp.maximum(-excess, 0.0))


def divergences(pi, mu):
    """Per depth: (probability of each context under mu, KL(mu || pi) there, TV there)."""
    reached = prefix_log_probs(mu)
    kl = [categorical.kl(m, p) for p, m in zip(pi, mu, strict=True)]
    tv = [categorical.total_variation(m, p) for p, m in zip(pi, mu, strict=True)]
    return [jnp.exp(r) for r in reached[:-1]], kl, tv


def bound_inputs(pi, mu):
    """Exact inputs of the bounds: maxima over all contexts, expectations over the law of mu."""
    reached, kl, tv = divergences(pi, mu)
    law_pi, law_mu = jnp.exp(sequence_log_probs(pi)), jnp.exp(sequence_log_probs(mu))
    return BoundInputs(
        max_kl=jnp.max(jnp.concatenate(kl)),
        max_tv=jnp.max(jnp.concatenate(tv)),
        sequence_kl=sum((jnp.sum(d * k) for d, k in zip(reached, kl, strict=True)), jnp.zeros(())),
        sequence_tv=jnp.sum(jnp.abs(law_pi - law_mu)) / 2,
        mean_tv_t=jnp.stack([jnp.sum(d * v) for d, v in zip(reached, tv, strict=True)]),
    )


def per_sequence(per_context):
    """[V^T, T]: the value of every context that a sequence visits, from one array per depth."""
    horizon = len(per_context)
    vocabulary = per_context[1].shape[0] if horizon > 1 else None
    if vocabulary is None:
        raise ValueError("per_context has one depth; it must have at least 2, from which the vocabulary is read.")
    columns = [jnp.repeat(x, vocabulary ** (horizon - t)) for t, x in enumerate(per_context)]
    return jnp.stack(columns, axis=1)


def performance_differences(pi, mu, rewards):
    """Per depth: (g(c) = sum_a (pi - mu)(a|c) Q^mu(c, a), probability of c under pi, under mu)."""
    gaps, value = [], rewards
    for p, m in zip(reversed(pi), reversed(mu), strict=True):
        q = value.reshape(m.shape)
        prob_pi, prob_mu = jnp.exp(categorical.log_probs(p)), jnp.exp(categorical.log_probs(m))
        gaps.insert(0, jnp.sum((prob_pi - prob_mu) * q, axis=-1))
        value = jnp.sum(prob_mu * q, axis=-1)
    reached = [[jnp.exp(r) for r in prefix_log_probs(policy)[:-1]] for policy in (pi, mu)]
    return gaps, reached[0], reached[1]


def draw(rng, *, worlds, vocabulary, horizon, noise, share, kind):
    """`worlds` trees at once, leading axis first: (pi, mu, rewards). Drawn by NumPy, which needs no compilation.

    noise, share: standard deviation of the logits' difference and share of contexts that differ, one number per world.
    kind: 0 uniform rewards in [0, 1], 1 binary, 2 one rewarded sequence, one number per world.
    """
    pi, mu = [], []
    for t in range(horizon):
        shape = (worlds, vocabulary**t, vocabulary)
        base, move = rng.normal(size=shape), rng.normal(size=shape)
        hit = rng.random((*shape[:2], 1)) < share[:, None, None]
        mu.append(jnp.asarray(base))
        pi.append(jnp.asarray(base + hit * noise[:, None, None] * move))
    uniform = rng.random((worlds, vocabulary**horizon))
    one = uniform == uniform.max(axis=1, keepdims=True)
    rewards = np.select([kind[:, None] == 0, kind[:, None] == 1], [uniform, uniform > 0.5], one)
    return pi, mu, jnp.asarray(rewards.astype(float))


def random_policy(key, *, vocabulary, horizon, scale=1.0):
    """Independent normal logits of standard deviation `scale` in every context."""
    keys = jax.random.split(key, horizon)
    return [scale * jax.random.normal(keys[t], (vocabulary**t, vocabulary)) for t in range(horizon)]


def perturb(key, policy, *, noise, share=1.0):
    """Add normal noise to the logits of a random share of the contexts."""
    moved = []
    for t, logits in enumerate(policy):
        one, two = jax.random.split(jax.random.fold_in(key, t))
        hit = jax.random.bernoulli(two, share, (logits.shape[0], 1))
        moved.append(logits + jnp.where(hit, noise * jax.random.normal(one, logits.shape), 0.0))
    return moved
