"""llama-server of xllamacpp in a process of its own: prints its address, and serves until its input ends.

Arguments: GGUF file, slots, tokens per slot, threads, API key.
"""

import sys

import xllamacpp


def main() -> None:
    """Serve."""
    path, slots, context, threads, key = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.hostnames, parameters.port, parameters.api_keys = ["127.0.0.1"], 0, [key]
    parameters.n_parallel, parameters.n_ctx = int(slots), int(slots) * int(context)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.verbosity, parameters.fit_params, parameters.cache_ram_mib = -1, False, 0
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
