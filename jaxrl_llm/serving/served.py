"""What is served: a model with its tokenizer and chat, from a run, a Hugging Face folder, a GGUF file or a package."""

from pathlib import Path

import jax.numpy as jnp

from jaxrl_llm.models import chat as chats
from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.saved_run import FILE
from jaxrl_llm.training.saved_run import SMOLLM2
from jaxrl_llm.training.saved_run import load_run

FORMATS: dict[str, Chat] = {
    "chatml": chats.CHATML,
    "qwen2": chats.QWEN2,
    "qwen2_5": chats.QWEN2_5,
    "smollm2": chats.SMOLLM2,
    "llama3": chats.LLAMA3,
    "glm4_5": GLM4_5,
}
"""Chats that can be asked for by name."""


def load_served(
    source: str, *, step: int | None = None, dtype: jnp.dtype | type = jnp.float32
) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer.

    Args:
        source: "smollm2_135m", the folder of a run, a Hugging Face folder or a GGUF file.
        step: of which checkpoint of a run; None for the newest.
        dtype: of parameters and products; a run's are its own.

    Raises:
        ValueError: a step of what is no run, or weights that cannot be used.
        StorageError: a run that cannot be read.
    """
    if (Path(source) / FILE).is_file():
        run = load_run(source, step=step)
        return run.model, run.tokenizer
    if step is not None:
        raise ValueError(f"step is {step}, but {source} is no folder of a run; only runs have steps.")
    return smollm2_135m(dtype=dtype) if source == SMOLLM2 else load_pretrained(source, dtype=dtype)


def chat_of(tokenizer: Tokenizer, name: str | None = None) -> Chat | None:
    """The chat of a model.

    Args:
        tokenizer: of the model.
        name: of `FORMATS`; None: GLM-4.5's where the tokenizer has its markers, else the template that came with it,
            else ChatML where it has those markers; None of all: the model has no chat.

    Raises:
        ValueError: no such name, or a chat whose end is none of the tokenizer's tokens.
    """

    def has(*tokens: str) -> bool:
        return all(tokenizer.backend.token_to_id(token) is not None for token in tokens)

    if name is not None and name not in FORMATS:
        raise ValueError(f"chat is {name!r}; expected one of {', '.join(FORMATS)}.")
    if name is not None:
        chat: Chat = FORMATS[name]
    elif has("[gMASK]", "<sop>", *GLM4_5.stop_tokens):
        chat = GLM4_5
    elif tokenizer.chat_template is not None:
        chat = chats.TemplateChat.of(tokenizer)
    elif has("<|im_start|>", "<|im_end|>"):
        chat = chats.CHATML
    else:
        return None
    if not has(*chat.stop_tokens):
        raise ValueError(f"chat {name!r} ends with {', '.join(chat.stop_tokens)}, which the tokenizer does not have.")
    return chat


def end_ids_of(tokenizer: Tokenizer, chat: Chat | None) -> tuple[int, ...]:
    """The tokens with which an answer can end."""
    stops = () if chat is None else map(tokenizer.backend.token_to_id, chat.stop_tokens)
    return tuple(dict.fromkeys((*tokenizer.eos_ids, *(token for token in stops if token is not None))))
