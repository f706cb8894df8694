"""One GRPO step of TRL on this machine; run by `grpo_step.py` with the Python of an environment that has trl and torch.

Reads the work from a JSON file and prints one JSON line: seconds per step, memory, versions.
"""

import argparse
import json
import time
from pathlib import Path

from experiments.benchmarks.memory import clear_peak
from experiments.benchmarks.memory import resident


def main() -> None:
    """Train for a few steps on fixed-length completions and time each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    work = json.loads(arguments.work.read_text())

    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(work["threads"])
    before = resident("VmRSS")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    batch = len(work["prompts"]) * work["group_size"]
    settings = trl.GRPOConfig(
        output_dir=work["scratch"],
        use_cpu=True,
        per_device_train_batch_size=batch,
        num_generations=work["group_size"],
        max_completion_length=work["new_tokens"],
        generation_kwargs={"min_new_tokens": work["new_tokens"]},
        max_steps=work["steps"],
        learning_rate=1e-5,
        beta=0.0,
        torch_compile=arguments.compile,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        shuffle_dataset=False,
    )
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()
            self.cpu = time.process_time()
            if len(seconds) == 1:
                clear_peak()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            cpu_seconds.append(time.process_time() - self.cpu)

    cpu_seconds: list[float] = []
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=settings,
        reward_funcs=lambda completions, **_: [float(len(set(text)) % 2) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": work["prompts"] * work["steps"]}),
        callbacks=[Clock()],
    )
    trainer.train()
    fixed = 16 * parameters  # weights, gradients, two Adam moments in float32
    print(
        json.dumps(
            {
                "engine": "trl" + ("+torch.compile" if arguments.compile else ""),
                "versions": {m.__name__: m.__version__ for m in (trl, torch, transformers)},
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "peak_beyond_state_bytes": resident("VmHWM") - before - fixed,
            }
        )
    )


if __name__ == "__main__":
    main()
