"""One GRPO step of google-tunix on this machine; run by `grpo_step.py` with a Python that has google-tunix.

Reads the work from a JSON file and prints one JSON line: seconds per step, memory, versions.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.memory import clear_peak
from experiments.benchmarks.memory import resident


def load(folder: str, mesh: Any) -> Any:
    """The Llama-family model of a Hugging Face folder, in float32."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as weights

    told = json.loads((Path(folder) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=told["num_hidden_layers"],
        vocab_size=told["vocab_size"],
        embed_dim=told["hidden_size"],
        hidden_dim=told["intermediate_size"],
        num_heads=told["num_attention_heads"],
        head_dim=told["hidden_size"] // told["num_attention_heads"],
        num_kv_heads=told["num_key_value_heads"],
        rope_theta=told.get("rope_theta") or told["rope_parameters"]["rope_theta"],
        norm_eps=told["rms_norm_eps"],
        weight_tying=True,
    )
    return weights.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)


def make_cluster(work: dict[str, Any], model: Any, tokenizer: Any, mesh: Any) -> Any:
    """Actor and sampler on this machine, with answers of a fixed length."""
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl.rollout.base_rollout import RolloutConfig

    prompts, new = work["prompts"], work["new_tokens"]
    width = 2 ** math.ceil(math.log2(max(len(tokenizer.encode(prompt)) for prompt in prompts)))
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-5),
        eval_every_n_steps=10**6,
        max_steps=work["steps"],
        mini_batch_size=len(prompts),
        # Two prompts' gradients at a time, as in this project's process.
        train_micro_batch_size=2,
        rollout_micro_batch_size=len(prompts),
        compute_logps_micro_batch_size=len(prompts),
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=new,
        max_prompt_length=width,
        kv_cache_size=width + new + 1,
        temperature=1.0,
        # An end token that is never sampled fixes the length of every answer.
        eos_tokens=[work["unused_token"]],
    )
    return rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={rl_cluster.Role.ACTOR: mesh, rl_cluster.Role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout,
        ),
    )


def main() -> None:
    """Train for a few steps on fixed-length completions and time each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    work = json.loads(parser.parse_args().work.read_text())
    before = resident("VmRSS")

    import jax
    import numpy as np
    import transformers
    from flax import nnx
    from tunix.rl.grpo.grpo_learner import GRPOConfig
    from tunix.rl.grpo.grpo_learner import GRPOLearner

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = load(work["model"], mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(work["model"])
    seconds: list[float] = []
    cpu_seconds: list[float] = []

    class Timed(GRPOLearner):
        def _run_global_step(self, *arguments, **options):
            if len(seconds) == 1:
                clear_peak()
            start, cpu = time.perf_counter(), time.process_time()
            super()._run_global_step(*arguments, **options)
            jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model))
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)

    learner = Timed(
        make_cluster(work, model, tokenizer, mesh),
        GRPOConfig(num_generations=work["group_size"], num_iterations=1, beta=0.0, epsilon=0.2),
        reward_fns=lambda prompts, completions, **_: [float(len(set(text)) % 2) for text in completions],
    )
    learner.train([{"prompts": np.array(work["prompts"])} for _ in range(work["steps"])])
    print(
        json.dumps(
            {
                "engine": "tunix",
                "versions": {"jax": jax.__version__, "transformers": transformers.__version__},
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "peak_beyond_state_bytes": resident("VmHWM") - before - 16 * parameters,
            }
        )
    )


if __name__ == "__main__":
    main()
