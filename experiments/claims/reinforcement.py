"""Learning to count from rewards, all seeds at once, a chunk of steps at a time: one program for each kind of arm."""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.claims.model import glm_config
from experiments.claims.model import graph_of
from experiments.claims.model import initialised
from experiments.claims.pretraining import Learner
from experiments.claims.settings import ClaimsSettings
from experiments.claims.text import END
from experiments.claims.text import PAD
from experiments.claims.text import Problems
from experiments.claims.text import all_problems
from experiments.claims.text import draw_problems
from jaxrl_llm import categorical
from jaxrl_llm.checks import present
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.experts import given_selections
from jaxrl_llm.models.transformer import positions_of
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives.recipes import sequence_advantages
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts import predicting
from jaxrl_llm.rollouts import response_columns
from jaxrl_llm.rollouts.generate import Rollout
from jaxrl_llm.rollouts.perturb import fp8_weights
from jaxrl_llm.training.text.routers import own_choices
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

TOKEN_MEAN = dataclasses.replace(
    get_recipe("grpo"), name="token_mean", aggregation="token-mean", kl_estimator="none", kl_coefficient=0.0
)
"""GRPO without its KL term, as in section 3 of the report, every token with the same weight."""
SEQUENCE_MEAN = dataclasses.replace(TOKEN_MEAN, name="sequence_mean", aggregation="seq-mean-token-mean")

MISMATCH = ("kl_own", "kl_replayed", "flips")
"""What is measured of a rounded sampler, and 0 of one that is not."""
FEW = 4
"""Answers to each problem that say which are moderate, and which no answer solves."""


class Course(NamedTuple):
    """What differs between arms: numbers to the one program that trains all of them.

    Attributes:
        temperature: of the sampler and of the policy that learns, per seed.
        longest: tokens after which an answer is cut and earns nothing.
        log_weights: of the problems, per seed: how often each is asked.
        sequence_mean: whether the loss is the mean over answers of the mean over their tokens, or over all tokens.
        rounded: whether the sampler's matrices are rounded to 8 bits (e4m3, in blocks).
        replay: whether the trainer sends tokens to the experts that the sampler chose.
    """

    temperature: Float[Array, " S"]
    longest: int
    log_weights: Float[Array, "S P"]
    sequence_mean: bool = False
    rounded: bool = False
    replay: bool = False


class Answers(NamedTuple):
    """Answers, what they earned, and which of their tokens count."""

    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    rewards: Float[Array, " B"]


def judged(rollout: Rollout, result: Int[Array, " B"], width: int, longest: Array | int) -> Answers:
    """1 for an answer whose last number is the result, ended within `longest` tokens."""
    tokens = response_columns(rollout.tokens, width)
    mask = response_columns(rollout.response_mask, width) & (jnp.arange(width) < longest)
    ends = (tokens == END) & mask
    before = jnp.take_along_axis(tokens, jnp.argmax(ends, axis=1)[:, None] - 1, axis=1)[:, 0]
    # An answer that ends at once has no number: its index wraps around to the last column.
    right = jnp.any(ends[:, 1:], axis=1) & (before == result)
    return Answers(tokens, mask, right.astype(jnp.float32))


