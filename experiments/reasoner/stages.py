"""The stages of `glm_hybrid_reasoner`, each a run of the project's own trainer that begins where another one ended."""

import dataclasses
import json
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.kept_arrays import read_arrays
from experiments.reasoner.bench import WEIGHTS
from experiments.reasoner.bench import Bench
from experiments.reasoner.bench import bench_of
from experiments.reasoner.bench import chain_task
from experiments.reasoner.settings import TOOL_WIDTH
from experiments.reasoner.settings import ReasonerSettings
from experiments.reasoner.texts import ABOUT
from experiments.reasoner.texts import Line
from experiments.reasoner.texts import chain_lines
from experiments.reasoner.texts import cold_start
from experiments.reasoner.texts import text_lines
from experiments.reasoner.texts import tool_line
from experiments.reasoner.texts import write_lines
from experiments.study import Arrays
from experiments.study import Resumable
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts.collect import Collector
from jaxrl_llm.rollouts.collect import ConversationCollector
from jaxrl_llm.rollouts.collect import DemonstrationCollector
from jaxrl_llm.rollouts.collect import TextAgentCollector
from jaxrl_llm.rollouts.select import answers_of
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import Parts
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import train
from jaxrl_llm.training.run.interrupts import StoppedError

Say = Callable[[str], None]
STAGES = ("pretrain", "thinking", "hybrid", "reasoner", "tooler", "unified", "general")
BEFORE = {
    "thinking": "pretrain",
    "hybrid": "thinking",
    "reasoner": "hybrid",
    "tooler": "hybrid",
    "unified": "hybrid",
    "general": "unified",
}
"""Whose weights each stage begins with."""
CURVES = {
    "reward": "critic/rewards/mean",
    "loss": "actor/loss",
    "violation": "actor/router_violation",
    "router_entropy": "actor/router_entropy",
    "entropy": "actor/entropy",
    "tokens": "response_length/mean",
    "dead": "actor/router_dead",
}
"""Names of what is kept of every step, and of the trainer's metrics."""
GRPO = dataclasses.replace(get_recipe("grpo"), name="grpo_without_kl", kl_estimator="none", kl_coefficient=0.0)
"""Reasoning, and general reinforcement at the end (GLM-4.5, arXiv 2508.06471, section 3)."""


class _Told(Quiet):
    """Says which step is done."""

    def __init__(self, say: Say) -> None:
        self._say, self._steps = say, 0

    def begin(self, *, first_step: int, steps: int) -> None:
        """See `Reporter`."""
        self._steps = steps

    def finish_step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """See `Reporter`."""
        self._say(f"step {step} of {self._steps}")


def stage_part(settings: ReasonerSettings, stage: str, seed: int) -> Resumable:
    """A stage of one seed, as a part of the study: its weights, what was measured, and its curves."""

    def compute(folder: Path, say: Say) -> Mapping[str, Any]:
        bench = bench_of(settings, seed)
        before = bench.initial(seed)
        if stage in BEFORE:
            before = bench.state(_arrays(folder.parent, BEFORE[stage], seed))
        return _STAGES[stage](_Stage(bench, stage, seed, folder, say), before)

    return Resumable(compute)


def part_name(stage: str, seed: int) -> str:
    """Of a stage of one seed."""
    return f"{stage}_{seed}"


def _arrays(folder: Path, stage: str, seed: int) -> Arrays:
    return read_arrays(folder / f"{part_name(stage, seed)}.npz")


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage in progress."""

    bench: Bench
    name: str
    seed: int
    folder: Path
    say: Say

    @property
    def settings(self) -> ReasonerSettings:
        return self.bench.settings

    def lines(self, make: Callable[[], Sequence[Line]]) -> Path:
        """The file that the stage learns from; made once, also where the stage was stopped."""
        path = self.folder / "lines.jsonl"
        if not path.exists():
            write_lines(path, make())
        return path

    def conversations(self, path: Path) -> ConversationCollector:
        return ConversationCollector(
            path,
            self.bench.tokenizer,
            GLM4_5,
            rows=self.settings.sft_rows,
            width=TOOL_WIDTH,
            seed=self.seed,
            ignored=ABOUT,
        )

    def imitate(self, before: nnx.State, collector: Collector, steps: int, rate: float, bias: float) -> Arrays:
        """Supervised learning with Muon."""
        optimizer = OptimizerSettings(
            learning_rate=rate,
            schedule="cosine",
            warmup_steps=min(20, steps // 4),
            final_fraction=0.1,
            beta2=0.98,
            weight_decay=0.1,
            optimizer="muon",
        )
        update = UpdateSettings(
            minibatches=1,
            bounds_every=0,
            router_bias_rate=bias,
            router_balance=1e-4 * (bias > 0),
            pack=False,
        )
        return self.trained(before, collector, steps, optimizer, update, objective="nll")

    def reinforce(self, before: nnx.State, collector: Collector, steps: int, recipe: Recipe) -> Arrays:
        """Reinforcement with AdamW; routers' biases stay as they are."""
        optimizer = OptimizerSettings(learning_rate=self.settings.rl_rate, warmup_steps=2, beta2=0.98)
        update = UpdateSettings(minibatches=2, bounds_every=0, pack=False)
        return self.trained(before, collector, steps, optimizer, update, recipe=recipe)

    def trained(
        self,
        before: nnx.State,
        collector: Collector,
        steps: int,
        optimizer: OptimizerSettings,
        update: UpdateSettings,
        **learned: Any,
    ) -> Arrays:
        """Train, and measure what came of it."""
        shape = collector.shape
        settings = TrainSettings(
            steps=steps,
            prompts=shape.groups,
            group_size=shape.group_size,
            optimizer=optimizer,
            update=update,
            seed=self.seed,
            checkpoint_every=25,
            keep_checkpoints=1,
            samples=0,
        )
        parts = Parts(
            model=nnx.merge(self.bench.graphdef, before),
            trainable=Trainable(),
            tokenizer=self.bench.tokenizer,
            collector=collector,
            **learned,
        )
        outcome = train(parts, settings, self.folder / "run", reporter=_Told(self.say))
        if not outcome.finished:
            raise StoppedError("a request")
        self.say("measuring")
        curves = _curves(self.folder / "run" / "metrics.jsonl")
        return self.bench.kept(outcome.model_state) | self.bench.measure(outcome.model_state) | curves


