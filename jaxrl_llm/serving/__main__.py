"""`python -m jaxrl_llm.serving MODEL_OR_RUN --port P --api-key-file F`: a model behind OpenAI's API."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from jaxrl_llm.models.files import one_line
from jaxrl_llm.serving.app import Limits
from jaxrl_llm.serving.served import FORMATS
from jaxrl_llm.serving.served import load_served
from jaxrl_llm.serving.server import ServerSettings
from jaxrl_llm.serving.server import bound_socket
from jaxrl_llm.serving.server import http_server
from jaxrl_llm.serving.server import make_service


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m jaxrl_llm.serving", description="Serve a model behind OpenAI's API (docs/serving.md)."
    )
    add = found.add_argument
    add("source", metavar="MODEL_OR_RUN", help="folder of a run, Hugging Face folder, GGUF file, or smollm2_135m")
    add("--host", default="127.0.0.1", help="address to listen on; one that others can reach needs a key")
    add("--port", type=int, default=8000, help="0 takes any free one")
    add("--api-key-file", type=Path, help="file whose first line every request must bring as its key")
    add("--no-key", action="store_true", help="serve whoever reaches the loopback, other users of the machine too")
    add("--name", help="of the model in requests; by default that of its folder or file")
    add("--step", type=int, help="of which checkpoint of a run; by default the newest")
    add("--slots", type=int, default=8, help="answers that are decoded at a time")
    add("--context", type=int, help="tokens of prompt and answer")
    add("--queue", type=int, default=256, help="answers that may wait for a slot")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products and of the cache")
    add("--chat", choices=sorted(FORMATS), help="format of chats; by default that which came with the model")
    add("--weights", type=Path, help="folder from which POST /v1/weights may load weights")
    add("--seconds", type=float, default=600.0, help="that one request may take, its wait included")
    add("--body-bytes", type=int, default=4 << 20, help="size of a request's body")
    return found


def api_key_of(options: argparse.Namespace) -> str | None:
    """The key in the file.

    Raises:
        ValueError: no file and no --no-key, a file that cannot be read, or no key in it.
    """
    if options.api_key_file is None:
        if not options.no_key:
            raise ValueError("give the server a key (--api-key-file FILE), or --no-key to serve the loopback without.")
        return None
    try:
        lines = options.api_key_file.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {options.api_key_file} cannot be read ({one_line(error)}).") from None
    if len(lines) != 1:
        raise ValueError(f"--api-key-file {options.api_key_file} has {len(lines)} words; expected the key alone.")
    return lines[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; what cannot be served is one sentence."""
    options = parser().parse_args(arguments)
    try:
        key = api_key_of(options)
        limits = Limits(body_bytes=options.body_bytes, seconds=options.seconds)
        place = bound_socket(options.host, options.port, api_key=key)
        model, tokenizer = load_served(options.source, step=options.step)
        settings = ServerSettings(
            name=options.name or Path(options.source).stem or "model",
            api_key=key,
            slots=options.slots,
            context=options.context,
            queue=options.queue,
            dtype=jnp.dtype(options.dtype),
            chat=options.chat,
            weights=options.weights,
            limits=limits,
        )
        service = make_service(model, tokenizer, settings)
        service.engine.decoder.warm_up()
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        print(f"cannot serve {options.source}: {one_line(error)}", file=sys.stderr)
        return 2
    service.engine.start()
    host, port = place.getsockname()[:2]
    print(f"{settings.name} at http://{host}:{port}/v1, {settings.slots} slots", flush=True)
    try:
        http_server(service).run(sockets=[place])
    finally:
        service.engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
