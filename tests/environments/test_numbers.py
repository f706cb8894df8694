"""Numbers in texts: read as far as they go, compared by value, and never found inside something larger."""

import time
from fractions import Fraction

import pytest

from jaxrl_llm.environments import Score
from jaxrl_llm.environments import last_number
from jaxrl_llm.environments.numbers import is_number
from jaxrl_llm.environments.numbers import number_value
from jaxrl_llm.environments.numbers import same_number

VALUES = {
    "72": 72, "72.0": 72, "+72": 72, "-72": -72, "\u221272": -72, "\uff0d72": -72, "\u201372": -72, "007": 7,
    "1,234": 1234, "1,234,567.5": Fraction(2469135, 2), "1'234": 1234, "1\u2019234": 1234, "1_000": 1000,
    "1\u202f234": 1234, "1\u00a0234": 1234, "12\u2009345": 12345, "1{,}000": 1000, "1\\,000": 1000,
    "1e2": 100, "1E2": 100, "1e+2": 100, "1.5e-1": Fraction(3, 20), "1e\u22122": Fraction(1, 100),
    "1.5x10^3": 1500, "1.5 \u00d7 10^3": 1500, "1.5\u00d710\u00b3": 1500, "2*10^-1": Fraction(1, 5),
    "3/4": Fraction(3, 4), "3 / 4": Fraction(3, 4), "-3/4": Fraction(-3, 4), "6/3": 2, "3\u20444": Fraction(3, 4),
    "2 1/2": Fraction(5, 2), "-2 1/2": Fraction(-5, 2), "1,200 1/2": Fraction(2401, 2),
    "\u00bd": Fraction(1, 2), "2\u00bd": Fraction(5, 2),
    "\\frac{3}{4}": Fraction(3, 4), "2\\frac{3}{4}": Fraction(11, 4), "\\frac34": Fraction(3, 4),
    "\\frac{-3}{4}": Fraction(-3, 4), "2\\,\\frac12": Fraction(5, 2), "2 \\dfrac{1}{2}": Fraction(5, 2),
    "2\u00a01/2": Fraction(5, 2), "2\u2003\u00bd": Fraction(5, 2), "2  1/2": Fraction(5, 2),
    "\u00b2\u2044\u2083": Fraction(2, 3), "1.5 \u00d7 10\u207b\u00b3": Fraction(3, 2000), "2 x 10 ^ 3": 2000,
    "7\u200b2": 72, "-\u200e5": -5, "72\ufeff": 72, "1\\;000": 1000,
    "0.5": Fraction(1, 2), ".5": Fraction(1, 2), "-.5": Fraction(-1, 2),
    "minus 3": -3, "negative 72": -72, "Minus 1/2": Fraction(-1, 2), "3/-4": Fraction(-3, 4), "-3/-4": Fraction(3, 4),
    "3 / \u22124": Fraction(-3, 4), "\\frac{3}{-4}": Fraction(-3, 4),
    "\u0663": 3, "\uff13\uff14": 34, "\u0661\u066b\u0665": Fraction(3, 2), "\u09e7\u09e8": 12,
}  # fmt: skip
NONE = (
    "", "-", "none", "12 13", "1,23", "1,2345", "12,34,567", "1.2.3", "12:30", "3/4/5", "3/0", "1e5e5", "10^2", "10**2",
    "10\u00b2", "0x1F", "1e999999999", "9" * 5000, "3 5/4", "2.5 1/2", "1.5/2", "5%", "5 km", "1,234'567", "IV",
    "12 345", "1 000 000", "1 234.5", "0.(3)", "0b101", "0o17", "2 ^ 3", "10\u207b\u00b3", "\\frac{x}{4}", "\\sqrt{4}",
    "\u221a4", "\u00b13", "(3 + 4)^2", "2024-01-05", "05\u201301\u20132024", "555-12-34", "1h30", "5m20s", "x_{10}",
    "x_10", "\\log_{2}", "3 : 4", "3/-0", "2 1/-2",
)  # fmt: skip


@pytest.mark.parametrize("text", VALUES, ids=ascii)
def test_a_number_has_one_value_however_it_is_written(text):
    assert number_value(text) == VALUES[text]
    assert is_number(f"  {text}\n")
    answer = str(VALUES[text])
    assert Score.exact(f"So the answer is {text}.", answer) == Score(1.0, True, False)
    assert Score.exact(f" {text} ", answer) == Score(1.0, True, True)
    assert Score.exact(answer, text).reward == 1
    assert not Score.exact(f"So the answer is {text}.", str(VALUES[text] + 1)).lenient