def _curves(path: Path) -> Arrays:
    """What was measured of every step; NaN where a step has it not."""
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if step["step"] > 0]
    return {
        f"curve_{name}": np.array([step.get(metric, np.nan) for step in steps], np.float32)
        for name, metric in CURVES.items()
    }


def _pretrain(stage: _Stage, before: nnx.State) -> Arrays:
    """Text of the tasks, with the routers' biases learning."""
    settings, tasks = stage.settings, stage.bench.panel.seeds.tolist()
    path = stage.lines(lambda: text_lines(settings, stage.seed, tasks))
    collector = DemonstrationCollector(
        path,
        stage.bench.tokenizer,
        rows=settings.pretrain_rows,
        width=settings.text_width,
        seed=stage.seed,
    )
    return stage.imitate(before, collector, settings.pretrain_steps, settings.pretrain_rate, settings.bias_rate)


def _cold_start(stage: _Stage, before: nnx.State) -> Arrays:
    """A phase of the cold start."""
    settings, tasks = stage.settings, stage.bench.panel.seeds.tolist()
    phase = int(stage.name == "hybrid")
    path = stage.lines(lambda: cold_start(settings, stage.seed, phase, tasks))
    return stage.imitate(before, stage.conversations(path), settings.sft_steps, settings.sft_rate, settings.bias_rate)


def _reasoner(stage: _Stage, before: nnx.State) -> Arrays:
    """The expert that reasons."""
    return stage.reinforce(before, stage.bench.chains, stage.settings.reason_steps, GRPO)


def _tooler(stage: _Stage, before: nnx.State) -> Arrays:
    """The expert that calls tools."""
    recipe = get_recipe("group_reinforce")
    return stage.reinforce(before, stage.bench.tools, stage.settings.tool_steps, recipe)


def _unified(stage: _Stage, before: nnx.State) -> Arrays:
    """One model from the answers of both experts."""
    settings = stage.settings
    path = stage.lines(lambda: _distilled(stage))
    found = stage.imitate(
        before, stage.conversations(path), settings.distil_steps, settings.sft_rate, settings.bias_rate
    )
    kinds = [json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines()]
    return found | {f"lines_{kind}": np.array(kinds.count(kind)) for kind in sorted(set(kinds))}


def _general(stage: _Stage, before: nnx.State) -> Arrays:
    """All kinds of questions in turn."""
    return stage.reinforce(before, stage.bench.general, stage.settings.general_steps, GRPO)


_STAGES: dict[str, Callable[[_Stage, nnx.State], Arrays]] = {
    "pretrain": _pretrain,
    "thinking": _cold_start,
    "hybrid": _cold_start,
    "reasoner": _reasoner,
    "tooler": _tooler,
    "unified": _unified,
    "general": _general,
}


def _distilled(stage: _Stage) -> list[Line]:
    """Answers of both experts that pass the filters, as conversations."""
    bench, count, key = stage.bench, stage.settings.distil_batches, jax.random.key(stage.seed + 77)
    # Far from the steps of training, so that the questions are others.
    steps = range(10**6, 10**6 + count)
    stage.say("asking the reasoner")
    reasoner = bench.snapshot(bench.state(_arrays(stage.folder.parent, "reasoner", stage.seed)))
    task, answers = chain_task(stage.settings, (True,)), []
    for step in steps:
        batch = bench.chains.collect(reasoner, key, step, {})
        answers += answers_of(batch, task.train(stage.seed, step, bench.chains.shape.groups))
    lines, _ = chain_lines(answers, task, stage.seed)
    stage.say("asking the tool expert")
    tooler = bench.snapshot(bench.state(_arrays(stage.folder.parent, "tooler", stage.seed)))
    plays = bench.tools
    for step in steps:
        lines += _played(plays, plays.collect(tooler, key, step, {}), step, bench)
    # Of a kind that no expert answered rightly the teacher's stand in; so it is in a tiny run.
    there = {line["kind"] for line in lines}
    taught = cold_start(stage.settings, stage.seed, 1, bench.panel.seeds.tolist())
    return lines + [line for line in taught if line["kind"] not in there]


def _played(collector: TextAgentCollector, batch: Any, step: int, bench: Bench) -> list[Line]:
    """Two episodes of each task, among those that were solved."""
    rows, lines = batch.trajectories, []
    tasks, size = collector.tasks(step), collector.shape.group_size
    for group, task in enumerate(tasks):
        solved = [row for row in range(group * size, (group + 1) * size) if rows.returns[row] == 1]
        for row in solved[:2]:
            turns = int(rows.step_ids[row].max()) + 1
            said = [bench.tokenizer.decode(rows.tokens[row][rows.step_ids[row] == turn]) for turn in range(turns)]
            lines.append(tool_line(int(task), said))
    return lines


def weights_left_out(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What was measured, without the weights."""
    return {name: array for name, array in arrays.items() if not name.startswith(WEIGHTS)}
