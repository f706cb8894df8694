"""Experience from a world of many turns: groups of episodes of the policy, or of the world's expert."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.environments.worlds import ArrayWorld
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect.panel_tasks import PanelTasks
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
from jaxrl_llm.typing import PRNGKey


class _Episodes(PanelTasks):
    """What collectors of one world share: the letters of its episodes, and what is told of them."""

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
        shape = BatchShape(tasks * group_size, group_size, episode_width(world), world.turns)
        super().__init__(world, panel, tokenizer, seed=seed, shape=shape, samples=samples)
        self.world, self._letters = world, alphabet(world, tokenizer)

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
            samples=self.written(seeds, rows),
            texts=self.texts(rows, np.asarray(rows.action_mask)),
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
