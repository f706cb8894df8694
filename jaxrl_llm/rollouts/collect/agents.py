"""Experience from a world of many turns: groups of episodes of the policy, or of the world's expert."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.environments import stable_key
from jaxrl_llm.environments.worlds import ArrayWorld
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.samplers import SAMPLING
from jaxrl_llm.rollouts.collect.samplers import Law
from jaxrl_llm.rollouts.play import Turns
from jaxrl_llm.rollouts.play import alphabet
from jaxrl_llm.rollouts.play import as_trajectories
from jaxrl_llm.rollouts.play import episode_width
from jaxrl_llm.rollouts.play import expert_turns
from jaxrl_llm.rollouts.play import make_play
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class _Episodes:
    """What collectors of one world share: which tasks a batch has, and how episodes are written down."""

    def __init__(
        self,
        world: ArrayWorld,
        panel: Panel,
        tokenizer: Tokenizer,
        *,
        seed: int,
        tasks: int,
        group_size: int,
        samples: int,
    ) -> None:
        if panel.world != world.name:
            raise ValueError(f"the panel is of {panel.world}; the world is {world.name}.")
        self.world, self.panel = world, panel
        self._tokenizer, self._letters = tokenizer, alphabet(world, tokenizer)
        self._seed, self._samples = seed, samples
        self._shape = BatchShape(tasks * group_size, group_size, episode_width(world), world.turns)

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._shape

    def tasks(self, step: int) -> Int[np.ndarray, " N"]:
        """The tasks of the batch of that step: drawn from the panel by hash, the same for every arm of a comparison."""
        drawn = [stable_key(self._seed, step, index) % len(self.panel.seeds) for index in range(self._shape.groups)]
        return self.panel.seeds[np.array(drawn)]

    def _experience(self, seeds: np.ndarray, prompt: np.ndarray, turns: Turns, *, version: int, recorded: bool):
        groups = np.repeat(np.arange(self._shape.groups), self._shape.group_size)
        rows = as_trajectories(prompt, turns, group_ids=groups, version=version, recorded=recorded)
        acted = turns.acted.sum(axis=0)
        return Experience(
            trajectories=rows,
            per_row={
                "world/solved": np.asarray(rows.returns) > 0,
                "world/turns": acted,
                "world/refused": (turns.acted & ~turns.valid).sum(axis=0) / acted,
            },
            samples=self._written(seeds, rows),
            texts=self._texts(rows, np.asarray(rows.action_mask)),
        )

    def _texts(self, rows: Trajectories, mask: np.ndarray) -> tuple[str, ...]:
        tokens = np.asarray(rows.tokens)
        return tuple(self._tokenizer.decode(row[real].tolist()) for row, real in zip(tokens, mask, strict=True))

    def _written(self, seeds: np.ndarray, rows: Trajectories) -> tuple[dict[str, Any], ...]:
        """The first episode of each of the first tasks."""
        firsts = np.arange(min(self._samples, self._shape.groups)) * self._shape.group_size
        real = np.asarray(rows.token_mask)
        asked = np.arange(real.shape[1]) < self.world.prompt_length
        prompts, others = self._texts(rows, real & asked), self._texts(rows, real & ~asked)
        earned = np.asarray(rows.returns)
        return tuple(
            {
                "prompt": prompts[row],
                "answer": f"task {seeds[row // self._shape.group_size]}",
                "text": others[row],
                "reward": float(earned[row]),
            }
            for row in firsts
        )


class AgentCollector(_Episodes):
    """The policy acts in a world; a group is several episodes of one task."""

    def __init__(
        self,
        world: ArrayWorld,
        panel: Panel,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int,
        tasks: int,
        group_size: int,
        sampling: SamplingSettings | None = None,
        samples: int = 0,
        decode_dtype: Any = None,
    ) -> None:
        """Nothing is compiled before the first batch.

        Args:
            world: where the policy acts.
            panel: the tasks that batches are drawn from.
            model: for its structure; the weights come with each policy.
            tokenizer: of the policy; each symbol and action of the world must be one token.
            seed: of the tasks.
            tasks: tasks per batch.
            group_size: episodes per task.
            sampling: temperature and truncation; the whole softmax where None. Its temperature must be that of the
                run's settings, at which the trainer scores what was sampled.
            samples: tasks of each batch whose first episode is written down.
            decode_dtype: see `make_generate`.

        Raises:
            ValueError: the panel is of another world, or a symbol is no token.
        """
        super().__init__(world, panel, tokenizer, seed=seed, tasks=tasks, group_size=group_size, samples=samples)
        self.sampling = SamplingSettings() if sampling is None else sampling
        self.law = Law(known=not self.sampling.truncated)
        self._play = make_play(
            nnx.graphdef(model),
            world,
            self._letters,
            group_size=group_size,
            sampling=self.sampling,
            pad_id=tokenizer.pad_id,
            decode_dtype=decode_dtype,
        )

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`."""
        seeds = self.tasks(step)
        order = jnp.arange(len(seeds))
        key = jax.random.fold_in(key, SAMPLING)
        played = self._play(policy.state, jnp.asarray(seeds), key, step, order)
        return self._experience(seeds, *jax.device_get(played), version=policy.version, recorded=True)


class ExpertCollector(_Episodes):
    """The world's expert acts; for a supervised warm start, which learns its actions only."""

    brings = Brings(log_probs=False)

    def __init__(
        self, world: ArrayWorld, panel: Panel, tokenizer: Tokenizer, *, seed: int, tasks: int, samples: int = 0
    ) -> None:
        """Args: as `AgentCollector`; a group is one episode, as the expert always does the same."""
        super().__init__(world, panel, tokenizer, seed=seed, tasks=tasks, group_size=1, samples=samples)

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`."""
        seeds = self.tasks(step)
        turns = expert_turns(self.world, self._letters, jnp.asarray(seeds), self._tokenizer.pad_id)
        prompt = self._letters.symbols[np.asarray(self.world.reset(jnp.asarray(seeds))[1])]
        return self._experience(seeds, prompt, jax.device_get(turns), version=-1, recorded=False)
