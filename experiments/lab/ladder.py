"""A ladder of states: a long task whose reward depends on every token, and in which all but one number is exact.

In each state one token climbs a rung, some fall to the ground, the others stay; the reward is the height after T tokens
as a share of the ladder. Whoever falls once in a while never gets far, so that rare tokens decide. The policy is a
table of logits, one row per state. State and token give the next state, so policies are Markov chains: J, the surrogate
and the divergences are forward recursions over T steps, where responses themselves could not be enumerated. The number
that is not exact is the total variation between their laws, D_TV: it is bounded from above.
"""

import jax
import jax.numpy as jnp

from experiments.lab.world import Exact
from experiments.lab.world import Sampled
from experiments.lab.world import World
from experiments.lab.world import covers
from jaxrl_llm import categorical
from jaxrl_llm.bounds import BoundInputs
from jaxrl_llm.bounds import tv_bound_from_kl
from jaxrl_llm.rollouts.perturb import LogitPerturbation
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

UP = 0
"""The token that climbs, before the tokens of each state are shuffled."""


def moves(key: PRNGKey, *, rungs: int, vocabulary: int, traps: int) -> Int[Array, "S V"]:
    """The state that follows: in a random order of the tokens, one climbs, `traps` fall to state 0, the others stay."""
    here = jnp.arange(rungs)[:, None]
    kind = jnp.arange(vocabulary)
    follows = jnp.where(kind == UP, jnp.minimum(here + 1, rungs - 1), jnp.where(kind <= traps, 0, here))
    return jax.vmap(jax.random.permutation)(jax.random.split(key, rungs), follows)


def state_keys(noise_key: PRNGKey, states: Int[Array, "*shape"]) -> Array:
    """The key of each context: its state, which is all of the context that the policy reads."""
    flat = jax.vmap(jax.random.fold_in, (None, 0))(noise_key, states.reshape(-1))
    return flat.reshape(states.shape)


def transformed(table: Float[Array, "S V"], transform: LogitPerturbation, noise_key: PRNGKey) -> Float[Array, "S V"]:
    """The logits that an engine samples with."""
    return transform(table, state_keys(noise_key, jnp.arange(table.shape[0])))


def measured(pi: Float[Array, "S V"], mu: Float[Array, "S V"], follows: Int[Array, "S V"], *, horizon: int) -> Exact:
    """J(pi), J(mu), L' and the inputs of the bounds, by one recursion over the laws of the states.

    With m_t(s) = E_mu[1(s_t = s) sum_{j<=t} (rho_j - 1)]: m_{t+1} = m_t P_mu + d_t^mu (P_pi - P_mu), and L' = m_T . R.
    `max_kl`, `max_tv` and `covered` are over all states, sequence_tv is an upper bound.
    """
    states = pi.shape[0]
    rewards = jnp.arange(states) / (states - 1)
    law_pi, law_mu = jnp.exp(categorical.log_probs(pi)), jnp.exp(categorical.log_probs(mu))
    onto = jax.nn.one_hot(follows, states, dtype=pi.dtype)
    step_pi, step_mu = (jnp.einsum("sa,sat->st", law, onto) for law in (law_pi, law_mu))
    kl, tv = categorical.kl(mu, pi), categorical.total_variation(mu, pi)

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        at_mu, at_pi, deviation = carry
        # A state that is never reached adds nothing, however far apart the policies are there.
        spent = jnp.where(at_mu > 0, at_mu * kl, 0).sum()
        deviation = deviation @ step_mu + at_mu @ (step_pi - step_mu)
        return (at_mu @ step_mu, at_pi @ step_pi, deviation), (spent, at_mu @ tv)

    start = jnp.zeros(states).at[0].set(1.0)
    ends, (kl_t, tv_t) = jax.lax.scan(step, (start, start, jnp.zeros(states)), length=horizon)
    at_mu, at_pi, deviation = ends
    sequence_kl = jnp.sum(kl_t)
    sequence_tv = jnp.minimum(jnp.minimum(1.0, jnp.sum(tv_t)), tv_bound_from_kl(sequence_kl))
    inputs = BoundInputs(jnp.max(kl), jnp.max(tv), sequence_kl, sequence_tv, tv_t)
    return Exact(at_pi @ rewards, at_mu @ rewards, deviation @ rewards, inputs, jnp.all(covers(mu, pi)))


def ladder(key: PRNGKey, *, horizon: int, rungs: int, vocabulary: int, traps: int, answers: int) -> World:
    """The world.

    Args:
        key: of the order of the tokens in each state.
        horizon: T.
        rungs: states.
        vocabulary: tokens.
        traps: tokens of each state that fall to the ground.
        answers: responses per batch, all to one prompt.

    Raises:
        ValueError: for sizes with which there is nothing to learn.
    """
    for name, size, least in (
        ("horizon", horizon, 2),
        ("rungs", rungs, 2),
        ("answers", answers, 2),
        ("traps", traps, 1),
    ):
        if size < least:
            raise ValueError(f"{name} is {size}; it must be at least {least}.")
    if vocabulary < traps + 1:
        raise ValueError(f"vocabulary is {vocabulary}; it must be at least {traps + 1}, to hold {traps} traps.")
    follows = moves(key, rungs=rungs, vocabulary=vocabulary, traps=traps)

    def sample(table: Array, transform: LogitPerturbation, key: PRNGKey, noise_key: PRNGKey) -> Sampled:
        mu = jnp.exp(categorical.log_probs(transformed(table, transform, noise_key)))
        # Sum of the first tokens' probabilities: the first above a uniform number is the token, never one of mass 0.
        cumulated = jnp.cumsum(mu, axis=-1)

        def step(states: Array, uniforms: Array) -> tuple[Array, tuple[Array, Array]]:
            levels = cumulated[states]
            tokens = jnp.sum(levels <= (uniforms * levels[:, -1])[:, None], axis=-1)
            return follows[states, tokens], (states, tokens)

        first = jnp.zeros(answers, jnp.int32)
        last, (states, tokens) = jax.lax.scan(step, first, jax.random.uniform(key, (horizon, answers)))
        return Sampled(
            tokens=tokens.T,
            mask=jnp.ones((answers, horizon), bool),
            rewards=last / (rungs - 1),
            group_ids=jnp.zeros(answers, jnp.int32),
            clusters=jnp.arange(answers),  # there is one prompt, which was not drawn
            texts=None,
            keys=state_keys(noise_key, jnp.arange(rungs)),
            row=states.T,
        )

    def exact(
        pi: Array, pi_transform: LogitPerturbation, mu: Array, mu_transform: LogitPerturbation, noise_key: PRNGKey
    ) -> Exact:
        tables = transformed(pi, pi_transform, noise_key), transformed(mu, mu_transform, noise_key)
        return measured(*tables, follows, horizon=horizon)

    return World(
        horizon=horizon,
        init=lambda key: 0.1 * jax.random.normal(key, (rungs, vocabulary)),
        sample=sample,
        logits=lambda table, sampled: table,
        exact=exact,
    )
