"""llama.cpp as the reader that GGUF files are written for: its token ids, where it ends, its log-probs."""

import gc
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp


class Reader:
    """A server of llama.cpp over one file."""

    def __init__(self, path: Path) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_parallel, settings.n_ctx = 1, 64
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.verbosity, settings.warmup, settings.fit_params, settings.cache_ram_mib = -1, False, False, 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def _ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def ids(self, text: str, *, add_special: bool = True) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return self._ask("/tokenize", body)["tokens"]

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends where this token is sampled."""
        body = {"prompt": [0], "n_predict": 2, "logit_bias": [[token, 1e9]], "samplers": ["top_k"], "top_k": 1}
        return self._ask("/completion", body)["stop_type"] == "eos"

    def log_probs(self, prompt: list[int], vocab_size: int) -> np.ndarray:
        """Log-probs of the next token [V]."""
        body = {"prompt": prompt, "n_predict": 1, "n_probs": vocab_size, "samplers": ["temperature"], "temperature": 1}
        # A token whose text is half a character is left out of the answer unless another one is sampled.
        answer = self._ask("/completion", {**body, "logit_bias": [[ord("a"), 1e9]]})
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        result = np.full(vocab_size, -np.inf, np.float32)
        result[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return result


@contextmanager
def reader_of(path: Path) -> Iterator[Reader]:
    reader = Reader(path)
    try:
        yield reader
    finally:
        del reader.server
        gc.collect()
