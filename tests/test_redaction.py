"""Secrets in sentences, command lines and settings: what is hidden, and what is left alone."""

import base64
import dataclasses
import html
import json
import time
import types
import urllib.parse

import pytest

from experiments import cli
from experiments.report import _frame
from experiments.run import _write_down
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.settings import flat_settings
from jaxrl_llm.redaction import HIDDEN
from jaxrl_llm.redaction import LONGEST_QUOTE
from jaxrl_llm.redaction import quoted
from jaxrl_llm.redaction import redact
from jaxrl_llm.redaction import redact_command
from jaxrl_llm.redaction import redact_setting

SECRET = 'hunter2/"pass"+word\''


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:80/v1", "http://***@host:80/v1"),
        ("see https://me:hun/ter@2@host/v1 now", "see https://***@host/v1 now"),
        ("https://token@host/v1", "https://***@host/v1"),
        ("https://me@work:hun@ter2@host/v1", "https://***@host/v1"),
        ("https://me:hun'te\"r<2@host/v1", "https://***@host/v1"),
        (f"https://me:{'hunter2' * 100}@host/v1", "https://***@host/v1"),
        ("http://host/v1?api_key=hunter2&x=1", "http://host/v1?api_key=***&x=1"),
        ("Authorization: Bearer hunter2hunter2", "Authorization: Bearer ***"),
        ("bearer hunter2", "bearer ***"),
        ("Authorization: Basic aHVudGVyMg==", "Authorization: Basic ***"),
        ("{'x-api-key': 'hunter2', 'a': 1}", "{'x-api-key': '***', 'a': 1}"),
        ('{"api_key": "hun\\"ter2", "a": 1}', '{"api_key": "***", "a": 1}'),
        ("Incorrect API key provided: sk-proj-hunter2abc.", "Incorrect API key provided: ***"),
        ("hf_abcdefghijkl and ghp_ABCDEFGHIJ and AKIAIOSFODNN7EXAMPLE", "*** and *** and ***"),
        ("OPENAI_API_KEY=hunter2 python", "OPENAI_API_KEY=*** python"),
        ("run --key hunter2 --steps 3", "run --key *** --steps 3"),
        ("run --api-key=hunter2 --hf-token 'hunter 2'", "run --api-key=*** --hf-token '***'"),
        ("password: hunter2", "password: ***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://host:80/v1/completions",
        "http://host/a@b",
        "mail me@example.org",
        "max_tokens=3, tokens: [1, 2], token_id:7, eos_ids (9,)",
        "the basic token statistics of skipped keys, a bearer of bad news, hidden risk-free steps, sk-learn",
        "--tokenizer smollm2 --steps 3",
        "log-prob 1 of 3 is nan, no finite number",
    ],
)
def test_what_does_not_is_left_alone(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "form",
    [
        lambda text: text,
        json.dumps,
        repr,
        lambda text: urllib.parse.quote(text, safe=""),
        urllib.parse.quote,
        urllib.parse.quote_plus,
        lambda text: base64.b64encode(text.encode()).decode(),
        lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
        lambda text: text.encode().hex(),
        lambda text: json.dumps(json.dumps(text)),
        lambda text: text.replace("/", "\\/"),
        lambda text: "".join(f"\\u{ord(letter):04x}" for letter in text),
        lambda text: urllib.parse.quote(text, safe="").replace("%2F", "%2f"),
        lambda text: urllib.parse.quote(urllib.parse.quote(text, safe=""), safe=""),
        html.escape,
        lambda text: "".join(f"&#{ord(letter)};" for letter in text),
    ],
)
def test_a_known_secret_is_hidden_in_every_form(form):
    shown = redact(f"It said: {form(SECRET)}.", [SECRET, ""])
    assert HIDDEN in shown
    assert form(SECRET)[3:9] not in shown


