"""Entries of config.json that no model has, and those that are not there."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.hf_config import NEUTRAL
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.weights import load_hf
from tests.golden.tiny_checkpoints import CHECKPOINTS
from tests.golden.tiny_checkpoints import tensors_of

NAME = "llama_grouped_tied"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_attention_heads": 0}, "has 0 heads for 32 channels"),
        ({"num_attention_heads": -4}, "has -4 heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; expected a whole number"),
        ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0; expected a whole number"),
        ({"num_attention_heads": True}, "expected a whole number"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"num_key_value_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"head_dim": {}}, "head_dim is {}; expected a whole number"),
        ({"hidden_size": 10**30}, "must be at most 2147483647"),
        ({"num_hidden_layers": 50_000}, "is to have 50000 layers"),
        ({"num_hidden_layers": 2**31 - 1}, "is to have 2147483647 layers"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"num_hidden_layers": 1}, "has 9 tensors that this architecture lacks"),
        ({"vocab_size": 96}, r"embed_tokens.weight is float32 \[97, 32\], expected floats \[96, 32\]"),
        ({"vocab_size": 2**31 - 1}, "tensors that do not fit the model"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": -1e-6}, "norm_eps must be positive"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"rope_theta": 0}, "rope_theta must be positive"),
        ({"rope_theta": 10**400}, "expected a finite number|cannot be used|at most"),
        ({"rope_theta": []}, r"rope_theta is \[\]|rope_theta"),
        ({"rope_scaling": []}, r"rope_scaling is \[\]; expected an object"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; expected an object"),
        ({"rope_scaling": {"factor": 2.0}}, "without saying how"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None; expected a finite number"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "scales rotary positions by"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors: lm_head.weight"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; expected a list of names"),
        ({"architectures": [3]}, r"architectures is \[3\]"),
        ({"architectures": {}, "model_type": ["llama"]}, "supported are"),
        ({"model_type": "gemma"}, "names LlamaForCausalLM, model_type gemma; supported are"),
        ({"model_type": "qwen2"}, "names LlamaForCausalLM, model_type qwen2; supported are"),
        ({"model_type": 5}, "names LlamaForCausalLM, model_type 5; supported are"),
        ({"architectures": ["a\x1b[2J\nb\ud800"]}, r"names a\\x1b\[2J\\nb\\ud800, model_type llama; supported are"),
        ({"hidden_act": "x\n\x1b[2J"}, r"hidden_act is x\\n\\x1b\[2J; supported is silu"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; expected an object"),
        ({"quantization_config": {}}, "quantised by unnamed"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"max_position_embeddings": 0}, "max_positions must be a positive integer"),
        ({"max_position_embeddings": 2**40}, "max_positions must be at most"),
        ({"sliding_window": "64"}, "sliding_window is '64'"),
        ({"partial_rotary_factor": [1]}, r"partial_rotary_factor is \[1\]; expected a finite number"),
        ({"partial_rotary_factor": 0}, "rotates the fraction 0 of each head"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; expected a finite number"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": "x"}, "rope_theta is 'x'; expected a finite"),
        ({"rope_interleave": True}, "sets rope_interleave to True, which is not computed here; supported is false or"),
        ({"attn_logit_softcapping": 50.0}, "sets attn_logit_softcapping to 50.0"),
        ({"final_logit_softcapping": 30.0}, "sets final_logit_softcapping to 30.0"),
        ({"is_causal": False}, "sets is_causal to False"),
        ({"use_bidirectional_attention": True}, "sets use_bidirectional_attention to True"),
        ({"logits_scaling": 8.0}, "sets logits_scaling to 8.0"),
        ({"attention_multiplier": 0.5}, "sets attention_multiplier"),
        ({"no_rope_layers": [1, 0]}, "sets no_rope_layers"),
        ({"clip_qkv": {}}, "sets clip_qkv"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "has a layer of type linear_attention"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected a list"),
    ],
)
def test_entries_of_config_json_that_no_model_has(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save_file(tensors_of(NAME), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CHECKPOINTS[NAME], **changes}))
    start = time.process_time()
    with pytest.raises(ModelFileError, match=sentence) as caught:
        load_hf(tmp_path)
    assert str(caught.value).isprintable()
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llama", (16, 32, 2048)), ("mistral", (8, 32, 131072)), ("qwen2", (32, 32, 32768)), ("qwen3", (32, 128, 32768))],
)
def test_absent_entries_of_config_json_mean_what_they_mean_to_transformers(model_type: str, expected: tuple) -> None:
    """Number of key-value heads, elements of a head, positions: the defaults of transformers 5."""
    heads = 16 if model_type in ("llama", "mistral") else 32
    settings = {"vocab_size": 9, "hidden_size": 32 * heads, "intermediate_size": 8, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": heads, "model_type": model_type}
    if model_type == "mistral":
        settings["sliding_window"] = None
    found = config_from_hf(settings)
    assert (found.num_kv_heads, found.head_dim, found.max_positions) == expected
    assert config_from_hf({**settings, "num_key_value_heads": None, "head_dim": None}).num_kv_heads == heads
    if model_type == "mistral":
        del settings["sliding_window"]
        with pytest.raises(ModelFileError, match="sliding_window of 4096 positions"):
            config_from_hf(settings)


def test_entries_under_which_nothing_changes_are_read() -> None:
    plain = config_from_hf(CHECKPOINTS[NAME])
    neutral = {name: values[0] for name, values in NEUTRAL.items()}
    assert config_from_hf({**CHECKPOINTS[NAME], **neutral}) == plain
    assert config_from_hf({**CHECKPOINTS[NAME], **dict.fromkeys(NEUTRAL)}) == plain
    assert config_from_hf({**CHECKPOINTS[NAME], "layer_types": ["full_attention"] * 2}) == plain
