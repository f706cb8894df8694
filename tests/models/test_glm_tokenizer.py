"""A byte per token, and the tokens of GLM-4.5's chat as single ones."""

from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.glm_tokenizer import MARKERS
from jaxrl_llm.models.glm_tokenizer import TAGS
from jaxrl_llm.models.glm_tokenizer import glm_bytes

LETTERS = glm_bytes()


def test_every_marker_and_tag_is_one_token() -> None:
    for name in (*MARKERS, *TAGS):
        assert len(LETTERS.encode(name)) == 1, name
    assert LETTERS.vocab_size == 256 + 3 + len(MARKERS) + len(TAGS)


def test_an_answer_ends_with_any_of_the_chats_stop_tokens() -> None:
    assert [LETTERS.backend.id_to_token(token) for token in LETTERS.eos_ids] == list(GLM4_5.stop_tokens)


def test_what_is_said_keeps_its_tags_and_loses_its_markers() -> None:
    said = "\n<think>a+5</think>\n<tool_call>f\n<arg_key>é</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    ids = LETTERS.encode(f"<|assistant|>{said}<|observation|>")
    assert LETTERS.decode(ids) == said
    assert LETTERS.decode(ids, skip_special_tokens=False) == f"<|assistant|>{said}<|observation|>"
    assert LETTERS.encode("a+5") == list(b"a+5")
