"""Numbers in texts: the last one, read as far as it goes, and compared by its value.

A number is an optional sign and one of
- digits, grouped by threes or not (1234, 1,234, 1'234, 1_234), with decimals (2.50, .5), an exponent (1e5, 1.5x10^3);
- a simple fraction (3/4, 3 / 4, \\frac{3}{4}, ¾), or a mixed number (2 1/2, 2½).
Digits are those of any script (٣ and fullwidth ３ are 3), minus signs those of Unicode as well. A percent sign and a
unit stay outside: "50%" and "50 km" hold 50. What digits run on into without being a number (1.2.3, 12:30, 3/4/5, 10^2,
0x1F, 1,23) is none, and no part of it is: it holds no 3, no 30, no 5.

This serves arithmetic answers at microseconds each. Mathematics (roots, intervals, sets, algebra) needs a parser of
mathematics: use a library made for it, such as math-verify, in the `score` of a task of your own.
"""

import re
import unicodedata
from fractions import Fraction

LONGEST = 400
"""Characters of the longest expression, and the largest exponent, that is read as a number."""

_MINUS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
_ASCII = str.maketrans(
    dict.fromkeys(_MINUS, "-")
    | {"\uff0b": "+", "\uff0e": ".", "\u066b": ".", "\uff0c": ",", "\u066c": ",", "\uff0f": "/", "\u2044": "/"}
    | {"\u2019": "'", "\u00d7": "x", "\u22c5": "x", "\u00b7": "x", "\uff1a": ":", "\uff05": "%"}
    | {"\u2009": "\u202f", "\u00a0": "\u202f"}
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070-\u2079]+")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_BRACED_COMMA = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})")

_RUN = re.compile(
    r"""
    (?: \d[\d,]*[ ] (?=\d+/\d) )?               # the whole part of a mixed number
    (?: 0[xX][\dA-Fa-f]+ | \.?\d )
    (?: \d
      | [.,:_'^]+ (?=\d)
      | \u202f (?=\d{3}(?!\d))
      | \*\* [+-]? (?=\d)
      | \^ [{(]? [+-]? (?=\d)
      | [ ]?/[ ]? (?=\d)
      | [eE][+-]? (?=\d)
      | [ ]? (?:[xX*]|\\times\b|\\cdot\b) [ ]? (?=10\^[{(]?[+-]?\d)
    )*
    """,
    re.VERBOSE,
)
_DIGITS = r"(?:\d{1,3}(?:([,'_\u202f])\d{3})(?:\GROUP\d{3})*|\d+)"
_PARTS = re.compile(
    r"(?:(?P<whole>"
    + _DIGITS.replace("GROUP", "2")
    + r")[ ](?=\d+/))?"
    + r"(?P<number>"
    + _DIGITS.replace("GROUP", "4")
    + r"?(?:\.\d+)?)"
    + r"(?:[ ]?/[ ]?(?P<below>\d+)|[eE](?P<exponent>[+-]?\d+)"
    + r"|[ ]?(?:[xX*]|\\times|\\cdot)[ ]?10\^[{(]?(?P<power>[+-]?\d+))?"
)
_SEPARATORS = str.maketrans("", "", ",'_\u202f")


def _plain(text: str) -> str:
    """`text` with the signs, digits and fractions of Unicode and LaTeX as ASCII has them."""
    if "\\" in text or "{,}" in text:
        text = _BRACED_COMMA.sub(",", text)
        text = _FRAC.sub(lambda m: _after(m, f"{m[1]}/{m[2]}"), text)
    if text.isascii():
        return text
    text = _VULGAR.sub(lambda m: _after(m, unicodedata.normalize("NFKC", m[0])), text)
    text = _SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    return "".join(
        c if c.isascii() or not c.isdecimal() else str(unicodedata.decimal(c)) for c in text.translate(_ASCII)
    )


def _after(match: re.Match[str], fraction: str) -> str:
    # A fraction written right after digits is the rest of a mixed number.
    before = match.string[: match.start()]
    return f" {fraction}" if before[-1:].isdecimal() else fraction


def _value(run: str) -> Fraction | None:
    """What an unsigned expression is worth; None if it is no number."""
    parts = _PARTS.fullmatch(run)
    if len(run) > LONGEST or parts is None or not parts["number"]:
        return None
    whole, number, below = parts["whole"], parts["number"], parts["below"]
    if below is not None and ("." in number or not int(below)):
        return None
    exponent = int(parts["exponent"] or parts["power"] or 0)
    if abs(exponent) > LONGEST:
        return None
    value = Fraction(number.translate(_SEPARATORS)) / int(below or 1)
    if whole is not None:
        if below is None or value >= 1:
            return None
        value += int(whole.translate(_SEPARATORS))
    return value * Fraction(10) ** exponent


def _last(text: str) -> tuple[str, Fraction] | None:
    # The last maximal expression of plain text, as ASCII without grouping, and its value; None if it is no number.
    run = None
    for run in _RUN.finditer(text):  # noqa: B007 the last one is wanted
        pass
    value = None if run is None else _value(run[0])
    if run is None or value is None:
        return None
    number, before = run[0].translate(_SEPARATORS), text[: run.start()]
    if before.endswith("-"):
        earlier = before[:-1].rstrip()[-1:]
        if not (earlier.isdigit() or earlier in tuple(")]}%")):
            return f"-{number}", -value
    return number, value


def last_number(text: str) -> str | None:
    """The last number in `text`, grouping removed and in ASCII; None if there is none or what comes last is no number.

    A minus sign counts where it cannot be a subtraction: "= -3" ends in "-3", "7-3" and "7 - 3" in "3".
    """
    found = _last(_plain(text))
    return None if found is None else found[0]


def number_value(text: str) -> Fraction | None:
    """The exact value of `text` if it is one number and nothing else but white space around it, else None."""
    plain = _plain(text).strip()
    sign = plain[:1] if plain[:1] in ("-", "+") else ""
    run = _RUN.fullmatch(plain[len(sign) :])
    value = None if run is None else _value(run[0])
    return value if value is None or sign != "-" else -value


def is_number(text: str) -> bool:
    """Whether `text` is one number and nothing else but white space around it."""
    return number_value(text) is not None


def same_number(text: str, other: str) -> bool:
    """Whether both are one number each, of equal value: 72.0 is 72, 1e2 is 100, 2 1/2 is 2.5."""
    value = number_value(text)
    return value is not None and value == number_value(other)
