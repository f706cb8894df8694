"""Sampler and trainer disagree about a token in proportion to 1 - p, in whatever precision the engine has its weights.

Claim      For llama.cpp with weights in F32, F16, BF16, Q8_0 and the shipped Q4_1, the mean of |d log p| / (1 - p) over
           sampled tokens varies by less than a factor of two between p < 0.1, .1-.5, .5-.9 and > 0.9.
Command    python -m experiments run mismatch_anatomy
Cost       10 minutes on a 2-core AMD EPYC, from an empty compilation cache; two thirds of it are the engines, whose
           1,200 distributions over 49,152 tokens llama.cpp writes as text
Expected   flatness >= 0.5 in summary.json: the smallest of these means over the largest, in the worst precision.
           Missed: 0.45 (95 % interval over responses 0.32 to 0.62), in BF16

What holds: in the other four precisions it is 0.53 to 0.68, and up to p = 0.9 the means of every precision lie within a
factor of 1.4 of each other, while 1 - p falls from 1 to 0.1. Above 0.9 the mean is the largest in every precision, 1.5
to 2.2 times the smallest; in BF16 and Q4_1 the intervals of the two do not overlap. So 1 - p is the right scale over
three decades, and too small by up to two near certainty. The printed bound 2 e (1 - p) was broken by no sampled token.

SmolLM2 answers questions in llama.cpp; the trainer is JAX in float32. Whole next-token distributions of both sides give
every divergence, bias and mask exactly in the contexts that were visited. Each perturbation of `rollouts.perturb` goes
through the same measurement, so that it can be said what a perturbation has in common with a real engine.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.mismatch_page import bounds_of
from experiments.mismatch_page import mismatch_page
from experiments.mismatch_statistics import FLAT_BUCKETS
from experiments.mismatch_statistics import exact_statistics
from experiments.mismatch_statistics import flat_means
from experiments.mismatch_statistics import flatness
from experiments.mismatch_statistics import flatness_interval
from experiments.mismatch_statistics import noise_scale
from experiments.ranges import SEED
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.registry import Expectation
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Study
from jaxrl_llm.bounds import sampled
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import response_columns
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.rollouts.engines import LlamaCppEngine
from jaxrl_llm.rollouts.perturb import PERTURBATIONS
from jaxrl_llm.rollouts.perturb import perturbation
from jaxrl_llm.rollouts.perturb import perturbed_logits

SYNCED = ("F32", "F16", "BF16", "Q8_0")
SHIPPED = "Q4_1"

QUESTIONS = (
    "What is the capital of France?",
    "What is 7 + 5?",
    "Name three fruits.",
    "Write a sentence about the sea.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What comes after Tuesday?",
    "Tell me a fact about bees.",
    "How do I boil an egg?",
    "Give a word that rhymes with light.",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of cold?",
    "Write a line of Python that prints hello.",
    "How many legs does a spider have?",
    "Describe a forest in one sentence.",
    "What is 9 times 6?",
    "Suggest a name for a cat.",
    "What is water made of?",
    "Write the beginning of a story about a dragon.",
    "What should I wear in the rain?",
    "Name a planet and say one thing about it.",
    "How do you spell 'necessary'?",
    "What does a teacher do?",
    "Give me a tip for sleeping well.",
)


@dataclasses.dataclass(frozen=True)
class MismatchSettings:
    """Who samples how much.

    Attributes:
        model: "smollm2_135m", or "random": a tiny model of bytes.
        engines: precisions in which llama.cpp gets the weights: F32, F16, BF16, Q8_0; Q4_1 is SmolLM2's shipped file.
        perturbations: names of rollouts.perturb, each at its usual strength; neither model has a router.
        sequences: responses that each engine samples, one per question; at most 24.
        full_sequences: how many of them are compared over the whole vocabulary.
        response_length: tokens of a response.
        delta: threshold of the largest KL per token at which masks are counted. [nats]
        seed: seed of all random numbers.
    """

    model: str = "smollm2_135m"
    engines: tuple[str, ...] = (*SYNCED, SHIPPED)
    perturbations: tuple[str, ...] = tuple(name for name in PERTURBATIONS if name not in ("none", "bf16_router"))
    sequences: int = 24
    full_sequences: int = 16
    response_length: int = 16
    delta: float = 0.05
    seed: int = 0


RANGES: Ranges = {
    "sequences": Range(2, 24),
    "full_sequences": Range(2, 24),
    "response_length": Range(2, 1000),
    "delta": Range(0, 1000, above=True),
    "seed": SEED,
}


@functools.cache
def _model(settings: MismatchSettings) -> tuple[Transformer, Tokenizer]:
    if settings.model == "smollm2_135m":
        return smollm2_135m()
    tokenizer = ByteTokenizer()
    model = Transformer(tiny(vocab_size=tokenizer.vocab_size), rngs=nnx.Rngs(settings.seed))
    # A spread of logits as trained models have it: probabilities from 1e-4 to 0.9.
    model.final_norm.scale[...] = 25 * model.final_norm.scale[...]
    return model, tokenizer


def _engine_settings(settings: MismatchSettings) -> EngineSettings:
    tokenizer = _model(settings)[1]
    return EngineSettings(
        max_new_tokens=settings.response_length,
        group_size=1,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )


@functools.cache
def _trainer(settings: MismatchSettings) -> JaxEngine:
    return JaxEngine(_model(settings)[0], _engine_settings(settings))


def _prompts(settings: MismatchSettings) -> tuple[np.ndarray, np.ndarray]:
    questions = QUESTIONS[: settings.sequences]
    if settings.model == "random":
        return _model(settings)[1].encode_batch(questions)
    chats = [format_chat([{"role": "user", "content": question}]) for question in questions]
    return _model(settings)[1].encode_batch(chats)


def _measured(
    settings: MismatchSettings, tokens: np.ndarray, mask: np.ndarray, drawn: np.ndarray, log_mu: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of the rows that were compared over the whole vocabulary: statistics and the tokens that were drawn there, and
    which rows have no distribution that is none.
    """
    full = len(log_mu)
    width = settings.response_length
    log_pi = _trainer(settings).distributions(tokens[:full], mask[:full], response_width=width)
    pick = np.take_along_axis
    made = {
        "full_log_mu": pick(np.asarray(jax.nn.log_softmax(log_mu)), drawn[:full, :, None], axis=-1)[..., 0],
        "full_log_pi": pick(log_pi, drawn[:full, :, None], axis=-1)[..., 0],
        "full_mask": response_columns(mask[:full], width),
    }
    proper = [~(np.isnan(side) | np.isposinf(side)).any(axis=-1) for side in (log_mu, log_pi)]
    sound = (proper[0] & proper[1] | ~made["full_mask"]).all(axis=1)
    return made | exact_statistics(log_mu, log_pi), sound


