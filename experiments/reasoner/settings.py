"""The settings of `glm_hybrid_reasoner`."""

import dataclasses

from experiments.ranges import NOT_NEGATIVE
from experiments.ranges import PLURAL
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SIZE
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.reasoner.chains import LETTERS
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import TransformerConfig

PROMPT_OVERHEAD = 10
"""Tokens of a question without thinking beside the question itself."""
TOOL_WIDTH, ACTION_TOKENS = 104, 24
"""Most tokens of an episode with tools, and of an action in it."""

FULL_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class ReasonerSettings:
    """The model, its tasks, and how long each stage is.

    Attributes:
        seeds: models that go through the whole chain, one after the other.
        seed: of the first one; the next one has the next seed.
        full: at least three models.
        width: of the model, a multiple of 64.
        layers: of the model; the first has no experts.
        experts: of each other layer.
        chosen: experts of each token, beside the shared one.
        expert_width: inner width of an expert.
        operations: most steps of a chain.
        slips: probability that the teacher of the cold start errs, in each step of a chain and before each call.
        pretrain_steps: optimiser steps on text.
        pretrain_rows: rows of text per step.
        pretrain_rate: largest rate of Muon, on text.
        sft_steps: optimiser steps of each of the two phases of the cold start.
        distil_steps: optimiser steps of the distillation.
        sft_rows: conversations per step.
        sft_rate: largest rate of Muon, on conversations.
        conversations: of each kind, in each phase of the cold start.
        reason_steps: batches of reinforcement of the expert that reasons.
        tool_steps: batches of reinforcement of the expert that calls tools.
        general_steps: batches of reinforcement at the end, of both kinds in turn.
        prompts: questions per batch of reinforcement.
        group_size: answers per question.
        rl_rate: rate of AdamW in reinforcement.
        distil_batches: batches of answers that each expert gives to be distilled.
        measured_batches: batches of held-out questions that each stage is measured on, in each mode.
        bias_rate: how far a step of imitation moves the correction biases of the routers.
    """

    seeds: int = 1
    seed: int = 0
    full: bool = False
    width: int = 128
    layers: int = 3
    experts: int = 32
    chosen: int = 2
    expert_width: int = 128
    operations: int = 5
    slips: float = 0.04
    pretrain_steps: int = 250
    pretrain_rows: int = 40
    pretrain_rate: float = 4e-3
    sft_steps: int = 70
    distil_steps: int = 60
    sft_rows: int = 24
    sft_rate: float = 2e-3
    conversations: int = 1024
    reason_steps: int = 30
    tool_steps: int = 24
    general_steps: int = 20
    prompts: int = 12
    group_size: int = 8
    rl_rate: float = 5e-4
    distil_batches: int = 16
    measured_batches: int = 6
    bias_rate: float = 1e-3

    @property
    def whole(self) -> "ReasonerSettings":
        """With what `full` asks for."""
        return dataclasses.replace(self, full=False, seeds=max(self.seeds, FULL_SEEDS)) if self.full else self

    @property
    def text_width(self) -> int:
        """Most tokens of a line of text."""
        return max(7 * self.operations + 10, 48)

    @property
    def prompt_length(self) -> int:
        """Most tokens of a question."""
        return 1 + 3 * self.operations + PROMPT_OVERHEAD

    @property
    def response_length(self) -> int:
        """Most tokens of an answer with thinking, with some to spare."""
        return 4 * self.operations + 8

    def config(self, vocab_size: int) -> TransformerConfig:
        """The model: a GLM-4.5 that is small."""
        return TransformerConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.width // 32,
            num_kv_heads=self.width // 64,
            head_dim=32,
            intermediate_size=(self.chosen + 1) * self.expert_width,
            max_positions=128,
            qkv_bias=True,
            qk_norm=True,
            rotary_fraction=0.5,
            experts=ExpertsConfig(
                count=self.experts, chosen=self.chosen, width=self.expert_width, shared=1, dense_layers=1
            ),
        )


RANGES: Ranges = {
    "seeds": SIZE,
    "seed": SEED,
    "width": Range(64, 4096),
    "layers": Range(2, 64),
    "experts": Range(2, 512),
    "chosen": Range(1, 64),
    "expert_width": Range(8, 8192),
    "operations": Range(1, len(LETTERS)),
    "slips": Range(0.0, 0.5),
    "pretrain_steps": SIZE,
    "pretrain_rows": SIZE,
    "pretrain_rate": RATE,
    "sft_steps": SIZE,
    "distil_steps": SIZE,
    "sft_rows": SIZE,
    "sft_rate": RATE,
    "conversations": SIZE,
    "reason_steps": SIZE,
    "tool_steps": SIZE,
    "general_steps": SIZE,
    "prompts": PLURAL,
    "group_size": PLURAL,
    "rl_rate": RATE,
    "distil_batches": SIZE,
    "measured_batches": SIZE,
    "bias_rate": NOT_NEGATIVE,
}
"""What the fields of `ReasonerSettings` may be."""