@pytest.mark.parametrize("before", ["m", "m:", "Bearer ", "abc "])
def test_a_known_secret_is_hidden_inside_of_base64(before):
    whole = base64.b64encode(f"{before}{SECRET} and more".encode()).decode()
    shown = redact(whole, [SECRET])
    assert HIDDEN in shown
    assert not any(whole[place : place + 4] in shown for place in range(12, 26))


def test_short_secrets_are_hidden_as_words():
    assert redact("user a, abc cab", ["a"]) == "user ***, abc cab"


def test_quotes_are_short_plain_and_cut_after_they_are_redacted():
    text = quoted("\x1b[31m" + "x" * (LONGEST_QUOTE - 10) + SECRET + "\n\0more", [SECRET])
    assert len(text) <= LONGEST_QUOTE + 3
    assert text.isprintable()
    assert "hunter" not in text
    assert quoted(b"\xff\xfe ok") == "\ufffd\ufffd ok"


def test_redaction_is_linear():
    start = time.process_time()
    for text in ("://", "a", "-", "key_", "'", "sk-", "@", "Bearer ", "key ", "token:", "http://a@", '"key": "', "\\"):
        redact(text * 20_000)
    assert time.process_time() - start < 10


def test_command_lines():
    words = [
        "python",
        "-m",
        "experiments",
        "run",
        "x",
        "--key",
        "my secret",
        "--url",
        "http://u:p@h/v1",
        "--steps",
        "3",
    ]
    assert redact_command(words) == "python -m experiments run x --key *** --url http://***@h/v1 --steps 3"
    assert redact_command(["run", "--api-key=hunter 2", "--password", "-abc", "--tiny"]) == (
        "run --api-key=*** --password *** --tiny"
    )
    assert redact_command(["run", "--key", "--tiny"]) == "run --key --tiny"


def test_settings():
    assert redact_setting("api_key", "hunter2") == HIDDEN
    assert redact_setting("url", "http://me:hunter2@host/v1") == "http://***@host/v1"
    assert redact_setting("urls", ["http://me:hunter2@host/v1", "x"]) == ["http://***@host/v1", "x"]
    for name, value in (("steps", 3), ("model", "smollm2_135m"), ("api_key", None), ("api_key", ""), ("max_tokens", 3)):
        assert redact_setting(name, value) == value


def test_a_run_writes_no_secret_down(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        url: str = "http://me:hunter2@host/v1"
        api_key: str = "hunter2"
        steps: int = 3

    run = RunFolder(tmp_path)
    config = {"settings": flat_settings(Settings())}
    assert config["settings"] == {"url": "http://***@host/v1", "api_key": "***", "steps": 3}
    for _ in range(2):  # a run that goes on lists each later start
        _write_down(run, config, ["python", "-m", "experiments", "run", "x", "--url", Settings.url, "--key", "hunter2"])
    for path in tmp_path.iterdir():
        assert "hunter2" not in path.read_text(), path
    assert json.loads(run.environment.read_text())["command"].endswith("run x --url http://***@host/v1 --key ***")


def test_the_command_line_says_no_secret(monkeypatch, capsys):
    def fails(words):
        raise UserError("The server http://me:hunter2@host/v1 refused Bearer hunter2.")

    monkeypatch.setattr(cli, "_dispatch", fails)
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == "error: The server http://***@host/v1 refused Bearer ***\n"
    monkeypatch.undo()
    assert cli.main(["run", "linear_bandit", "--tiny", "--api-key", "hunter2"]) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_reports_of_older_runs_show_no_secret():
    starts = [{"command": "run x --key hunter2 --url http://me:hunter2@host"}]
    environment = {"command": "run x --url http://me:hunter2@host", "continued": starts, "packages": {"jax": "0.11"}}
    record = types.SimpleNamespace(settings={"api_key": "hunter2", "steps": 3}, environment=environment)
    frame = _frame(record)  # pyright: ignore[reportArgumentType]
    assert "hunter2" not in str(frame)
    assert ("steps", "3") in frame["settings"]
    assert ("jax", "0.11") in frame["environment"]
