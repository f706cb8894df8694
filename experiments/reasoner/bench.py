"""What every stage of `glm_hybrid_reasoner` uses: the model's structure, its tokenizer, who asks and who measures."""

import functools
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.reasoner.chains import ChainTask
from experiments.reasoner.prices import Prices
from experiments.reasoner.settings import ACTION_TOKENS
from experiments.reasoner.settings import TOOL_WIDTH
from experiments.reasoner.settings import ReasonerSettings
from experiments.study import Arrays
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.models.glm_tokenizer import glm_bytes
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect import PolicySampler
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.rollouts.collect import TaskCollector
from jaxrl_llm.rollouts.collect import TextAgentCollector
from jaxrl_llm.rollouts.collect import TurnsCollector
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.wording import Wording

MODES = ("thinking", "direct", "tools")
"""What is measured: chains with thinking and without, questions with tools."""
SCRATCHPAD = re.compile(r"[a-j][-+*]\d")
TAGS = re.compile(r"</?think>")
WEIGHTS = "weights_"


class Measured(ChainTask):
    """The held-out chains of a mode, one batch after the other, in the place of those to train on."""

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """The held-out ones."""
        return self.held_out()[step * count : (step + 1) * count]


@dataclass(frozen=True)
class Bench:
    """The parts that stages share; what is compiled for one of them serves the others.

    Attributes:
        settings: sizes.
        tokenizer: a byte per token, and the tokens of GLM-4.5.
        graphdef: structure of the model.
        structure: of its weights as a tree.
        chains: answers to chains with thinking, to train on.
        tools: episodes with tools, to train on.
        general: chains in both modes, and tools, in turn.
        measuring: collectors of answers to held-out questions, by mode.
        panel: tasks with tools to train on.
    """

    settings: ReasonerSettings
    tokenizer: Tokenizer
    graphdef: nnx.GraphDef[Transformer]
    structure: Any
    chains: TaskCollector
    tools: TextAgentCollector
    general: TurnsCollector
    measuring: Mapping[str, TaskCollector | TextAgentCollector]
    panel: Panel

    def initial(self, seed: int) -> nnx.State:
        """Random weights."""
        model = Transformer(self.settings.config(self.tokenizer.vocab_size), rngs=nnx.Rngs(seed))
        return nnx.state(model)

    def kept(self, state: nnx.State) -> Arrays:
        """Weights as named arrays."""
        leaves = jax.device_get(jax.tree.leaves(state))
        return {f"{WEIGHTS}{number:03d}": np.asarray(leaf) for number, leaf in enumerate(leaves)}

    def state(self, arrays: Mapping[str, np.ndarray]) -> nnx.State:
        """Weights out of named arrays."""
        names = sorted(name for name in arrays if name.startswith(WEIGHTS))
        return jax.tree.unflatten(self.structure, [jnp.asarray(arrays[name]) for name in names])

    def snapshot(self, state: nnx.State) -> PolicySnapshot:
        """Weights as collectors see them."""
        return PolicySnapshot(self.graphdef, state, 0)

    def measure(self, state: nnx.State) -> Arrays:
        """Rewards, tokens and leaked thinking, [questions, samples], of every mode, on held-out questions."""
        found: Arrays = {}
        for number, mode in enumerate(MODES):
            key = jax.random.key(1000 + number)
            collector = self.measuring[mode]
            batches = [
                collector.collect(self.snapshot(state), key, step, {}) for step in range(self.settings.measured_batches)
            ]
            found |= {f"{mode}_{name}": np.concatenate(rows) for name, rows in _measured(batches, mode).items()}
            found[f"{mode}_example"] = np.array(self._example(batches[-1]))
        task = chain_task(self.settings, (True,), Measured)
        count = self.settings.measured_batches * self.settings.prompts
        found["operations"] = np.array([problem.metadata["operations"] for problem in task.held_out()[:count]])
        return found

    def _example(self, batch: Experience) -> str:
        """The first conversation of the last group, all tokens written out."""
        rows, first = batch.trajectories, len(batch.texts) - self.settings.group_size
        tokens = np.asarray(rows.tokens[first])[np.asarray(rows.token_mask[first])]
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def leaks(text: str, *, tools: bool = False) -> bool:
    """Whether an answer that was asked for without thinking has words of it: tags, or a line of the scratchpad.

    Args:
        text: the answer.
        tools: whether it calls tools, whose arguments look like a line of the scratchpad.
    """
    return bool(TAGS.search(text)) or (not tools and bool(SCRATCHPAD.search(text)))


def _measured(batches: Sequence[Experience], mode: str) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {"reward": [], "tokens": [], "leak": []}
    for batch in batches:
        rows = batch.trajectories
        groups = int(np.max(rows.group_ids)) + 1
        leaked = np.array([mode != "thinking" and leaks(text, tools=mode == "tools") for text in batch.texts])
        columns = {"reward": rows.returns, "tokens": np.asarray(rows.action_mask).sum(axis=1), "leak": leaked}
        for name, column in columns.items():
            found[name].append(np.asarray(column, np.float32).reshape(groups, -1))
    return found


def chain_task(settings: ReasonerSettings, modes: Sequence[bool], kind: type[ChainTask] = ChainTask) -> ChainTask:
    """Chains in these modes; as many are held out as are measured on."""
    count = settings.measured_batches * settings.prompts
    return kind(settings.operations, modes=modes, held_out_count=count)


@functools.lru_cache(maxsize=2)
def bench_of(settings: ReasonerSettings, seed: int) -> Bench:
    """The parts for these settings and the seed of the questions.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    tokenizer = glm_bytes()
    graphdef, state = nnx.split(Transformer(settings.config(tokenizer.vocab_size), rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, state)
    sampling = SamplingSettings()
    ends = tokenizer.eos_ids
    sampler = PolicySampler(
        model,
        sampling,
        response_length=settings.response_length,
        group_size=settings.group_size,
        end_ids=ends,
        pad_id=tokenizer.pad_id,
    )

    def asks(modes: Sequence[bool], kind: type[ChainTask] = ChainTask) -> TaskCollector:
        return TaskCollector(
            chain_task(settings, modes, kind),
            tokenizer,
            sampler,
            seed=seed,
            prompts=settings.prompts,
            group_size=settings.group_size,
            prompt_length=settings.prompt_length,
            response_length=settings.response_length,
            end_ids=ends,
            samples=1,
        )

    learn, measure = split_panels(Prices())

    def plays(panel: Panel) -> TextAgentCollector:
        return TextAgentCollector(
            Prices(),
            panel,
            model,
            tokenizer,
            seed=seed,
            tasks=settings.prompts,
            group_size=settings.group_size,
            width=TOOL_WIDTH,
            action_tokens=ACTION_TOKENS,
            wording=Wording.of_glm(thinking=False),
            sampling=sampling,
            samples=1,
        )

    tools = plays(learn)
    return Bench(
        settings=settings,
        tokenizer=tokenizer,
        graphdef=graphdef,
        structure=jax.tree.structure(state),
        chains=asks((True,)),
        tools=tools,
        general=TurnsCollector({"chains": asks((True, False)), "tools": tools}),
        measuring={
            "thinking": asks((True,), Measured),
            "direct": asks((False,), Measured),
            "tools": plays(measure),
        },
        panel=learn,
    )
