"""Times llama.cpp's batch API for decode_speed.py, under a Python that has llama-cpp-python and nothing of ours.

Reads one JSON request per line and answers each with one JSON line:
    {"batch": B, "prompt": P, "new": R, "kv_unified": bool, "flash": bool}
    -> {"tokens": ..., "decode_s": ..., "decode_cpu_s": ..., "prefill_s": ...}
Only `llama_decode` is timed: no sampling, no reading of logits, tokens are given. Sequences are distinct.
"""

import json
import sys
import time

import llama_cpp


class Engine:
    """A loaded model with one context."""

    def __init__(self, model, *, batch: int, slots: int, threads: int, kv_unified: bool, flash: bool):
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = batch * slots
        settings.n_seq_max = batch
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = kv_unified
        settings.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.rows = batch

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Read (token, position, sequence, want logits)."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def run(self, prompt: int, new: int) -> dict[str, float]:
        """Read the prompts, then `new` tokens one at a time in every sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        entries = [
            (1000 + (7 * row + t) % 40000, t, row, t == prompt - 1) for row in range(self.rows) for t in range(prompt)
        ]
        start = time.perf_counter()
        for i in range(0, len(entries), 512):
            self.decode(entries[i : i + 512])
        middle, middle_cpu = time.perf_counter(), time.process_time()
        for t in range(new):
            self.decode([(1000 + (13 * row + t) % 40000, prompt + t, row, True) for row in range(self.rows)])
        end, end_cpu = time.perf_counter(), time.process_time()
        return {
            "prefill_s": middle - start,
            "decode_s": end - middle,
            "decode_cpu_s": end_cpu - middle_cpu,
            "tokens": self.rows * new,
        }

    def close(self) -> None:
        """Free the context."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


def main() -> None:
    """Serve requests from standard input until it closes: worker.py MODEL THREADS."""
    path, threads = sys.argv[1], int(sys.argv[2])
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    print(json.dumps({"ready": llama_cpp.__version__}), flush=True)
    current, engine = None, None
    for line in sys.stdin:
        request = json.loads(line)
        slots = request["prompt"] + request["new"]
        wanted = (request["batch"], slots, request["kv_unified"], request["flash"])
        if wanted != current:
            if engine:
                engine.close()
            engine = Engine(
                model,
                batch=request["batch"],
                slots=slots,
                threads=threads,
                kv_unified=request["kv_unified"],
                flash=request["flash"],
            )
            current = wanted
            engine.run(8, 2)
        print(json.dumps(engine.run(request["prompt"], request["new"])), flush=True)


if __name__ == "__main__":
    main()
