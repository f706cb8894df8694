"""Claim: a JSON schema costs at most 5 % of a decode step (SmolLM2-135M, 32 rows); the grammar of plans costs more.

Command: python -m experiments.benchmarks.constrained_decoding [--rows 32] [--new-tokens 48] [--rounds 3]
Cost:    about two minutes on two quiet cores.

Every row of the batch is held by the grammar, sampled at temperature 1. Timed, in interleaved rounds: the compiled loop
of `make_generate`; the loop of `make_constrained_generate` without grammars, which shows what driving it from the host
costs; the same with grammars. What the grammars themselves took is timed on the texts that were sampled, step by step:
all masks of a step, and all advances. The share is that time over the time of a step of the compiled loop, each the
median, in seconds of the wall clock and in seconds of one core.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.rollouts import Rollout
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.constrained import TokenMasker
from jaxrl_llm.rollouts.constrained import make_constrained_generate
from jaxrl_llm.workforce import plan_grammar

ASSIGNMENTS = {
    "type": "object",
    "properties": {
        "assignments": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "task_id": {"type": "string", "maxLength": 12},
                    "assignee_id": {"enum": ["w1", "w2"]},
                    "dependencies": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
                },
                "required": ["task_id", "assignee_id", "dependencies"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["assignments"],
    "additionalProperties": False,
}
"""What a coordinator is asked for."""


def clocks(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the wall clock and of processors."""
    wall, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    return time.perf_counter() - wall, time.process_time() - used


def grammar_times(masker: TokenMasker, grammar: Grammar, rollout: Rollout, width: int) -> dict[str, float]:
    """Of a step, all rows together: seconds for masks and for advances, and the longest step."""
    tokens, real = np.asarray(rollout.tokens)[:, width:], np.asarray(rollout.response_mask)[:, width:]
    rows = masker.start([grammar] * len(tokens))
    masks, advances, used = [], [], time.process_time()
    for column in range(tokens.shape[1]):
        if not real[:, column].any():
            break
        started = time.perf_counter()
        rows.mask()
        masks.append(time.perf_counter() - started)
        for row in np.flatnonzero(real[:, column]):
            rows.advance(int(row), tokens[row, column])
        advances.append(time.perf_counter() - started - masks[-1])
    used = (time.process_time() - used) / len(masks)
    steps = [sum(pair) for pair in zip(masks, advances, strict=True)]
    named = {"masks_s": median(masks), "advances_s": median(advances), "longest_s": max(steps)}
    return named | {"mean_s": sum(steps) / len(steps), "cpu_s": used}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    model, tokenizer = smollm2_135m()
    masker = TokenMasker(tokenizer, model.config.vocab_size, threads=arguments.threads)
    prompts = tokenizer.encode_batch([f"Assign {number} tasks to the workers w1 and w2." for number in range(4)])
    options: dict[str, Any] = {
        "max_new_tokens": arguments.new_tokens,
        "group_size": arguments.rows // 4,
        "sampling": SamplingSettings(),
        "pad_id": tokenizer.pad_id,
    }
    graphdef, state = nnx.split(model)
    compiled, held = (
        make_generate(graphdef, eos_id=(), **options),
        make_constrained_generate(graphdef, masker, **options),
    )
    tokens, mask = map(jnp.asarray, prompts)
    texts = (state, tokens, mask, jax.random.key(0), 0, jnp.arange(4))
    grammars = {
        "json_schema": Grammar.from_json_schema(ASSIGNMENTS),
        "plans": Grammar.from_lark(plan_grammar(workers=("w1", "w2"))),
    }
    runs: dict[str, Callable[[], Rollout]] = {
        "compiled_loop": lambda: compiled(*texts),
        "without_grammar": lambda: held(*texts, grammars=[None] * 4),
        **{name: (lambda grammar=grammar: held(*texts, grammars=[grammar] * 4)) for name, grammar in grammars.items()},
    }
    rollouts = {name: run() for name, run in runs.items()}  # compiles
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            timed[name].append(clocks(run))
    width = prompts[0].shape[1]
    steps = {name: int(np.asarray(r.response_mask)[:, width:].any(axis=0).sum()) for name, r in rollouts.items()}
    found: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "device": str(jax.devices()[0]), "jax": jax.__version__},
        "settings": vars(arguments),
        "step": {
            name: {
                "wall_s": median(t[0] for t in times) / steps[name],
                "cpu_s": median(t[1] for t in times) / steps[name],
            }
            for name, times in timed.items()
        },
        "grammar": {name: grammar_times(masker, g, rollouts[name], width) for name, g in grammars.items()},
    }
    step = found["step"]["compiled_loop"]
    for times in found["grammar"].values():
        times["share_wall"] = (times["masks_s"] + times["advances_s"]) / step["wall_s"]
        times["share_cpu"] = times["cpu_s"] / step["cpu_s"]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