def kept_responses(name: str, part: Mapping[str, np.ndarray], sound: np.ndarray) -> dict[str, np.ndarray]:
    """Without the responses that have a log-prob which is not finite, and their number as `dropped`.

    Args:
        name: of the part, for the warning.
        part: arrays with one row per response; those that were compared over the whole vocabulary come first.
        sound: of each of these, whether both whole distributions are; -inf of a token that was not drawn is.

    Raises:
        ValueError: fewer than two of these are left.
    """
    said = np.isfinite(part["log_mu"]) & np.isfinite(part["log_pi"])
    keep = (said | ~part["mask"]).all(axis=1)
    full = len(sound)
    drawn = np.isfinite(part["full_log_mu"]) & np.isfinite(part["full_log_pi"])
    keep[:full] &= sound & (drawn | ~part["full_mask"]).all(axis=1)
    dropped = int((~keep).sum())
    if keep[:full].sum() < 2:
        raise ValueError(f"{name}: {dropped} of {len(keep)} responses have log-probs that are not finite.")
    if dropped:
        warnings.warn(f"{name}: dropped {dropped} of {len(keep)} responses; a log-prob is not finite.", stacklevel=2)
    rows = {key: keep if key in ("log_mu", "log_pi", "mask") else keep[:full] for key in part}
    return {key: value[rows[key]] for key, value in part.items()} | {"dropped": np.array(dropped)}


def _engine(name: str, settings: MismatchSettings) -> Mapping[str, Any]:
    """Sampled by llama.cpp, and scored by both sides. One slot, so that scoring computes what sampling did."""
    model, tokenizer = _model(settings)
    served = smollm2_path() if name == SHIPPED else model
    precision: Any = "F32" if name == SHIPPED else name
    prompts, width = _prompts(settings), settings.response_length
    with LlamaCppEngine(
        served, _engine_settings(settings), sync_dtype=precision, slots=1, tokenizer=tokenizer, context=256
    ) as engine:
        rollout = engine.generate(*prompts, jax.random.key(settings.seed))
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.token_mask)
        full = settings.full_sequences
        log_mu = engine.distributions(tokens[:full], mask[:full], response_width=width)
    log_pi = _trainer(settings).score(tokens, mask, response_width=width)
    sampled_here = {"log_mu": response_columns(np.asarray(rollout.log_prob_behaviour), width), "log_pi": log_pi}
    measured, sound = _measured(settings, tokens, mask, response_columns(tokens, width), log_mu)
    return kept_responses(name, sampled_here | {"mask": response_columns(mask, width)} | measured, sound)


def _perturbed(name: str, settings: MismatchSettings) -> Mapping[str, Any]:
    """On texts that the trainer sampled: in each context the perturbed engine draws one token."""
    model, width, full = _model(settings)[0], settings.response_length, settings.full_sequences
    rollout = _texts(settings)
    tokens, mask = np.asarray(rollout.tokens)[:full], np.asarray(rollout.token_mask)[:full]
    arrays = (jnp.asarray(tokens), jnp.asarray(mask))
    logits = perturbed_logits(model, *arrays, perturbation(name), response_width=width)
    drawn = np.asarray(jax.random.categorical(jax.random.key(settings.seed + 1), logits))
    measured, sound = _measured(settings, tokens, mask, drawn, np.asarray(logits))
    said = {
        "log_mu": measured["full_log_mu"],
        "log_pi": measured["full_log_pi"],
        "mask": measured["full_mask"],
    }
    return kept_responses(name, said | measured, sound)


