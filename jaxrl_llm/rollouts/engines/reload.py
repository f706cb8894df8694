"""How a server takes new weights: what a run calls with the Hugging Face folder that it saved after an update.

A `reload` of `OpenAIEngine`, and of `--reload my_module:my_function`, returns once the server samples with the weights
of the folder, and raises `EngineError` where it does not. The server must see the folder under the same path. SGLang
and our own server have a request for it, below. vLLM has none: its weight transfer sends tensors by NCCL or CUDA IPC
to a server in development mode, so either your function does that, or it starts the server anew on the folder and waits
until it answers.
"""

import http
import json
from collections.abc import Callable

from jaxrl_llm.redaction import quoted
from jaxrl_llm.redaction import redact
from jaxrl_llm.rollouts.engines import answers
from jaxrl_llm.rollouts.engines.answers import MalformedError
from jaxrl_llm.rollouts.engines.protocol import EngineError
from jaxrl_llm.rollouts.engines.transport import APIConnectionError
from jaxrl_llm.rollouts.engines.transport import Limits
from jaxrl_llm.rollouts.engines.transport import OversizedAnswerError
from jaxrl_llm.rollouts.engines.transport import Server
from jaxrl_llm.rollouts.engines.transport import refusal

LARGEST_ANSWER = 1 << 16
"""Bytes of what a server says of an update."""


def sglang_reload(url: str, *, api_key: str = "none", seconds: float = 600.0) -> Callable[[str], None]:
    """A `reload` for SGLang: POST /update_weights_from_disk {"model_path": folder}.

    Args:
        url: of the server, with or without /v1 at its end.
        api_key: of the server, if it wants one.
        seconds: that one update may take.

    Returns:
        a function of the folder; it raises EngineError where the server did not take the weights.

    Raises:
        ValueError: an address that cannot be.
    """
    return _posting(url, "/update_weights_from_disk", "model_path", api_key=api_key, seconds=seconds)


def weights_reload(url: str, *, api_key: str, seconds: float = 600.0) -> Callable[[str], None]:
    """A `reload` for our own server (`jaxrl_llm.serving`): POST /v1/weights {"path": folder}.

    Args:
        url: of the server, with or without /v1 at its end.
        api_key: of the server.
        seconds: that one update may take.

    Returns:
        a function of the folder, as a path inside the server's --weights; it raises EngineError where the server did
        not take the weights.

    Raises:
        ValueError: an address that cannot be.
    """
    return _posting(url, "/v1/weights", "path", api_key=api_key, seconds=seconds)


def _posting(url: str, route: str, field: str, *, api_key: str, seconds: float) -> Callable[[str], None]:
    """A function that tells a server of a folder, whose answer must have `success`."""
    server = Server(url.rstrip("/").removesuffix("/v1"), api_key=api_key)

    def reload(folder: str) -> None:
        body = json.dumps({field: str(folder)}).encode()
        try:
            sent = server.post(f"{server.path}{route}", body, Limits(seconds, LARGEST_ANSWER))
            answer = sent.answer()
            if answer.status != http.HTTPStatus.OK:
                raise MalformedError(refusal(answer, server.secrets))
            said = answers.parsed(answer.body)
            if said.get("success") is not True:
                raise MalformedError(quoted(str(said.get("message")), server.secrets))
        except (APIConnectionError, OversizedAnswerError, MalformedError) as error:
            sentence = f"{server.name} did not take the weights of {folder}: {error}"
            raise EngineError(redact(sentence, server.secrets)) from None

    return reload