class Reinforcement:
    """The problems, the start and the program of every arm; nothing is compiled before it is used."""

    def __init__(self, settings: ClaimsSettings) -> None:
        """Problems and keys are those of the settings, the same for every arm."""
        self.settings = settings
        self._config = glm_config(settings)
        self._graphdef = graph_of(self._config)
        key = jax.random.fold_in(jax.random.key(settings.seed), 2)
        self._start_key, self._key = jax.random.split(key)
        self.problems = all_problems(longest=settings.longest)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings.rl_rate))
        self._start = jax.jit(jax.vmap(self._imitated, in_axes=(0, 0, None)))
        course_axes: Any = Course(0, None, 0, None, None, None)  # pyright: ignore[reportArgumentType]
        self._chunk = jax.jit(jax.vmap(self._trained, in_axes=(0, 0, None, course_axes)))
        self._answers = jax.jit(jax.vmap(self._answered))

    def start(self) -> Learner:
        """Policies that have imitated right answers for some steps, one per seed."""
        keys = jax.random.split(self._start_key, self.settings.seeds)
        return self._start(initialised(self._config, keys), keys, self.settings.imitation_steps)

    def train(self, learner: Learner, course: Course, first: int) -> tuple[Learner, dict[str, np.ndarray]]:
        """All seeds after a chunk of steps, the first of which is number `first`; metrics are [seeds, steps]."""
        keys = jax.random.split(self._key, self.settings.seeds)
        learner, metrics = self._chunk(learner, keys, first, course)
        return learner, jax.device_get(metrics)

    def solve(self, learner: Learner, temperature: float, number: int) -> dict[str, np.ndarray]:
        """Of `FEW` answers to each problem: which are right [seeds, problems, FEW], and their mean length.

        Another `number` names other random numbers.
        """
        keys = jax.random.split(jax.random.fold_in(self._key, number), self.settings.seeds)
        temperatures = jnp.full(self.settings.seeds, temperature)
        return jax.device_get(self._answers(learner.state, keys, temperatures))

    def plain(self) -> Course:
        """Temperature 1, full length, every problem as often as any other."""
        seeds = self.settings.seeds
        return Course(jnp.ones(seeds), self.settings.longest, jnp.zeros((seeds, len(self.problems.times))))

    # One seed

    def _logits(
        self, state: PyTree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], selections: Array | None
    ) -> tuple[Float[Array, "B R V"], Int[Array, "B T L k"]]:
        """Of every answer token, and the experts that the routers themselves prefer."""
        model = nnx.merge(self._graphdef, state)
        given = given_selections(self._config, selections)
        passed = model.rows(model.embed(tokens), positions_of(mask), Visibility(mask), selections=given)
        chosen = present(own_choices(list(model.layers), passed.routes))
        hidden = predicting(model.final_norm(passed.x), self.settings.longest)
        return model.logits(hidden), chosen

    def _imitated(self, state: PyTree, key: PRNGKey, steps: Array) -> Learner:
        optimizer = optax.adam(self.settings.imitation_rate)

        def loss(state: PyTree, drawn: Problems) -> Array:
            tokens = jnp.concatenate([drawn.prompt, drawn.answer], axis=1)
            mask = jnp.concatenate([drawn.prompt > PAD, drawn.answer_mask], axis=1)
            return -masked_mean(
                categorical.log_prob(self._logits(state, tokens, mask, None)[0], drawn.answer), drawn.answer_mask
            )

        def imitate(number: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            state, opt_state = carry
            drawn = draw_problems(jax.random.fold_in(key, number), self.settings.rl_rows, longest=self.settings.longest)
            changes, opt_state = optimizer.update(jax.grad(loss)(state, drawn), opt_state, state)
            return optax.apply_updates(state, changes), opt_state

        state, _ = jax.lax.fori_loop(0, steps, imitate, (state, optimizer.init(state)))
        return Learner(state, self._optimizer.init(state))

    def _sampled(
        self, state: PyTree, asked: Problems, key: PRNGKey, temperature: Array, group: int, longest: Array | int
    ) -> tuple[Rollout, Answers]:
        width = self.settings.longest
        generate = make_generate(
            self._graphdef,
            max_new_tokens=width,
            group_size=group,
            sampling=SamplingSettings(),
            eos_id=END,
            pad_id=PAD,
            # A setting of the sampler is fixed when it is compiled; here it differs from seed to seed.
            perturb_logits=lambda logits, keys: logits / temperature,
            record_selections=True,
        )
        rollout = generate(state, asked.prompt, asked.prompt > PAD, key, 0, jnp.arange(len(asked.prompt)))
        return rollout, judged(rollout, jnp.repeat(asked.result, group), width, longest)

    def _answered(self, state: PyTree, key: PRNGKey, temperature: Array) -> dict[str, Array]:
        _, answers = self._sampled(state, self.problems, key, temperature, FEW, self.settings.longest)
        lengths = jnp.sum(answers.mask, axis=1).astype(jnp.float32)
        return {"right": answers.rewards.reshape(-1, FEW), "length": jnp.mean(lengths)}

    def _trained(
        self, learner: Learner, key: PRNGKey, first: Array, course: Course
    ) -> tuple[Learner, dict[str, Array]]:
        def step(learner: Learner, number: Array) -> tuple[Learner, dict[str, Array]]:
            return self._step(learner, jax.random.fold_in(key, number), course)

        return jax.lax.scan(step, learner, first + jnp.arange(self.settings.chunk))

    def _step(self, learner: Learner, key: PRNGKey, course: Course) -> tuple[Learner, dict[str, Array]]:
        settings, temperature = self.settings, course.temperature
        prompt_key, sample_key = jax.random.split(key)
        group = settings.group_size
        chosen = jax.random.categorical(prompt_key, course.log_weights, shape=(settings.rl_rows // group,))
        asked = jax.tree.map(lambda leaf: leaf[chosen], self.problems)
        rounded = fp8_weights(learner.state)
        sampler = jax.tree.map(lambda *leaf: jnp.where(course.rounded, *leaf), rounded, learner.state)
        rollout, answers = self._sampled(sampler, asked, sample_key, temperature, group, course.longest)
        advantages = sequence_advantages(TOKEN_MEAN, answers.rewards, rollout.group_ids)
        texts, recorded = (rollout.tokens, rollout.token_mask), present(rollout.selections).astype(jnp.int32)
        # Where routers choose for themselves, what they choose is given to them: one program for both.
        selections = jax.lax.cond(
            course.replay, lambda: recorded, lambda: self._logits(learner.state, *texts, None)[1].astype(jnp.int32)
        )

        def loss(state: PyTree) -> tuple[Array, Array]:
            logits = self._logits(state, *texts, selections)[0] / temperature
            log_prob = categorical.log_prob(logits, answers.tokens)
            both = [
                policy_loss(
                    recipe,
                    log_prob=log_prob,
                    advantages=advantages,
                    response_mask=answers.mask,
                    log_prob_old=jax.lax.stop_gradient(log_prob),
                )
                for recipe in (SEQUENCE_MEAN, TOKEN_MEAN)
            ]
            return jnp.where(course.sequence_mean, *(safe_divide(*terms.loss) for terms in both)), logits

        gradient, logits = jax.grad(loss, has_aux=True)(learner.state)

        def mismatch() -> dict[str, Array]:
            return self._mismatch(learner.state, sampler, rollout, answers, temperature)

        metrics = {
            "reward": jnp.mean(answers.rewards),
            "length": jnp.mean(jnp.sum(answers.mask, axis=1).astype(jnp.float32)),
            "entropy": masked_mean(categorical.entropy(logits), answers.mask),
            **jax.lax.cond(course.rounded, mismatch, lambda: dict.fromkeys(MISMATCH, jnp.zeros(()))),
        }
        changes, opt_state = self._optimizer.update(gradient, learner.opt_state, learner.state)
        return Learner(optax.apply_updates(learner.state, changes), opt_state), metrics

    def _mismatch(
        self, state: PyTree, sampler: PyTree, rollout: Rollout, answers: Answers, temperature: Array
    ) -> dict[str, Array]:
        """KL(sampler || trainer) of the sampled contexts, with its own experts and with replayed ones, and flips."""
        texts, recorded = (rollout.tokens, rollout.token_mask), present(rollout.selections)
        of_sampler, _ = self._logits(sampler, *texts, recorded)
        without, own = self._logits(state, *texts, None)
        replayed, _ = self._logits(state, *texts, recorded)
        flipped = jnp.any(jnp.sort(own) != jnp.sort(recorded.astype(own.dtype)), axis=-1)
        # What no layer of the sampler has read is not compared: the last token of an answer.
        read = rollout.token_mask[:, 1:]
        found = {
            name: masked_mean(categorical.kl(of_sampler / temperature, logits / temperature), answers.mask)
            for name, logits in (("kl_own", without), ("kl_replayed", replayed))
        }
        return found | {"flips": masked_mean(jnp.mean(flipped[:, :-1].astype(jnp.float32), axis=-1), read)}


@functools.lru_cache(maxsize=1)
def reinforcement(settings: ClaimsSettings) -> Reinforcement:
    """Kept, because it is compiled once for all arms."""
    return Reinforcement(settings)


@functools.lru_cache(maxsize=1)
def started(settings: ClaimsSettings) -> Learner:
    """The policies that every arm starts from."""
    return reinforcement(settings).start()
