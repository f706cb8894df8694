"""Numbers in texts: the last one, read as far as it goes, and compared by its value.

A number is an optional sign and one of
- digits, grouped by threes or not (1234, 1,234, 1'234, 1_234), with decimals (2.50, .5), an exponent (1e5, 1.5x10^3);
- a simple fraction (3/4, 3 / 4, 3/-4, \\frac{3}{4}, ¾), or a mixed number (2 1/2, 2½).
Digits are those of any script (٣ and fullwidth ３ are 3), minus signs those of Unicode and the words minus and negative
as well. A percent sign and a unit stay outside: "50%", "50 km" and "50 m^2" hold 50. What digits run on into without
being a number (1.2.3, 12:30, 3 : 4, 3/4/5, 10^2, 0x1F, 1,23, 12 345, 0.(3), 1h30, 2024-01-05) is none, and no part of
it is: it holds no 3, no 30, no 5. Nor is what stands under a root, in another fraction of LaTeX, after ±, as the power
of brackets or as a subscript.

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
    | dict.fromkeys("\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u200a\u205f\u3000", " ")
    | dict.fromkeys("\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u2060\u2066\u2067\u2068\u2069\ufeff", "")
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_SMALL = re.compile("([\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+)[\u2044/]([\u2080-\u2089]+)")
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u207a\u207b]+")
_FRAC = re.compile(
    r"((?<=\d)(?:\\[,!;:\s]|\s)*)?\\[dtc]?frac\s*"
    r"(?:\{\s*([+-]?\d+)\s*\}|(\d))\s*(?:\{\s*([+-]?\d+)\s*\}|(\d))"
)
_BRACED_COMMA = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;:\s])(?=\d{3})")
_NO_GROUPING = re.compile(r"\u202f(?!\d{3}(?!\d))")
_PART = re.compile(
    r"(?:[\u221a\u221b\u221c\u00b1\u2213][ ]?-?|[)\]][ ]?\^[ ]?[{(]?-?|[A-Za-z)\]}]_\{?-?"
    r"|\\(?:[dtc]?frac|[dt]?binom|sqrt|pm|mp)(?![a-zA-Z])\s*(?:\[[^\]]*\]\s*)?(?:\{[^{}]*\}\s*)?\{?\s*[^{}=\s]*)$"
)
"""What a number that is only a part of something comes after."""
_MINUS_WORD = re.compile(r"\b(?<!\b[A-Za-z] )(?:minus|negative)[ ]{1,3}(?=[\d.$\\(])", re.IGNORECASE)
"""A sign as a word; after a single letter it is a subtraction."""
_WRAPPED = re.compile(r"(?:\\?[$\u00a3\u20ac\u00a5\u20b9]|\\boxed\{|[({\[*`])+$")
"""What may stand between a minus sign and its number."""
_BEFORE = 80
"""Characters before a number that are looked at."""

_RUN = re.compile(
    r"""
    (?<! [A-Za-z}]\^ ) (?<! [A-Za-z}]\^[{(+-] ) (?<! [A-Za-z}]\^[{(][+-] )    # the power of a unit
    (?<! \d ) (?<! \d\. )                        # nor the rest of one
    (?: \d{1,3} (?:[ ]\d{3})+ (?!\d)              # grouped, or more than one number
      | \d++ (?:-\d++){2,}                        # a date, or the number of a telephone
      | (?: \d[\d,]*[ ]{1,3} (?=\d+/[+-]?\d) )?  # the whole part of a mixed number
        (?: 0[xX][\dA-Fa-f]+ | 0[bB][01]+ | 0[oO][0-7]+ | \.?\d )
    )
    (?: \d
      | [.,:_'^]+ (?=\d)
      | [.,]\( (?=\d)                             # digits that recur
      | \u202f (?=\d{3}(?!\d))
      | \*\* [+-]? (?=\d)
      | [ ]?\^ [ ]? [{(]? [+-]? (?=\d)
      | [ ]?/[ ]? [+-]? (?=\d)
      | [ ]:[ ] (?=\d)
      | [eE][+-]? (?=\d)
      | [ ]? (?:[xX*]|\\times\b|\\cdot\b) [ ]? (?=10[ ]?\^[ ]?[{(]?[+-]?\d)
      | [A-Za-z]{1,9} (?=\d)                      # 1h30
    )*
    """,
    re.VERBOSE,
)
_DIGITS = r"(?:\d{1,3}(?:([,'_\u202f])\d{3})(?:\GROUP\d{3})*|\d+)"
_PARTS = re.compile(
    r"(?:(?P<whole>"
    + _DIGITS.replace("GROUP", "2")
    + r")[ ]{1,3}(?=\d+/\d))?"
    + r"(?P<number>"
    + _DIGITS.replace("GROUP", "4")
    + r"?(?:\.\d+)?)"
    + r"(?:[ ]?/[ ]?(?P<below>[+-]?\d+)|[eE](?P<exponent>[+-]?\d+)"
    + r"|[ ]?(?:[xX*]|\\times|\\cdot)[ ]?10[ ]?\^[ ]?[{(]?(?P<power>[+-]?\d+))?"
)
_SEPARATORS = str.maketrans("", "", ",'_\u202f")


def _plain(text: str) -> str:
    """`text` with the signs, digits and fractions of Unicode and LaTeX as ASCII has them."""
    if "\\" in text or "{,}" in text:
        text = _BRACED_COMMA.sub(",", text.translate(_ASCII))
        text = _FRAC.sub(lambda m: f"{'' if m[1] is None else ' '}{m[2] or m[3]}/{m[4] or m[5]}", text)
    text = _MINUS_WORD.sub("-", text)
    if text.isascii():
        return text
    text = _SMALL.sub(lambda m: _after(m, "/".join(unicodedata.normalize("NFKC", part) for part in m.groups())), text)
    text = _VULGAR.sub(lambda m: _after(m, unicodedata.normalize("NFKC", m[0])), text)
    text = _SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = "".join(
        c if c.isascii() or not c.isdecimal() else str(unicodedata.decimal(c)) for c in text.translate(_ASCII)
    )
    return _NO_GROUPING.sub(" ", text)


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
    before = text[max(0, run.start() - _BEFORE) : run.start()]
    if _PART.search(before):
        return None
    number = run[0].translate(_SEPARATORS)
    return (f"-{number}", -value) if _negative(_WRAPPED.sub("", before)) else (number, value)


def _negative(before: str) -> bool:
    # Whether what comes before a number ends with a minus sign that is neither a subtraction nor a hyphen.
    if not before.endswith("-") or (before[-2:-1].isascii() and before[-2:-1].isalpha()):
        return False
    earlier = before[:-1].rstrip("$ \t\n")[-1:]
    return not (earlier.isdigit() or earlier in tuple(")]}%!"))


def last_number(text: str) -> str | None:
    """The last number in `text`, grouping removed and in ASCII; None if there is none or what comes last is no number.

    A minus sign counts where it cannot be a subtraction or a hyphen: "= -3" ends in "-3", as does "-$3", and "7-3",
    "7 - 3" and "x-3" end in "3".
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
