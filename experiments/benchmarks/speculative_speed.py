"""What speculative decoding brings: a small GLM that has learnt sums drafts with its own layer for further tokens.

    python -m experiments.benchmarks.speculative_speed

The model (five layers of width 160, 16 experts of which 2 are chosen, one further layer) is trained for a few minutes
on lines such as "7+5=12", next token and the one after it, then goes on with such lines. Signs and sums can be
foreseen, new summands cannot. Plain and speculative sampling take turns in one process; what is printed are medians of
their rounds, by the clock and in processor seconds.

Measured on two cores that were far from free (loads of 6 to 18), so that ratios are rough. Greedy, one to three drafts
make 1.70, 1.97 and 2.10 tokens a pass in one sequence, and 1.80, 2.10 and 2.27 in sixteen; plain sampling stays faster:
0.81, 0.68 and 0.60 of its speed by the clock in one sequence, 0.97, 0.81 and 0.65 in sixteen. Two of the three greedy
runs of sixteen parted from plain greedy in some row; how near the logits were is what `widest_tie` is there to say.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.speculative import make_speculative_generate
from jaxrl_llm.rollouts.speculative import measured_acceptance

LENGTH, PROMPT = 56, 24
FURTHER_WEIGHT = 0.3
"""Of the loss of the token after the next one, as in GLM-4.5's pretraining."""


def config_of(*, dense: bool = False) -> TransformerConfig:
    """A small GLM; or a dense model in which as many parameters are active for a token."""
    experts = ExpertsConfig(count=16, chosen=2, width=80, shared=1, dense_layers=1)
    return TransformerConfig(
        vocab_size=ByteTokenizer().vocab_size,
        hidden_size=160,
        num_layers=5,
        num_heads=5,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=(experts.chosen + experts.shared) * experts.width,
        max_positions=512,
        qkv_bias=True,
        rotary_fraction=0.5,
        experts=None if dense else experts,
        mtp_layers=1,
    )


def texts(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Rows of tokens out of the middle of lines of sums."""
    tokenizer, found = ByteTokenizer(), []
    for _ in range(rows):
        pairs = rng.integers(0, 10, (length // 6 + 2, 2))
        line = "".join(f"{first}+{second}={first + second}\n" for first, second in pairs)
        start = rng.integers(0, 6)
        found.append(tokenizer.encode(line)[start : start + length])
    return np.array(found, np.int32)


def trained(config: TransformerConfig, steps: int, rows: int) -> Transformer:
    """The model after so many steps of AdamW on the losses of the next token and of the one after it."""
    graphdef, params, rest = nnx.split(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, 30, steps, 1e-4))
    )

    def nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    @jax.jit
    def step(params, state, tokens):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            hidden = model(tokens)
            next_nll = nll(model.logits(hidden[:, :-1]), tokens[:, 1:])
            further_nll = nll(model.logits(model.hidden_further(hidden, tokens)[:, :-1]), tokens[:, 2:])
            return next_nll + FURTHER_WEIGHT * further_nll, (next_nll, further_nll)

        gradient, losses = jax.grad(loss, has_aux=True)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, losses

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for number in range(steps):
        params, state, losses = step(params, state, texts(rng, rows, LENGTH))
        if number % 50 == 0 or number == steps - 1:
            print(
                f"step {number}: {losses[0]:.3f} nats of the next token, {losses[1]:.3f} of the one after", flush=True
            )
    return nnx.merge(graphdef, params, rest)


def turns(samplers: Mapping[int, Callable[[], object]], rounds: int) -> dict[int, tuple[float, float]]:
    """Median seconds of each sampler, by the clock and of the processor; they take turns."""
    times: dict[int, list[tuple[float, float]]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            start, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(sample())
            times[name].append((time.perf_counter() - start, time.process_time() - processor))
    return {
        name: tuple(statistics.median(column) for column in zip(*found, strict=True)) for name, found in times.items()
    }


def ties(model: Transformer, tokens: jax.Array, tokens_other: jax.Array) -> tuple[int, float]:
    """Rows in which two greedy samplers went apart, and how far apart the two logits were where they did [nats].

    One pass over whole rows says the logits; the two programs round differently, so that any of a near tie may win.
    """
    differs = tokens != tokens_other
    rows, first = np.flatnonzero(np.any(differs, axis=1)), np.argmax(differs, axis=1)
    if not len(rows):
        return 0, 0.0
    places = first[rows]
    logits = np.asarray(model.logits(model(tokens[rows])))[np.arange(len(rows)), places - 1]
    one, other = (np.asarray(x)[rows, places] for x in (tokens, tokens_other))
    gaps = np.take_along_axis(logits, one[:, None], axis=1) - np.take_along_axis(logits, other[:, None], axis=1)
    return len(rows), float(np.max(np.abs(gaps)))


def compare(model: Transformer, temperature: float, batch: int, options: argparse.Namespace) -> list[dict]:
    """Plain sampling and each number of drafts, at one temperature and one number of sequences."""
    graphdef, state = nnx.split(model)
    prompts = jnp.asarray(texts(np.random.default_rng(1), batch, PROMPT))
    arguments = (state, prompts, jnp.ones(prompts.shape, bool), jax.random.key(0), 0, jnp.arange(batch))
    fixed = {
        "max_new_tokens": options.new_tokens,
        "group_size": 1,
        "sampling": SamplingSettings(temperature=temperature),
        "eos_id": (),
        "pad_id": 0,
    }
    plain = make_generate(graphdef, **fixed)
    speculative = {k: make_speculative_generate(graphdef, drafts=k, **fixed) for k in options.drafts}
    # The first call compiles; its rollout says what the drafts were worth.
    expected, rollouts = plain(*arguments), {k: sample(*arguments) for k, sample in speculative.items()}
    times = turns(
        {0: lambda: plain(*arguments)} | {k: lambda k=k: speculative[k](*arguments) for k in speculative},
        options.rounds,
    )
    rows = []
    for drafts, (clock, processor) in times.items():
        row: dict = {"temperature": temperature, "batch": batch, "drafts": drafts}
        row["tokens_per_s"] = round(batch * options.new_tokens / clock, 1)
        row["speed_up"] = round(times[0][0] / clock, 3)
        row["speed_up_processor"] = round(times[0][1] / processor, 3)
        if drafts:
            rollout = rollouts[drafts]
            measured = measured_acceptance(rollout)._asdict()
            row |= {name: np.asarray(value, np.float64).round(3).tolist() for name, value in measured.items()}
            row["passes"] = int(jnp.max(rollout.steps))
            if temperature == 0:
                row["other_rows"], row["widest_tie"] = ties(model, expected.tokens, rollout.tokens)
        rows.append(row)
    return rows


def main() -> None:
    """Train, compare, print a line for each sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="a dense model with as many active parameters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    config = config_of(dense=options.dense)
    print(f"{num_parameters(config):,} parameters", flush=True)
    model = trained(config, options.steps, options.rows)
    results = []
    for temperature in options.temperatures:
        for batch in options.batches:
            for row in compare(model, temperature, batch, options):
                print(json.dumps(row), flush=True)
                results.append(row)
    if options.out:
        options.out.write_text(json.dumps({"jax": jax.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
