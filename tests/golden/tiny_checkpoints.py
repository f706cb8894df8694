"""Small checkpoints made from a seed, so that golden logits need no stored weights. Imports numpy only.

Norm scales and biases are random and epsilon is large in one of them: a test does not see ones, zeros and 1e-6.
"""

from typing import Any

import numpy as np

VOCABULARY, WIDTH, INNER, LAYERS = 97, 32, 48, 2
BATCH, LENGTH, PADDING = 2, 12, 5
"""The second row of the batch starts with `PADDING` padded places."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}

_GLM = {
    **_COMMON,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 1_000_000.0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama_grouped_tied": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 0.05,
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
    },
    "llama_scaled_rotation_untied": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral_untied": {
        **_COMMON,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
    },
    "qwen2_biases": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
    },
    "qwen3_head_norms": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
    },
    "glm4_moe_scaled_head_norms": {**_GLM, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "glm4_moe_groups": {**_GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    "glm4_moe_plain_weights": {**_GLM, "attention_bias": False, "norm_topk_prob": False, "first_k_dense_replace": 0},
    "glm4_moe_further_token": {**_GLM, "num_nextn_predict_layers": 1},
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint under their Hugging Face names, float32, the same on every machine."""
    settings = CHECKPOINTS[name]
    # RandomState, because its stream is frozen for all time; default_rng's may change between versions of numpy.
    random = np.random.RandomState(seed=1 + list(CHECKPOINTS).index(name))

    def matrix(rows: int, columns: int, gain: float = 1.5) -> np.ndarray:
        return (gain * columns**-0.5 * random.standard_normal((rows, columns))).astype(np.float32)

    def scale(size: int) -> np.ndarray:
        return random.uniform(0.5, 1.5, size).astype(np.float32)

    def feed_forward(name: str, inner: int) -> dict[str, np.ndarray]:
        sizes = {"gate": (inner, WIDTH), "up": (inner, WIDTH), "down": (WIDTH, inner)}
        return {f"{name}.{part}_proj.weight": matrix(*size) for part, size in sizes.items()}

    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    head_dim = settings.get("head_dim", WIDTH // heads)
    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH, gain=WIDTH**0.5)}
    further = settings.get("num_nextn_predict_layers", 0)
    for index in range(LAYERS + further):
        layer = f"model.layers.{index}"
        tensors[f"{layer}.input_layernorm.weight"] = scale(WIDTH)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{layer}.self_attn.{part}_proj.weight"] = matrix(count * head_dim, WIDTH)
            if settings["model_type"] == "qwen2" or settings.get("attention_bias"):
                bias = 0.5 * random.standard_normal(count * head_dim)
                tensors[f"{layer}.self_attn.{part}_proj.bias"] = bias.astype(np.float32)
        if settings["model_type"].startswith("qwen3") or settings.get("use_qk_norm"):
            tensors[f"{layer}.self_attn.q_norm.weight"] = scale(head_dim)
            tensors[f"{layer}.self_attn.k_norm.weight"] = scale(head_dim)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(WIDTH, heads * head_dim)
        tensors[f"{layer}.post_attention_layernorm.weight"] = scale(WIDTH)
        experts = settings.get("n_routed_experts", settings.get("num_experts", 0))
        sparse = bool(experts) and index >= settings.get("first_k_dense_replace", 0)
        inner = settings["moe_intermediate_size"] if sparse else INNER
        if sparse:
            tensors[f"{layer}.mlp.gate.weight"] = matrix(experts, WIDTH)
            if settings["model_type"] == "glm4_moe":
                bias = random.uniform(-0.3, 0.3, experts)
                tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = bias.astype(np.float32)
                shared = settings["n_shared_experts"] * inner
                tensors |= feed_forward(f"{layer}.mlp.shared_experts", shared)
            for expert in range(experts):
                tensors |= feed_forward(f"{layer}.mlp.experts.{expert}", inner)
        else:
            tensors |= feed_forward(f"{layer}.mlp", inner)
        if index >= LAYERS:
            tensors |= {f"{layer}.{part}.weight": scale(WIDTH) for part in ("enorm", "hnorm", "shared_head.norm")}
            tensors[f"{layer}.eh_proj.weight"] = matrix(WIDTH, 2 * WIDTH)
    tensors["model.norm.weight"] = scale(WIDTH)
    if not settings["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(VOCABULARY, WIDTH)
    return tensors


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Token ids [2, 12] and their mask; the second row is padded on the left."""
    tokens = np.random.RandomState(seed=0).randint(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1, :PADDING] = False
    return tokens, mask
