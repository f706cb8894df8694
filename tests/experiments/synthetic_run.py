"""Files of a run that never was, to test what reads a run: smooth curves with noise."""

import json
from pathlib import Path

import numpy as np

from experiments import metric_names as names
from experiments.run_folder import RunFolder


def write_synthetic_run(folder: Path, *, steps: int = 120, seed: int = 0, complete: bool = True) -> RunFolder:
    """Fill `folder` with the files of a run of `steps` batches."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    run = RunFolder(folder)
    config = {
        "experiment": folder.parent.name,
        "claim": "Two-digit sums are learnt by reinforcement alone.",
        "trained": "top 8 of 30 layers",
    }
    settings = {"steps": 120, "prompts": 8, "group_size": 8, "recipe": "trm", "seed": seed, "learning_rate": 3e-5}
    run.config.write_text(json.dumps({**config, "settings": settings}))
    run.environment.write_text(
        json.dumps(
            {"processor": "a processor", "processor_cores": 2, "device": "1 x cpu (cpu)", "packages": {"jax": "0.11.2"}}
        )
    )
    metrics = [{"step": 0, names.HELD_OUT: 0.28, names.HELD_OUT_STRICT: 0.2}]
    metrics += [_step(step, rng) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    times = [
        {
            "step": step,
            "rollout": 0.8 + 0.1 * rng.random() + 9 * (step == 1),
            "score": 0.3,
            "update": 1.1 + 6 * (step == 1),
            "bounds": 0.2,
            "other": 0.05,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    run.samples.write_text(json.dumps({"answers": [_answer(index, complete) for index in range(40)]}))
    if complete:
        run.summary.write_text(json.dumps(_summary(steps)))
    return run


def _step(step: int, rng: np.random.Generator) -> dict[str, float]:
    share = step / 120
    row = {
        "step": step,
        names.REWARD: float(np.clip(0.3 + 0.4 * share + 0.08 * rng.normal(), 0, 1)),
        names.LENGTH: 4.2 - 0.8 * share + 0.1 * rng.normal(),
        names.ENTROPY: 1.5 - 0.9 * share + 0.05 * abs(rng.normal()),
        names.KL_MEAN: 2e-3 * np.exp(0.3 * rng.normal()),
        names.KL_MAX: 5e-2 * np.exp(0.3 * rng.normal()),
        names.TV_MEAN: 2e-2 * np.exp(0.2 * rng.normal()),
        names.TV_MAX: 0.15 * np.exp(0.2 * rng.normal()),
        names.ACCEPTED: float(np.clip(0.92 + 0.05 * rng.normal(), 0, 1)),
        names.ERROR: 2e-4 * rng.normal() + 2e-3 * (step % 9 == 0),
        names.ERROR_SE: 2e-4,
        names.THRESHOLD: 0.6,
        "groups/equal_rewards": int(rng.integers(0, 4)),
        "actor/skipped": 0,
    }
    if step % 10 == 0:
        row[names.HELD_OUT] = 0.28 + 0.35 * share
    for index, bound in enumerate(names.BOUNDS):
        row[names.sharp(bound)] = 0.05 * (1 + index) * np.exp(0.3 * rng.normal())
        row[names.printed(bound)] = 2 * row[names.sharp(bound)]
    row[names.UNIFIED_SHARP] = min(row[names.sharp(bound)] for bound in names.BOUNDS)
    row[names.UNIFIED_PRINTED] = 2 * row[names.UNIFIED_SHARP]
    return row


def _answer(index: int, complete: bool) -> dict:
    prompt, total = f"3 + 5 = 8\n14 + 8 = 22\n{index} + {index + 2} =", 2 * index + 2
    right = index % 3 == 0
    answer = {
        "identity": f"sum:{index}",
        "prompt": prompt,
        "answer": str(total),
        "before": {"text": f" {total if right else total + 10}\n1", "lenient": right, "strict": right},
    }
    if complete:
        answer["after"] = {"text": f" {total}\n", "lenient": index % 7 != 0, "strict": index % 7 != 0}
    return answer


def _summary(steps: int) -> dict:
    return {
        "experiment": "sums",
        "accuracy_before": 0.28,
        "accuracy_before_interval": [0.21, 0.37],
        "accuracy_after": 0.63,
        "accuracy_after_interval": [0.54, 0.71],
        "accuracy_gain": 0.35,
        "accuracy_gain_interval": [0.25, 0.44],
        "strict_before": 0.2,
        "strict_before_interval": [0.14, 0.28],
        "strict_after": 0.63,
        "strict_after_interval": [0.54, 0.71],
        "strict_gain": 0.43,
        "strict_gain_interval": [0.33, 0.52],
        "held_out_problems": 128,
        "steps": steps,
        "seconds_training": 372.0,
        "seconds_evaluation": 14.2,
        "replaced_problems": 0,
        "expected": {"quantity": "accuracy_gain", "at_least": 0.25},
        "claim_met": True,
        "changed_settings": [],
    }