@functools.cache
def _texts(settings: MismatchSettings) -> Any:
    return _trainer(settings).generate(*_prompts(settings), jax.random.key(settings.seed))


def parts(settings: MismatchSettings) -> Parts:
    """One part per engine and per perturbation.

    Raises:
        ValueError: a name or a number is not possible.
    """
    check_ranges(settings, RANGES)
    if settings.model not in ("smollm2_135m", "random"):
        raise ValueError(f"Field --model is {settings.model!r}; it must be 'smollm2_135m' or 'random'.")
    known = (*SYNCED, SHIPPED) if settings.model == "smollm2_135m" else SYNCED
    for field, names, possible in (
        ("engines", settings.engines, known),
        ("perturbations", settings.perturbations, PERTURBATIONS),
    ):
        for name in names:
            if name not in possible:
                raise ValueError(f"Field --{field} has {name!r}; with this model it may have {', '.join(possible)}.")
    if not settings.engines:
        raise ValueError("Field --engines is empty; the claim needs at least one.")
    if not 2 <= settings.full_sequences <= settings.sequences <= len(QUESTIONS):
        raise ValueError(
            f"Fields --full-sequences and --sequences are {settings.full_sequences} and {settings.sequences}; they "
            f"must satisfy 2 <= full <= all <= {len(QUESTIONS)}."
        )
    named: dict[str, Callable[[], Mapping[str, Any]]] = {}
    for name in settings.engines:
        named[f"engine_{name}"] = functools.partial(_engine, name, settings)
    for name in settings.perturbations:
        named[f"perturbation_{name}"] = functools.partial(_perturbed, name, settings)
    return named


def _numbers(part: dict[str, np.ndarray], settings: MismatchSettings, *, own_texts: bool) -> dict[str, Any]:
    real, all_real = part["full_mask"], part["mask"]
    kl, change = part["kl"][real], np.abs(part["log_mu"] - part["log_pi"])[all_real]
    log_ratio = np.where(all_real, part["log_pi"] - part["log_mu"], 0.0)
    # Of an engine's own responses only: a perturbation draws one token in each context of the trainer's texts. A
    # product of ratios along those is no ratio of a response, and the bounds are averages over the sampler's contexts.
    worst = sampled.sampled_worst_surrogate_error(jnp.asarray(log_ratio), jnp.asarray(all_real)) if own_texts else None
    bounds = bounds_of(part, settings.response_length) if own_texts else None
    return {
        "tokens": int(all_real.sum()),
        "dropped": int(part["dropped"]),
        "mean_change": float(change.mean()),
        "largest_change": float(change.max()),
        "flatness": flatness(part),
        "flatness_interval": list(flatness_interval(part)),
        "flat_means": [float(mean) if np.isfinite(mean) else None for mean in flat_means(part)],
        "mean_kl": float(kl.mean()),
        "largest_kl": float(kl.max()),
        "mean_tv": float(part["tv"][real].mean()),
        "noise_scale": noise_scale(part),
        "largest_noise": None if np.isinf(part["noise"][real]).any() else float(part["noise"][real].max()),
        "k2_over_kl": float(part["k2"][real].sum() / kl.sum()),
        "exceeds_printed_law": float(part["above_printed"][real].mean()),
        "worst_surrogate_error": None if worst is None else float(worst.value),
        "unified_printed": None if bounds is None else float(bounds.unified_printed),
        "unified_sharp": None if bounds is None else float(bounds.unified_sharp),
        "vacuous": None if bounds is None else bool(bounds.vacuous),
        "tokens_until_vacuous": float(1 / kl.mean()),
    }


def summarise(settings: MismatchSettings, results: Results) -> dict[str, Any]:
    """The numbers of every engine and perturbation."""
    numbers = {name: _numbers(part, settings, own_texts=name.startswith("engine_")) for name, part in results.items()}
    engines = [f"engine_{name}" for name in settings.engines]
    return {
        "flatness": min(numbers[name]["flatness"] for name in engines),
        "flat_buckets": list(FLAT_BUCKETS),
    } | numbers


SETTINGS = MismatchSettings()

TINY = dataclasses.replace(
    SETTINGS,
    model="random",
    engines=("F32", "Q8_0"),
    perturbations=("gaussian_noise", "top_p"),
    sequences=3,
    full_sequences=2,
    response_length=8,
)

EXPERIMENT = Study(
    name="mismatch_anatomy",
    claim=(
        "Sampler and trainer disagree about a token in proportion to 1 - p, in whatever precision the engine has its "
        "weights."
    ),
    cost="10 minutes on a 2-core AMD EPYC",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("flatness", at_least=0.5),
    parts=parts,
    summarise=summarise,
    page=mismatch_page,
    ranges=RANGES,
)
