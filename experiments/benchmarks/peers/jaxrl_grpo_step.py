"""One GRPO step of this project; run by `grpo_step.py` in a process of its own, so that its memory can be measured.

Reads the work from a JSON file and prints one JSON line: seconds per step and per phase, memory, arithmetic floors.
"""

import argparse
import json
import time
from pathlib import Path

from experiments.benchmarks.memory import clear_peak
from experiments.benchmarks.memory import resident


class Given:
    """The prompts of the work; an answer earns 1 if its bytes add up to an odd number, as half of all answers do."""

    name, stop = "given", ""

    def __init__(self, prompts):
        """Ask these."""
        self.prompts = prompts

    def train(self, seed, step, count):
        """The prompts, in every step."""
        from jaxrl_llm.environments import Problem

        return [Problem(prompt, "", prompt) for prompt in self.prompts]

    def held_out(self):
        """Nothing is measured but time."""
        return []

    def score(self, problem, text):
        """By the parity of its bytes."""
        from jaxrl_llm.environments import Score

        odd = sum(text.encode()) % 2 == 1
        return Score(float(odd), odd, odd)


def matmul_rate(rows: int, width: int, columns: int, repeats: int = 5) -> float:
    """Best float32 matrix-product rate of this process at the model's own shapes [FLOP/s of wall time]."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((rows, width)), jnp.ones((width, columns))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(4):
            product(a, b).block_until_ready()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * rows * width * columns / min(seconds)


def main() -> None:
    """Take a few steps with answers of fixed length and time each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    work = json.loads(parser.parse_args().work.read_text())
    before = resident("VmRSS")

    import numpy as np

    from jaxrl_llm.models.pretrained import load_pretrained
    from jaxrl_llm.models.trainable import full
    from jaxrl_llm.objectives import get_recipe
    from jaxrl_llm.training import OptimizerSettings
    from jaxrl_llm.training import Parts
    from jaxrl_llm.training import TrainSettings
    from jaxrl_llm.training import UpdateSettings
    from jaxrl_llm.training import make_collector
    from jaxrl_llm.training.text.policy import parameter_count
    from jaxrl_llm.training.text.trainer import Trainer

    model, tokenizer = load_pretrained(work["model"])
    prompts, group, new = work["prompts"], work["group_size"], work["new_tokens"]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    settings = TrainSettings(
        steps=work["steps"], prompts=len(prompts), group_size=group, prompt_length=max(lengths), response_length=new,
        optimizer=OptimizerSettings(learning_rate=1e-5),
        # Two prompts' gradients at a time: a quarter of the activations at the same speed.
        update=UpdateSettings(minibatches=1, micro_batch=2, skip_equal_groups=False, bounds_every=0),
    )  # fmt: skip
    # An end token that is never sampled fixes the length of every answer, as min_new_tokens does for the peers.
    end_ids = (work["unused_token"],)
    parts = Parts(model, full(), tokenizer, Given(prompts), get_recipe("dapo"), end_ids=end_ids)
    collection = make_collector(parts, settings, Path("nowhere"))
    trainer = Trainer(parts, settings, collection.collector.shape, collection.law)
    state = trainer.initial_state()
    parameters = parameter_count(state.params)
    del model, parts
    steps = []
    for index in range(work["steps"]):
        if index == 1:
            clear_peak()
        times, cpu = [time.perf_counter()], time.process_time()
        experience = collection.collector.collect(trainer.snapshot(state), state.key, index, {})
        times.append(time.perf_counter())
        prepared = trainer.prepare(state, index, experience)
        times.append(time.perf_counter())
        state, _ = trainer.improve(state, prepared)
        times.append(time.perf_counter())
        assert int(experience.trajectories.action_mask.sum()) == len(prompts) * group * new
        phases = dict(zip(("rollout", "score", "update"), np.diff(times).tolist(), strict=True))
        steps.append({"seconds": times[-1] - times[0], "cpu_seconds": time.process_time() - cpu, **phases})
    config = trainer.parts.model.config
    head = config.vocab_size * config.hidden_size
    body = parameters - head
    rows = len(prompts) * group
    layout = prepared.batch.rows.layout
    width = layout.width * rows // layout.sequences
    flops = {
        "rollout": 2 * (body * (sum(lengths) + rows * (new - 1)) + head * rows * new),
        "score": 2 * (body * width + head * rows * new),
        "update": 6 * body * width + 8 * head * rows * new,
    }
    rate = matmul_rate(1024, config.hidden_size, config.intermediate_size)
    print(
        json.dumps(
            {
                "engine": "jaxrl_llm",
                "steps": steps,
                "seconds": [step["seconds"] for step in steps],
                "cpu_seconds": [step["cpu_seconds"] for step in steps],
                "peak_beyond_state_bytes": resident("VmHWM") - before - 16 * parameters,
                "matmul_flops_per_second": rate,
                "flops": flops,
            }
        )
    )


if __name__ == "__main__":
    main()
