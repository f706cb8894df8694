"""Token chains: responses of hundreds or thousands of tokens in which a context is one of a few states.

The next state is a function of state and token, policies and reward read the state alone, and everything is a forward
recursion over T steps instead of an enumeration of V^T responses. float64 throughout.

Let W = prod_t rho_t and S = sum_t (rho_t - 1). Error = E_mu[R X], X = W - 1 - S, and for a reward of the last state it
is sum_s R(s) x(s), x(s) = E_mu[X 1(s_T = s)] = P_pi(s) - P_mu(s) - m(s), m(s) = E_mu[S 1(s_T = s)]: the recursion
carries P_mu, P_pi and m. x sums to 0, so the worst reward in [0, 1] costs sum_s max(0, -x(s)).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.bounds import BoundInputs
from jaxrl_llm.bounds import tv_bound_from_kl


class Chain(NamedTuple):
    """Two policies on one chain; every response starts in state 0.

    Attributes:
        pi: [S, V] logits of the trained policy.
        mu: [S, V] logits of the policy that samples.
        move: [S, V, S] one-hot: the state that follows.
    """

    pi: jax.Array
    mu: jax.Array
    move: jax.Array


class Measured(NamedTuple):
    """What the recursion gives.

    Attributes:
        excess: [S] x(s).
        last_mu: [S] law of the last state under mu.
        last_pi: [S] law of the last state under pi.
        inputs: of the bounds; all exact but sequence_tv, which is an upper bound.
    """

    excess: jax.Array
    last_mu: jax.Array
    last_pi: jax.Array
    inputs: BoundInputs

    @property
    def worst(self) -> jax.Array:
        """The largest |Error| of a reward of the last state."""
        return jnp.sum(jnp.maximum(-self.excess, 0.0))


def measure(chain: Chain, *, horizon: int) -> Measured:
    """Run the recursion over `horizon` tokens."""
    law_mu, law_pi = (jnp.exp(categorical.log_probs(x)) for x in (chain.mu, chain.pi))
    step_mu, step_pi = (jnp.einsum("sa,sat->st", x, chain.move) for x in (law_mu, law_pi))
    kl, tv = categorical.kl(chain.mu, chain.pi), categorical.total_variation(chain.mu, chain.pi)

    def step(carry, _):
        reached_mu, reached_pi, deviation = carry
        deviation = deviation @ step_mu + reached_mu @ (step_pi - step_mu)
        spent = jnp.stack([reached_mu @ kl, reached_mu @ tv])
        return (reached_mu @ step_mu, reached_pi @ step_pi, deviation), spent

    start = jnp.zeros(law_mu.shape[0]).at[0].set(1.0)
    (last_mu, last_pi, deviation), spent = jax.lax.scan(step, (start, start, jnp.zeros_like(start)), length=horizon)
    sequence_kl, mean_tv_t = jnp.sum(spent[:, 0]), spent[:, 1]
    sequence_tv = jnp.minimum(jnp.minimum(1.0, jnp.sum(mean_tv_t)), tv_bound_from_kl(sequence_kl))
    inputs = BoundInputs(jnp.max(kl), jnp.max(tv), sequence_kl, sequence_tv, mean_tv_t)
    return Measured(last_pi - last_mu - deviation, last_mu, last_pi, inputs)


def performance_differences(chain: Chain, rewards: jax.Array, *, horizon: int) -> jax.Array:
    """sum_t (E_{d_t^pi} - E_{d_t^mu}) g_t, by a backward recursion of the values of mu: Error by another route."""
    law_mu, law_pi = (jnp.exp(categorical.log_probs(x)) for x in (chain.mu, chain.pi))
    step_mu, step_pi = (jnp.einsum("sa,sat->st", x, chain.move) for x in (law_mu, law_pi))

    def back(value, _):
        return step_mu @ value, (step_pi - step_mu) @ value

    def forward(shift, gap):
        reached_mu, reached_pi = shift
        return (reached_mu @ step_mu, reached_pi @ step_pi), (reached_pi - reached_mu) @ gap

    _, gaps = jax.lax.scan(back, rewards, length=horizon)
    start = jnp.zeros(law_mu.shape[0]).at[0].set(1.0)
    return jnp.sum(jax.lax.scan(forward, (start, start), gaps[::-1])[1])


def counter(states: int) -> np.ndarray:
    """[S, 2, S]: token 1 counts, up to the last state."""
    move = np.zeros((states, 2, states))
    for state in range(states):
        move[state, 0, state] = move[state, 1, min(state + 1, states - 1)] = 1.0
    return move


def shifted_probability(q: np.ndarray, delta: float, *, upwards: bool) -> np.ndarray:
    """The p above (or below) q with KL((q, 1 - q) || (p, 1 - p)) = delta, by bisection; elementwise."""
    low, high = (q, np.ones_like(q)) if upwards else (np.zeros_like(q), q)
    for _ in range(200):
        middle = (low + high) / 2
        with np.errstate(divide="ignore"):
            kl = q * np.log(q / middle) + (1 - q) * (np.log1p(-q) - np.log1p(-middle))
        # The end that moves keeps the divergence on its side: below delta on the side of q, above it on the other.
        below = (kl < delta) == upwards
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low if upwards else high


class Counts(NamedTuple):
    """Independent tokens, in closed form: what two policies do is a function of how often token 1 came.

    Attributes:
        worst: the largest |Error| over all rewards of the whole response.
        sequence_tv: TV of the laws of responses, exactly.
    """

    worst: np.ndarray
    sequence_tv: np.ndarray


def independent_tokens(q: np.ndarray, p: np.ndarray, horizon: int) -> Counts:
    """T independent tokens, token 1 with probability q under mu and p under pi, summed over binomial counts."""
    q, p = q[..., None], p[..., None]
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, horizon + 1)))])
    k = np.arange(horizon + 1.0)
    ways = logs[-1] - logs - logs[::-1]
    law = np.exp(ways + k * np.log(q) + (horizon - k) * np.log1p(-q))
    gain = k * np.log(p / q) + (horizon - k) * (np.log1p(-p) - np.log1p(-q))
    with np.errstate(over="ignore"):  # an infinite gain is a positive excess, which is not summed
        gain = np.expm1(gain)
    excess = gain - (k * (p - q) / q - (horizon - k) * (p - q) / (1 - q))
    return Counts(np.sum(law * np.maximum(-excess, 0), -1), np.sum(law * np.maximum(-gain, 0), -1))
