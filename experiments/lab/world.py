"""What training under a controlled mismatch needs to know of a task: sampling, logits, and exact measurements."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.bounds import BoundInputs
from jaxrl_llm.rollouts.perturb import LogitPerturbation
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree


def covers(logits: Float[Array, "*batch V"], others: Float[Array, "*batch V"]) -> Bool[Array, "*batch"]:
    """Where the policy of the first logits can draw every token that the one of the others can."""
    return jnp.all(~jnp.isneginf(logits) | jnp.isneginf(others), axis=-1)


class Sampled(NamedTuple):
    """Responses of the behaviour policy.

    A context may be met many times: its logits are one of N rows, and `row` says which one each token was drawn from.

    Attributes:
        tokens: of the responses.
        mask: which of them are real.
        rewards: in [0, 1].
        group_ids: equal for responses to the same prompt.
        clusters: equal for responses that depend on each other: of one prompt, where prompts were drawn.
        texts: what the world needs to compute the rows.
        keys: of the noise of each row.
        row: of each token.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    rewards: Float[Array, " B"]
    group_ids: Int[Array, " B"]
    clusters: Int[Array, " B"]
    texts: PyTree
    keys: Key[Array, " N"]
    row: Int[Array, "B T"]


class Exact(NamedTuple):
    """By enumeration: J(pi), J(mu), L'(pi) = E_mu[R sum_t (rho_t - 1)]. Where they are exact too: inputs of the bounds,
    and whether mu can draw in every context what pi can.
    """

    reward_pi: Float[Array, ""]
    reward_mu: Float[Array, ""]
    surrogate_gain: Float[Array, ""]
    inputs: BoundInputs | None
    covered: Bool[Array, ""] | None


class World(NamedTuple):
    """A task with rewards in [0, 1].

    Attributes:
        horizon: T, most tokens of a response.
        init: key -> parameters of the policy before reinforcement learning.
        sample: (parameters, transform, key, noise key) -> responses of the policy whose logits are transformed.
        logits: (parameters, responses) -> logits of the untransformed policy, one row per context.
        exact: (parameters of pi, transform of pi, parameters of mu, transform of mu, noise key) -> exact numbers.
    """

    horizon: int
    init: Callable[[PRNGKey], PyTree]
    sample: Callable[[PyTree, LogitPerturbation, PRNGKey, PRNGKey], Sampled]
    logits: Callable[[PyTree, Sampled], Float[Array, "N V"]]
    exact: Callable[[PyTree, LogitPerturbation, PyTree, LogitPerturbation, PRNGKey], Exact]
