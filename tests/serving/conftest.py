"""One small random model behind a server for all tests of this folder that need no other."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.serving import ServerSettings
from jaxrl_llm.serving import serving

KEY, NAME, CONTEXT, SLOTS = "s3cret-key", "tiny", 768, 4


def tokenizer() -> ByteTokenizer:
    return ByteTokenizer(["<|im_start|>", "<|im_end|>"])


def model(seed: int = 0) -> Transformer:
    return Transformer(tiny(vocab_size=tokenizer().vocab_size, max_positions=CONTEXT), rngs=nnx.Rngs(seed))


SETTINGS = ServerSettings(name=NAME, api_key=KEY, slots=SLOTS, context=CONTEXT, queue=8)


@contextmanager
def served(seed: int = 0, **changes) -> Iterator[str]:
    with serving(model(seed), tokenizer(), dataclasses.replace(SETTINGS, **changes)) as address:
        yield address


def client_of(address: str, **options) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{address}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60, **options})


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    with served() as place:
        yield place


@pytest.fixture(scope="package")
def client(address) -> openai.OpenAI:
    return client_of(address)
