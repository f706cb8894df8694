"""Chats by the checkpoint's own template, and by the formats that are data here."""

import json
import time
from pathlib import Path

import pytest

from jaxrl_llm.models import chat
from jaxrl_llm.models.chat import chat_ids
from jaxrl_llm.models.chat import checkpoint_chat
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.chat_template import render_chat
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.gguf_header import read_header
from jaxrl_llm.models.pretrained import smollm2_path
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer

CHATS = json.loads((Path(__file__).parents[1] / "golden/chats_transformers.json").read_text())["chats"]
USER = [{"role": "user", "content": " 2 + 2? "}]

QWEN2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n'"
    " ~ message['content'] | trim ~ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token ~ content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def with_template(template: str | None) -> Tokenizer:
    plain = ByteTokenizer()
    return Tokenizer(plain.backend, eos_id=258, bos_id=257, pad_id=256, chat_template=template)


@pytest.mark.parametrize("case", CHATS)
def test_smollm2s_own_template_gives_what_transformers_gives_and_what_the_format_gives(case: dict) -> None:
    template = read_header(smollm2_path()).entries["tokenizer.chat_template"]
    for add, name in ((True, "prompt"), (False, "transcript")):
        found = render_chat(template, case["messages"], add_generation_prompt=add)
        assert found == case[name] == format_chat(case["messages"], add_generation_prompt=add)


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize(("template", "form"), [(QWEN2_5, chat.QWEN2_5), (LLAMA3, chat.LLAMA3)])
def test_formats_are_the_templates_they_stand_for(case: dict, template: str, form: chat.ChatFormat) -> None:
    found = render_chat(template, case["messages"], special_tokens={"bos_token": "<s>"})
    assert found.removeprefix("<s>") == format_chat(case["messages"], chat_format=form)


def test_chatml_by_itself_is_not_qwens() -> None:
    assert render_chat(QWEN2_5, USER) != format_chat(USER, chat_format=chat.CHATML)
    assert chat.CHATML.default_system is None


def test_the_checkpoints_template_counts_and_its_start_token_stands_once() -> None:
    tokenizer = with_template("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert checkpoint_chat(USER, tokenizer) == "<|bos|>[user]  2 + 2? "
    ids = chat_ids(USER, tokenizer)
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids[1:]) == "[user]  2 + 2? "
    assert checkpoint_chat(USER, with_template(None)) == format_chat(USER)


def test_a_template_is_found_in_its_own_file_and_among_several(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    for given, expected in (("one", "one"), (several, "several"), (None, None), (several[:1], None)):
        path.write_text(json.dumps({**settings, "chat_template": given}))
        assert Tokenizer.from_folder(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "own file"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ {'ü': '<a>'} | tojson }}", '{"ü": "<a>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}", "user"),
        ("{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}", "TrueTrue1"),
        ("{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", "4"),
        ("{{ 'a,b'.split(',') | join('-') }}{{ '-'.join(['c', 'd']) }}{{ 'x' ~ 1 }}", "a-bc-dx1"),
        ("{{ 'aab' | replace('a', 'c') }}{{ 'aab'.replace('a', 'd', 1) }}", "ccbdab"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 7 % 4 }}{{ messages[1:] }}", "a13[]"),
        ("{{ strftime_now('%Y') | length }}{{ tools is none }}{{ unknown is defined }}", "4TrueFalse"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
    ],
)
def test_what_templates_are_written_for(template: str, expected: str) -> None:
    assert render_chat(template, USER) == expected


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate") as caught:
        render_chat("{{ raise_exception('roles must alternate') }}", USER)
    assert not isinstance(caught.value, ModelFileError)


DOUBLING = "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = CHANGE %}{% endfor %}{{ n.x | length }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * ['a'] }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 9 ** 999999999 }}",
        DOUBLING.replace("CHANGE", "n.x ~ n.x"),
        DOUBLING.replace("CHANGE", "n.x + n.x"),
        DOUBLING.replace("CHANGE", "[n.x, n.x] | join"),
        DOUBLING.replace("CHANGE", "''.join([n.x, n.x])"),
        DOUBLING.replace("CHANGE", "n.x.replace('a', 'aa')"),
        DOUBLING.replace("CHANGE", "n.x | replace('a', 'aa')"),
        DOUBLING.replace("aa", "2").replace("'2'", "2").replace("CHANGE", "n.x * n.x"),
        "{% set x = 'aaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x | length }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = 'abcdefghijklmnopqrstuvwxyz' %}" + "{% for x in s %}" * 9 + "{% endfor %}" * 9,
        "{% for a in range(49000) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ 'a' | indent(999999999, true) }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{{ lipsum(999999) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{% include 'x' %}",
        "{% if %}",
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{{ messages[7].content.x }}",
        "x" * 300_000,
        DOUBLING.replace("'aa'", "[1]").replace("CHANGE", "[n.x, n.x]").replace("| length", "| tojson"),
        DOUBLING.replace("'aa'", "[1]").replace("CHANGE", "(n.x, n.x)").replace("| length", "| string"),
        DOUBLING.replace("'aa'", "[1]").replace("CHANGE", "{'a': n.x, 'b': n.x}").replace(" | length", " == n.x"),
        DOUBLING.replace("'aa'", "[1]").replace("CHANGE", "dict(a=n.x, b=n.x)").replace("| length", ""),
        DOUBLING.replace("'aa'", "[1]").replace("CHANGE", "[n.x] * 2").replace("| length", ""),
        "{{ ([[0] * 60000] * 9999) | sum(start=[]) | length }}",
        "{{ ['a' * 1000000] | map('upper') | list * 999 }}",
        "{% for a in range(40000) %}{% set x = 'b' in 'a' * 1000000 %}{% endfor %}" * 3,
        "{{ ('a'.encode() * 999999999) | length }}",
        "{{ 'a'.encode().ljust(999999999) | length }}",
        "{{ (1).to_bytes(999999999, 'big') | length }}",
        "{{ 1 / 0 }}",
        "\ud800",
        "{{ '\\ud800' }}",
    ],
)
def test_templates_that_leave_their_bounds(template: str) -> None:
    start = time.process_time()
    with pytest.raises(ModelFileError, match="the chat template"):
        render_chat(template, USER)
    assert time.process_time() - start < 5
