"""A token per byte, and the tokens of GLM-4.5's chat format: for models that are trained from scratch."""

import tokenizers

from jaxrl_llm.models.glm_chat import CALL
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.glm_chat import KEY
from jaxrl_llm.models.glm_chat import NO_THINKING
from jaxrl_llm.models.glm_chat import THINK
from jaxrl_llm.models.glm_chat import VALUE
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer

MARKERS = ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", *GLM4_5.stop_tokens, NO_THINKING)
"""Say who speaks and how; `decode` leaves them out."""
TAGS = (*THINK, *CALL, *KEY, *VALUE, "<tool_response>", "</tool_response>")
"""Belong to what is said, as in the checkpoint's own tokenizer: `decode` keeps them."""


def glm_bytes() -> Tokenizer:
    """One token per UTF-8 byte (id = byte), and one for each marker and tag of GLM-4.5, from id 256 on.

    An answer ends with <|user|>, <|observation|> or <|endoftext|>; the last one is the padding too.
    """
    backend = ByteTokenizer(MARKERS).backend
    backend.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    ends = [int(backend.encode(name).ids[0]) for name in GLM4_5.stop_tokens]
    return Tokenizer(backend, eos_id=ends[0], eos_ids=ends, pad_id=ends[-1])
