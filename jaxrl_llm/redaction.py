"""Secrets taken out of what is printed, raised or written: the one place that knows what a secret looks like."""

import base64
import re
import urllib.parse
from collections.abc import Iterable
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

HIDDEN = "***"
"""What stands where a secret was."""
LONGEST_QUOTE = 300
"""Characters of another program's text that a sentence quotes."""
SHORTEST_SUBSTRING = 4
"""A given secret of fewer characters is looked for as a whole word only."""

_NAME = (
    r"(?:[\w.-]*(?:api[_-]?key|apikey|access[_-]?key|secret|passw(?:or)?d|passwd|passphrase|credential|auth[_-]?token|"
    r"access[_-]?token|bearer[_-]?token|private[_-]?key)s?[\w.-]*|(?:[\w.-]*[_-])?(?:token|key|pw|pwd|auth)|authorization|"
    r"proxy-authorization|cookie|set-cookie)"
)
"""A word after which a secret stands: api_key, OPENAI_API_KEY, hf-token, password, Authorization."""
_VALUE = r"(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s,;&\"'}\])]+)"

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ in an address; a password may hold an @, a quote or a slash itself. The bounds keep the search
    # linear.
    (re.compile(r"(?<=://)[^\s/]{0,4000}@"), f"{HIDDEN}@"),
    (re.compile(r"(?<=://)[^\s\"'<>/:@]{0,200}:[^\s\"'<>]{0,4000}@"), f"{HIDDEN}@"),
    (re.compile(r"(?i:\b(bearer))\s+(?!\*\*\*)[\w.~+/=:-]{4,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(Basic|Digest)\s+[\w.~+/=:-]{8,}"), rf"\1 {HIDDEN}"),
    # Keys that say whose they are.
    (
        re.compile(
            r"\b(?:(?:sk|pk|rk|xai|glpat|xox[abposr]|nvapi|pplx)-|(?:sk|pk|rk|hf|gsk|gh[pousr]|github_pat|r8|tgp_v1)_|"
            r"AKIA|ASIA|AIza|eyJ)[A-Za-z0-9*][\w.*-]{5,}"
        ),
        HIDDEN,
    ),
)
_OPTION = re.compile(rf"(?i)(?<![\w-])(-{{1,2}}{_NAME}(?:=|\s+))(?!-{{1,2}}\w)({_VALUE})")
_FIELD = re.compile(rf"(?i)(?<![\w-])([\"']?{_NAME}[\"']?\s*[=:]\s*)(?![\"']?\*\*\*|Bearer|Basic|Digest)({_VALUE})")


def _hide_value(found: re.Match[str]) -> str:
    """Name and separator stay, and so do the quotes of the value."""
    quote = found.group(2)[0] if found.group(2)[0] in "\"'" else ""
    return f"{found.group(1)}{quote}{HIDDEN}{quote}"


def _letter(letter: str) -> str:
    """A pattern of the ways in which one letter may come back: as it is, escaped for JSON, an address or HTML."""
    ways = [rf"\\{{0,8}}{re.escape(letter)}", rf"&#0*{ord(letter)};", rf"&#[xX]0*(?i:{ord(letter):x});"]
    ways.append("".join(f"%(?:25)*(?i:{byte:02x})" for byte in letter.encode(errors="surrogatepass")))
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    ways.append("".join(rf"\\{{1,8}}u(?i:{units[place : place + 4]})" for place in range(0, len(units), 4)))
    if ord(letter) < 256:
        ways.append(rf"\\{{1,8}}x(?i:{ord(letter):02x})")
    ways += [re.escape(name) for name in _NAMED.get(letter, ())]
    return f"(?:{'|'.join([*ways, *([r'[+]'] if letter == ' ' else [])])})"


_NAMED = {"&": ("&amp;",), "<": ("&lt;",), ">": ("&gt;",), '"': ("&quot;",), "'": ("&apos;",)}
"""Letters with a name in HTML."""


def _encodings(secret: str) -> set[str]:
    """A secret in hexadecimal and in base64, there alone or as a part of more, which begins at any of three places."""
    content = secret.encode(errors="surrogatepass")
    found = {content.hex(), content.hex().upper()}
    for before, start in ((0, 0), (1, 2), (2, 3)):
        letters = base64.b64encode(bytes(before) + content).decode()[start : (before + len(content)) * 8 // 6]
        found |= {letters, letters.translate(str.maketrans("+/", "-_"))}
    return {form for form in found if len(form) >= SHORTEST_SUBSTRING}


@lru_cache(maxsize=64)
def _forms(secret: str) -> re.Pattern[str]:
    """How a secret may come back: as it is, escaped letter by letter, in base64 or hexadecimal."""
    spelled = {"".join(map(_letter, text)) for text in (secret, urllib.parse.unquote(secret))}
    if len(secret) < SHORTEST_SUBSTRING:
        spelled = {rf"(?<!\w){form}(?!\w)" for form in spelled}
    encoded = sorted(map(re.escape, _encodings(secret)), key=len, reverse=True)
    return re.compile("|".join([*sorted(spelled), *encoded]))


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without secrets: `***` stands in their places.

    Two kinds are taken out: the given ones, in every form in which they may come back (escaped for JSON, an address or
    HTML, in base64 or hexadecimal), and whatever looks like one: user and password in an address, what follows Bearer,
    keys with a known beginning (sk-, hf_, ghp_, ...), and the values of options, variables, query and JSON fields named
    key, token, password and the like.

    Args:
        text: any text.
        secrets: those that are known; empty ones do nothing.

    Returns:
        the text; it is unchanged where there is nothing to hide, and a second call changes nothing more.
    """
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = _forms(secret).sub(HIDDEN, text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _FIELD.sub(_hide_value, _OPTION.sub(_hide_value, text))


def redact_command(words: Sequence[str], secrets: Iterable[str] = ()) -> str:
    """The words of a command line as one line, without secrets: also those after `--key`, whatever they look like.

    Args:
        words: as in sys.argv; a word may hold spaces.
        secrets: see `redact`.
    """
    shown, hide = [], False
    for word in words:
        option = re.fullmatch(rf"(?i)(-{{1,2}}{_NAME})(=.*)?", word, re.DOTALL)
        if option is not None:
            shown.append(option.group(1) + (f"={HIDDEN}" if option.group(2) else ""))
            hide = not option.group(2)
        elif hide and not word.startswith("--"):
            shown.append(HIDDEN)
            hide = False
        else:
            shown.append(redact(word, secrets))
            hide = False
    return redact(" ".join(shown), secrets)


def quoted(text: str | bytes, secrets: Iterable[str] = ()) -> str:
    """Another program's text as a sentence may quote it: redacted, on one line, without control characters, short."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    text = redact(text, secrets)  # before it is cut, so that no beginning of a secret is left
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def redact_setting(name: str, value: Any) -> Any:
    """The value of a named setting as it may be written down: hidden where the name says so, else redacted.

    Args:
        name: of the setting, a field or an option without its dashes.
        value: anything; only texts and lists of texts are changed.
    """
    if isinstance(value, list):
        return [redact_setting(name, item) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and re.fullmatch(rf"(?i){_NAME}", name) else redact(value)
