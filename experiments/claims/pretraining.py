"""Pre-training of all seeds at once, a chunk of steps at a time: one program for each optimiser."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.claims.model import Passed
from experiments.claims.model import glm_config
from experiments.claims.model import graph_of
from experiments.claims.model import initialised
from experiments.claims.model import pass_text
from experiments.claims.settings import ClaimsSettings
from experiments.claims.text import NUMBERS
from experiments.claims.text import counting_text
from experiments.claims.text import draw_language
from experiments.claims.text import letters_text
from jaxrl_llm import categorical
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.objectives.balance import balance_metrics
from jaxrl_llm.objectives.balance import expert_loads
from jaxrl_llm.training.run.optimizer import OptimizerSettings
from jaxrl_llm.training.run.optimizer import make_optimizer
from jaxrl_llm.training.text.routers import router_terms
from jaxrl_llm.training.text.routers import with_router_bias
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

WEIGHT_DECAY = 0.1
HELD_OUT = 2**31 - 1
"""Number of the text that nobody learns from."""
MTP_WEIGHT = 0.3
BINS = 8
"""Bins of entropy, of one width, from 0 to the uniform choice of a number."""


class Balance(NamedTuple):
    """How loads are evened out: the rate of the correction bias, and the weight of the loss per sequence and layer."""

    bias_rate: float
    loss_weight: float


class Learner(NamedTuple):
    """What training carries on: model and optimiser."""

    state: PyTree
    opt_state: PyTree


def _cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Array:
    return -jnp.mean(categorical.log_prob(logits, targets))


class Pretraining:
    """Text, model and one optimiser; nothing is compiled before it is used."""

    def __init__(self, optimizer: str, settings: ClaimsSettings) -> None:
        """The optimiser is "adamw", or "muon" for matrices and AdamW for the rest."""
        self.settings = settings
        self._config = glm_config(settings)
        self._graphdef = graph_of(self._config)
        self._language = draw_language(jax.random.key(settings.seed))
        # At rate 1: an update is the rate times it, its decay included, so one program serves every rate and schedule.
        numbers = OptimizerSettings(learning_rate=1.0, beta2=0.95, weight_decay=WEIGHT_DECAY, optimizer=optimizer)  # pyright: ignore[reportArgumentType]
        self._inner = make_optimizer(numbers, 1)
        self._remember = jax.jit(jax.vmap(self._optimizer(1.0, 0.0).init))
        self._chunk = jax.jit(jax.vmap(self._trained, in_axes=(0, 0, None, None, None)))
        self._measure = jax.jit(jax.vmap(self._measured))

    def _keys(self) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(self.settings.seed), 1), self.settings.seeds)

    def start(self) -> Learner:
        """All seeds before training; the same for both optimisers but for what the optimiser remembers."""
        state = initialised(self._config, self._keys())
        return Learner(state, self._remember(state))

    def train(self, learner: Learner, rates: np.ndarray, first: int, balance: Balance) -> Learner:
        """All seeds after a step for each rate, the first of which is number `first`: it names the texts."""
        return self._chunk(learner, self._keys(), jnp.asarray(rates, jnp.float32), first, balance)

    def measure(self, learner: Learner) -> dict[str, Array]:
        """Of the same held-out text for every arm, per seed."""
        return self._measure(learner.state, self._keys())

    def _optimizer(self, rate: Array | float, bias_rate: Array | float) -> optax.GradientTransformation:
        return with_router_bias(optax.chain(self._inner, optax.scale(rate)), rate=bias_rate)  # pyright: ignore[reportArgumentType]

    def _text(self, key: PRNGKey, rows: int) -> Int[Array, "B T"]:
        keys, length = jax.random.split(key), self.settings.length
        counting = counting_text(keys[0], rows // 2, length, longest=self.settings.longest)
        return jnp.concatenate([counting, letters_text(keys[1], self._language, rows - rows // 2, length)])

    def _passed(self, state: PyTree, tokens: Int[Array, "B T"]) -> Passed:
        return pass_text(nnx.merge(self._graphdef, state), tokens)

    def _trained(self, learner: Learner, key: PRNGKey, rates: Array, first: Array, balance: Balance) -> Learner:
        def loss(state: PyTree, tokens: Array) -> Array:
            passed = self._passed(state, tokens)
            loads, auxiliary = router_terms(passed.sent)
            assert auxiliary is not None
            further = _cross_entropy(passed.further, tokens[:, 2:])
            uneven = balance.loss_weight * auxiliary[0] / len(tokens)
            return _cross_entropy(passed.logits, tokens[:, 1:]) + MTP_WEIGHT * further + uneven + loads

        def step(learner: Learner, at: tuple[Array, Array]) -> tuple[Learner, None]:
            rate, number = at
            tokens = self._text(jax.random.fold_in(key, number), self.settings.rows)
            gradient = jax.grad(loss)(learner.state, tokens)
            optimizer = self._optimizer(rate, balance.bias_rate)
            changes, opt_state = optimizer.update(gradient, learner.opt_state, learner.state)
            return Learner(optax.apply_updates(learner.state, changes), opt_state), None

        return jax.lax.scan(step, learner, (rates, first + jnp.arange(len(rates))))[0]

    def _measured(self, state: PyTree, key: PRNGKey) -> dict[str, Array]:
        # A key that no step has.
        tokens = self._text(jax.random.fold_in(key, HELD_OUT), self.settings.held_out_rows)
        passed = self._passed(state, tokens)
        count = self.settings.experts
        loads = [expert_loads(to.selection, mask, num_experts=count) for _, to, mask in passed.sent if to is not None]
        found = [balance_metrics(one) for one in loads]
        return {
            "loss": _cross_entropy(passed.logits, tokens[:, 1:]),
            "loss_further": _cross_entropy(passed.further, tokens[:, 2:]),
            "violation": jnp.mean(jnp.stack([one.violation for one in found])),
            "load_entropy": jnp.mean(jnp.stack([one.entropy for one in found])),
            "dead": jnp.sum(jnp.stack([one.dead for one in found])),
            # Both predict token t + 2 from tokens up to t + 1.
            **draft_statistics(passed.logits[:, 1:], passed.further),
        }


def draft_statistics(logits: Float[Array, "B T V"], drafts: Float[Array, "B T V"]) -> dict[str, Array]:
    """How often a draft of q would be accepted by p, sum_v min(p_v, q_v) = 1 - TV, and how that depends on H(p).

    Leviathan et al. 2023 (arXiv:2211.17192), theorem 3.5.

    Args:
        logits: of p, the model.
        drafts: of q, its further layer.

    Returns:
        `accepted`, the mean over tokens [prob]; `slope` of the line of least squares of acceptance on entropy [prob
        per nat]; tokens and mean acceptance by bins of entropy, `bin_tokens` and `bin_accepted`.
    """
    accepted = 1 - categorical.total_variation(logits, drafts)
    entropy = categorical.entropy(logits)
    away = entropy - jnp.mean(entropy)
    edges = jnp.log(NUMBERS) * jnp.arange(1, BINS) / BINS
    inside = jnp.searchsorted(edges, entropy)[..., None] == jnp.arange(BINS)
    counts = jnp.sum(inside, axis=(0, 1)).astype(jnp.float32)
    return {
        "accepted": jnp.mean(accepted),
        "slope": jnp.sum(away * accepted) / jnp.sum(away**2),
        "bin_tokens": counts,
        "bin_accepted": safe_divide(jnp.sum(inside * accepted[..., None], axis=(0, 1)), counts),
    }


@functools.lru_cache(maxsize=4)
def pretraining(optimizer: str, settings: ClaimsSettings) -> Pretraining:
    """Kept, because it is compiled once for all rates and arms."""
    return Pretraining(optimizer, settings)