@pytest.mark.parametrize("text", NONE, ids=lambda x: ascii(x[:20]))
def test_what_is_no_number_is_none(text):
    assert number_value(text) is None
    assert not is_number(text)
    assert not same_number(text, text)
    assert Score.exact(text, text).strict  # equal texts are equal


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("1e5", "5"), ("1e5", "1"), ("3/4", "4"), ("3/4", "3"), ("2 1/2", "2"), ("2 1/2", "1/2"), ("2 1/2", "0.5"),
        ("2\u00bd", "1/2"), ("\u22123", "3"), ("x = \u22123", "3"), ("1,234", "234"), ("1'234", "234"), ("12.50", "50"),
        ("1.2.3", "3"), ("1.2.3", "2.3"), ("12:30", "30"), ("3/4/5", "5"), ("10^2", "2"), ("10\u00b2", "2"),
        ("10\u00b2", "102"), ("0x1F", "1"), ("1,23", "23"), ("1e-5", "5"), ("1e\u22125", "5"), ("1.5 \u00d7 10^3", "3"),
        ("\\frac{3}{4}", "4"), ("3 / 4", "4"), ("1_000", "0"), ("1\u202f000", "0"), ("-2 1/2", "-1.5"),
        ("\u0661\u0662", "2"), ("1{,}005", "5"), ("1 000", "0"), ("12 345", "345"), ("10\u207b\u00b3", "3"),
        ("\\frac{-3}{4}", "4"), ("\\frac34", "34"), ("\\sqrt{16}", "16"), ("\u221a 16", "16"), ("7\u200b2", "2"),
        ("2\u00a01/2", "1/2"), ("0b101", "101"), ("0.(3)", "3"), ("2 ^ 3", "3"), ("-$72", "72"), ("-\\boxed{72}", "72"),
        ("72 m\u00b2", "2"), ("x^2", "2"), ("3 \u00b1 1", "1"), ("minus 3", "3"), ("negative 72", "72"), ("3/-4", "-4"),
        ("2024-01-05", "05"), ("2024-01-05", "5"), ("1h30", "30"), ("x_{10}", "10"), ("x_{10}", "0"), ("3 : 4", "4"),
        ("2 1/-2", "-1/2"), ("\\frac{3}{-4}", "4"),
    ],
    ids=ascii,
)  # fmt: skip
def test_no_number_is_found_inside_a_larger_one(text, part):
    for whole in (text, f"The answer is {text}", f"It is {text}."):
        assert Score.exact(whole, part) == Score(0.0, False, False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7\u22123", "3"), ("7 \u2212 3", "3"), ("5 - -3", "-3"), ("= +3", "3"), ("50%", "50"), ("50% - 3", "3"),
        ("12cm", "12"), ("$1,250.75.", "1250.75"), ("\\boxed{72}", "72"), ("12 / 4 = 3", "3"), ("2*3=6", "6"),
        ("on 1/2 of 3 days", "3"), ("see 1.2.3", None), ("3, 4,5", None), ("[1] -3", "3"), ("- 3 apples", "3"),
        ("pages 3\u20135", "5"), ("1. 42", "42"), ("42.", "42"), ("42...", "42"), ("42e", "42"), ("2 eggs", "2"),
        ("3 1/2 cups", "3 1/2"), ("10 x 10", "10"),
        ("72 cm^2", "72"), ("72 m\u00b2.", "72"), ("72\\text{ cm}^2", "72"), ("9.8 m s\u207b\u00b9", "9.8"),
        ("-$72", "-72"), ("\u2212\u20ac72", "-72"), ("-\\boxed{72}", "-72"), ("7-$3", "3"), ("$5$-$3$", "3"),
        ("-(72)", "-72"),
        ("x-3", "3"), ("COVID-19", "19"), ("it is -3", "-3"), ("\u662f-3", "-3"), ("\\sqrt{16} = 4", "4"),
        ("7 minus 3", "3"), ("x minus 3", "3"), ("it is minus 3", "-3"), ("minus $3", "-3"), ("Step 1: 4", "4"),
        ("x_{10} = 4", "4"), ("_42_", "42"), ("the ratio: 4", "4"), ("on 2024-01-05 it was 7", "7"), ("3-5", "5"),
        ("72 m^10", "72"), ("in 1h30 he ran 12 km", "12"), ("3/-4", "3/-4"),
        ("\\frac{x}{2}. So 5", "5"), ("in 2024 100", "100"), ("3\u00a0apples", "3"),
    ],
    ids=ascii,
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_an_answer_takes_microseconds_however_long_its_digits_are():
    texts = [
        "Let me see: 12 + 30 = 42, so the answer is 42.",
        "9" * 20_000,
        "1," * 10_000,
        "1/" * 10_000,
        "1 " * 10_000,
        "100 " * 10_000,
        "\\frac{" * 10_000 + "1",
        "1\\," * 10_000,
        "1" + " " * 40_000 + "x",
        "-" + "(" * 20_000 + "1",
        "1-" * 10_000,
        "1a" * 10_000,
        "minus " * 10_000,
        "1 : " * 10_000,
    ]
    start = time.process_time()
    for _ in range(200):
        Score.exact(texts[0], "42")
    assert (time.process_time() - start) / 200 < 1e-3  # about 10 microseconds where nothing else runs
    start = time.process_time()
    for text in texts[1:]:
        Score.exact(text, "42")
    assert time.process_time() - start < 2  # linear in the text
