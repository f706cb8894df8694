"""Logits against golden values of transformers and llama.cpp (tests/golden says how they were made)."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.gguf_io import interleave
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import build_model
from jaxrl_llm.models.weights import model_tensors
from tests.golden.texts import PROMPTS
from tests.golden.tiny_checkpoints import CHECKPOINTS
from tests.golden.tiny_checkpoints import batch
from tests.golden.tiny_checkpoints import tensors_of

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = json.loads((GOLDEN / "tiny_configs.json").read_text(encoding="utf-8"))

TINY_TOLERANCE = 1e-4
"""Of logits with a standard deviation of several; 2e-5 was measured. A wrong model is off by more than 0.1."""
SMOLLM2_TOLERANCE = 1e-3
"""Of logits with a standard deviation of three to five; 1e-4 was measured."""


@jax.jit
def logits_of(model: Transformer, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model.logits(model(tokens, mask))


def tiny_error(name: str, config: TransformerConfig, tensors: dict[str, np.ndarray], dtype=jnp.float32) -> float:
    """Largest difference from transformers' logits at real tokens."""
    tokens, mask = batch()
    found = logits_of(build_model(config, tensors, dtype=dtype), jnp.asarray(tokens), jnp.asarray(mask))
    with np.load(GOLDEN / "tiny_logits.npz") as golden:
        return float(np.abs(np.asarray(found) - golden[name])[mask].max())


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("written_by", ["hand", "transformers"])
def test_tiny_checkpoints_give_the_logits_of_transformers(name: str, written_by: str) -> None:
    settings = CHECKPOINTS[name] if written_by == "hand" else CONFIGS[name]
    assert tiny_error(name, config_from_hf(settings), tensors_of(name)) < TINY_TOLERANCE


def further_error(tensors: dict[str, np.ndarray]) -> float:
    """Largest difference from transformers' logits of the token after the next one."""
    model = build_model(config_from_hf(CHECKPOINTS[FURTHER]), tensors)
    tokens = jnp.asarray(batch()[0][:1])
    found = model.logits(model.hidden_further(model(tokens), tokens))[0]
    with np.load(GOLDEN / "tiny_logits.npz") as golden:
        return float(np.abs(np.asarray(found) - golden[f"{FURTHER}.further"]).max())


def test_the_token_after_the_next_one_has_the_logits_of_transformers() -> None:
    tensors = tensors_of(FURTHER)
    assert further_error(tensors) < TINY_TOLERANCE
    joined = f"{NEXT}.eh_proj.weight"
    halves = np.split(tensors[joined], 2, axis=1)[::-1]
    assert further_error(tensors | {joined: np.concatenate(halves, axis=1)}) > 1000 * TINY_TOLERANCE
    assert further_error(swap(tensors, f"{NEXT}.enorm.weight", f"{NEXT}.hnorm.weight")) > 1000 * TINY_TOLERANCE


def test_a_further_token_needs_its_layer() -> None:
    model = build_model(config_from_hf(CHECKPOINTS["qwen3_moe"]), tensors_of("qwen3_moe"))
    tokens = jnp.asarray(batch()[0])
    with pytest.raises(ValueError, match="no layer that predicts further tokens; its mtp_layers is 0"):
        model.hidden_further(jnp.zeros((*tokens.shape, 32)), tokens)


def test_bfloat16_is_near_and_not_equal() -> None:
    name = "mistral_untied"
    error = tiny_error(name, config_from_hf(CHECKPOINTS[name]), tensors_of(name), dtype=jnp.bfloat16)
    assert 100 * TINY_TOLERANCE < error < 0.5


def swap(tensors: dict[str, np.ndarray], first: str, second: str) -> dict[str, np.ndarray]:
    return {**tensors, first: tensors[second], second: tensors[first]}


MLP = "model.layers.1.mlp"
ATTENTION = "model.layers.0.self_attn"
FURTHER, NEXT = "glm4_moe_further_token", "model.layers.2"
BIAS = f"{MLP}.gate.e_score_correction_bias"
BUGS: dict[str, tuple[str, dict[str, object], Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]] = {
    "rotary base": ("llama_grouped_tied", {"rope_theta": 20_000.0}, dict),
    "epsilon": ("llama_grouped_tied", {"rms_norm_eps": 1e-5}, dict),
    "rotary scaling": ("llama_scaled_rotation_untied", {"rope_scaling": None}, dict),
    "gate and up": (
        "mistral_untied",
        {},
        lambda tensors: swap(tensors, f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"),
    ),
    "norms": (
        "mistral_untied",
        {},
        lambda tensors: swap(tensors, "model.norm.weight", "model.layers.0.input_layernorm.weight"),
    ),
    "order of query rows": (
        "mistral_untied",
        {},
        lambda tensors: tensors | {f"{ATTENTION}.q_proj.weight": interleave(tensors[f"{ATTENTION}.q_proj.weight"], 4)},
    ),
    "order of key heads": (
        "qwen3_head_norms",
        {},
        lambda tensors: tensors | {f"{ATTENTION}.k_proj.weight": np.roll(tensors[f"{ATTENTION}.k_proj.weight"], 16, 0)},
    ),
    "key bias and value bias": (
        "qwen2_biases",
        {},
        lambda tensors: swap(tensors, f"{ATTENTION}.k_proj.bias", f"{ATTENTION}.v_proj.bias"),
    ),
    "query norm and key norm": (
        "qwen3_head_norms",
        {},
        lambda tensors: swap(tensors, f"{ATTENTION}.q_norm.weight", f"{ATTENTION}.v_norm.weight".replace("v_", "k_")),
    ),
    "rotation of whole heads": ("glm4_moe_scaled_head_norms", {"partial_rotary_factor": 1.0}, dict),
    "scale of the experts": ("glm4_moe_scaled_head_norms", {"routed_scaling_factor": 1.0}, dict),
    "experts of all groups": ("glm4_moe_groups", {"topk_group": 4}, dict),
    "weights of experts normalised": ("glm4_moe_plain_weights", {"norm_topk_prob": True}, dict),
    "correction bias of the router": (
        "glm4_moe_scaled_head_norms",
        {},
        lambda tensors: tensors | {BIAS: -tensors[BIAS]},
    ),
    "order of experts": (
        "qwen3_moe",
        {},
        lambda tensors: swap(tensors, f"{MLP}.experts.0.up_proj.weight", f"{MLP}.experts.1.up_proj.weight"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_parity_sees(bug: str) -> None:
    name, settings, change = BUGS[bug]
    config = config_from_hf({**CHECKPOINTS[name], **settings})
    assert tiny_error(name, config, change(tensors_of(name))) > 1000 * TINY_TOLERANCE


@pytest.fixture(scope="module")
def smollm2() -> tuple[Transformer, Tokenizer]:
    return smollm2_135m()


@pytest.fixture(scope="module")
def smollm2_logits(smollm2: tuple[Transformer, Tokenizer]) -> list[np.ndarray]:
    return prompt_logits(*smollm2)


def prompt_logits(model: Transformer, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Logits [T, V] of each prompt, computed as one left-padded batch."""
    tokens, mask = tokenizer.encode_batch(PROMPTS)
    logits = np.asarray(logits_of(model, jnp.asarray(tokens), jnp.asarray(mask)))
    return [row[keep] for row, keep in zip(logits, mask, strict=True)]


def excerpts(file: str, prefix: str = "") -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """The sampled vocabulary entries, and what is kept of each prompt."""
    names = ("log_sum_exp", "top_ids", "top_logits", "sampled_logits")
    with np.load(GOLDEN / file) as golden:
        kept = [{name: golden[f"{prefix}{index}.{name}"] for name in names} for index in range(len(PROMPTS))]
        return golden["sampled_ids"], kept


def logit_error(logits: list[np.ndarray], file: str, prefix: str = "") -> float:
    """Largest difference from a golden file, over its sample, its largest logits and its log-sum-exp."""
    sampled_ids, kept = excerpts(file, prefix)
    errors = []
    for found, golden in zip(logits, kept, strict=True):
        log_sum_exp = np.logaddexp.reduce(found.astype(np.float64), axis=-1)
        errors += [
            np.abs(found[:, sampled_ids] - golden["sampled_logits"]).max(),
            np.abs(np.take_along_axis(found, golden["top_ids"], -1) - golden["top_logits"]).max(),
            np.abs(log_sum_exp - golden["log_sum_exp"]).max(),
        ]
    return float(max(errors))


@pytest.mark.parametrize(("file", "prefix"), [("smollm2_transformers.npz", ""), ("smollm2_llama_cpp.npz", "F32.")])
def test_smollm2_gives_the_logits_of(file: str, prefix: str, smollm2_logits: list[np.ndarray]) -> None:
    """llama.cpp computed these from a float32 file that `save_gguf` wrote."""
    assert logit_error(smollm2_logits, file, prefix) < SMOLLM2_TOLERANCE


def test_smollm2_is_near_llama_cpp_on_the_quantised_file(smollm2_logits: list[np.ndarray]) -> None:
    """llama.cpp rounds activations to 8 bits there, so only the size of the difference is known: about 0.05 nats."""
    _, kept = excerpts("smollm2_llama_cpp.npz", "Q4_1.")
    differences = []
    for found, golden in zip(smollm2_logits, kept, strict=True):
        best = golden["top_ids"][:, :1]
        ours = np.take_along_axis(found, best, -1)[:, 0] - np.logaddexp.reduce(found.astype(np.float64), axis=-1)
        differences.append(np.abs(ours - (golden["top_logits"][:, 0] - golden["log_sum_exp"])))
    mean = float(np.concatenate(differences).mean())
    assert 0.005 < mean < 0.1


@pytest.mark.parametrize(("part", "heads"), [("q_proj", 9), ("k_proj", 3)])
def test_parity_sees_rows_left_in_gguf_order(part: str, heads: int, smollm2: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = smollm2
    tensors = model_tensors(model)
    for name in tensors:
        if name.endswith(f"{part}.weight"):
            tensors[name] = interleave(tensors[name], heads)
    logits = prompt_logits(build_model(model.config, tensors), tokenizer)
    assert logit_error(logits, "smollm2_transformers.npz") > 1.0


def test_golden_logits_are_not_degenerate() -> None:
    """Tolerances above are absolute; they mean something because the logits spread."""
    with np.load(GOLDEN / "tiny_logits.npz") as golden:
        assert all(golden[name].std() > 1 for name in CHECKPOINTS)
    for file, prefix in (("smollm2_transformers.npz", ""), ("smollm2_llama_cpp.npz", "F32.")):
        assert all(prompt["sampled_logits"].std() > 1 for prompt in excerpts(file, prefix)[1])
