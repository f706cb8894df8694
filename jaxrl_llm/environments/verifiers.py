"""Which verifiers of reasoning-gym may see what a model wrote.

A verifier gets a text that a model produced, in the process that trains it. Many of the library pass that text to
`eval` or to sympy's parser, which is `eval` too: the model could run what it likes. So there is an allowlist. Every
`score_answer` of version 0.1.25 was read; a dataset is scored if its own only compares texts and numbers (`COMPARING`),
if it does so once the answer has a form of bounded cost (`GUARDED`), or if the comparison is short enough to be made
here instead (`OWN`). Everything else, and every dataset that is not known here, is refused by name. Nothing is run in a
subprocess: without user namespaces or the like one that touches no file cannot be had everywhere.
"""

import importlib.metadata
import json
import re
from collections.abc import Callable
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

Entry = Mapping[str, Any]
"""What a generator of reasoning-gym returns: question, answer, metadata."""
Verifier = Callable[[str, Entry], float]
"""(answer, entry) -> 1 where it is right, less elsewhere."""

READ_VERSION = "0.1.25"
"""The version of reasoning-gym whose verifiers were read."""
LONGEST_ANSWER = 10_000
"""Characters of an answer that is scored; one that is longer, and four times longer than the right one, is wrong."""

COMPARING = frozenset(
    {
        "ab",
        "acre",
        "advanced_geometry",
        "aiw",
        "arc_1d",
        "arc_agi",
        "base_conversion",
        "basic_arithmetic",
        "bf",
        "binary_alternation",
        "boxnet",
        "caesar_cipher",
        "calendar_arithmetic",
        "chain_sum",
        "circuit_logic",
        "color_cube_rotation",
        "count_bits",
        "count_primes",
        "course_schedule",
        "cryptarithm",
        "decimal_arithmetic",
        "decimal_chain_sum",
        "dice",
        "emoji_mystery",
        "family_relationships",
        "figlet_font",
        "fraction_simplification",
        "futoshiki",
        "game_of_life",
        "gcd",
        "graph_color",
        "group_anagrams",
        "gsm_symbolic",
        "isomorphic_strings",
        "jugs",
        "kakurasu",
        "knight_swap",
        "knights_knaves",
        "largest_island",
        "lcm",
        "leg_counting",
        "letter_counting",
        "letter_jumble",
        "list_functions",
        "mahjong_puzzle",
        "manipulate_matrix",
        "maze",
        "mini_sudoku",
        "modulo_grid",
        "needle_haystack",
        "number_filtering",
        "number_format",
        "number_sequence",
        "palindrome_generation",
        "palindrome_partitioning",
        "path_star",
        "polynomial_equations",
        "pool_matrix",
        "power_function",
        "prime_factorization",
        "products",
        "quantum_lock",
        "ransom_note",
        "rearc",
        "rectangle_count",
        "rotate_matrix",
        "rotten_oranges",
        "self_reference",
        "sentence_reordering",
        "shortest_path",
        "simple_equations",
        "simple_geometry",
        "sokoban",
        "spell_backward",
        "string_manipulation",
        "string_splitting",
        "string_synthesis",
        "sudoku",
        "survo",
        "syllogism",
        "time_intervals",
        "tower_of_hanoi",
        "tsumego",
        "word_ladder",
        "word_sequence_reversal",
        "word_sorting",
        "zebra_puzzles",
    }
)
"""Datasets whose score_answer compares texts or numbers, in time and memory of the order of the answer's length."""

REFUSED = {
    "codeio": "its generator executes programs that a language model wrote",
    "composite": "it hands the answer to the verifiers of other datasets; make one task for each of them",
    "countdown": "its verifier evaluates the answer as Python, by sympy's parser",
    "intermediate_integration": "its verifier evaluates the answer as Python, by sympy's parser",
    "polynomial_multiplication": "its verifier evaluates the answer as Python, by sympy's parser",
    "puzzle24": "its verifier evaluates the answer as Python, by sympy's parser",
    "simple_integration": "its verifier evaluates the answer as Python, by sympy's parser",
}
"""Datasets that are known and not scored, and why."""


CONNECTIVES = "\u2227\u2228\u00ac\u2192\u2194()"
"""And, or, not, implies, if and only if, of propositional_logic."""


class UnsafeVerifierError(ValueError):
    """A dataset whose verifier must not see what a model wrote."""


def _few_digits(answer: str, entry: Entry) -> bool:
    """Its moves have counts, of one digit, and are carried out one by one."""
    return re.search(r"\d\d", answer) is None


def _plain_fraction(answer: str, entry: Entry) -> bool:
    """With an exponent, `Fraction` would write all of the digits out."""
    return re.fullmatch(r"\s*[-+]?[\d,]*\.?\d*(?:/\d+)?\s*", answer) is not None


def _plain_complex(answer: str, entry: Entry) -> bool:
    """The distance to "nan" is none, which the verifier calls right."""
    return re.fullmatch(r"[-+\d.eEijIJ()\s]*", answer) is not None


def _known_atoms(answer: str, entry: Entry) -> bool:
    """Every further name would double the truth table."""
    atoms = {atom.strip() for atom in re.split(f"[{CONNECTIVES}]", answer)} - {""}
    return atoms <= set(entry["metadata"]["variables"])


GUARDED: Mapping[str, Callable[[str, Entry], bool]] = {
    "complex_arithmetic": _plain_complex,
    "propositional_logic": _known_atoms,
    "rubiks_cube": _few_digits,
    "rush_hour": _few_digits,
}
"""Datasets whose score_answer is harmless for answers of a certain form; all others are wrong."""


def _same_text(answer: str, entry: Entry) -> float:
    return float(answer.strip() == entry["answer"].strip())


def _listed(answer: str, entry: Entry) -> float:
    return float(answer in entry["metadata"]["valid_answers"])


def _same_integer(answer: str, entry: Entry) -> float:
    return float(int(answer, 0) == int(entry["answer"], 0))


def _same_order(answer: str, entry: Entry) -> float:
    """A JSON list in the asked direction, each number within 1 of the right one, as in the library."""
    given, wanted = (json.loads(text.replace("'", '"')) for text in (answer, entry["answer"]))
    if not isinstance(given, list) or len(given) != len(wanted):
        return 0.0
    numbers = [float(number) for number in given]
    falling = entry["metadata"]["direction"] == "descending"
    close = all(abs(number - float(right)) <= 1 for number, right in zip(numbers, wanted, strict=True))
    return float(close and numbers == sorted(numbers, reverse=falling))


def _same_fraction(answer: str, entry: Entry) -> float:
    """Up to 1e-4, as in the library, which calls "0" right too: it counts the letters that two numbers begin with."""
    given, right = (float(Fraction(text.replace(",", ""))) for text in (answer, entry["answer"]))
    return float(abs(given - right) <= 1e-4)


OWN: Mapping[str, Verifier] = {
    "binary_matrix": _same_text,
    "bitwise_arithmetic": _same_integer,
    "coin_flip": lambda answer, entry: _same_fraction(answer, entry) if _plain_fraction(answer, entry) else 0.0,
    "game_of_life_halting": _same_text,  # the library's calls every text right
    "n_queens": _listed,
    "number_sorting": _same_order,
    "spiral_matrix": _same_text,
    "string_insertion": _same_text,
}
"""Comparisons made here, of datasets whose score_answer has an `eval` or calls wrong answers right. What it gave to a
Python list of the right answer, a reward below 1, counts as wrong here as it did before."""


def require_scorable(dataset: str) -> None:
    """Raise unless the verifier of this dataset is one that may see a model's text.

    Args:
        dataset: its name in reasoning-gym.

    Raises:
        UnsafeVerifierError: it is refused, or was never read.
    """
    if dataset in COMPARING or dataset in GUARDED or dataset in OWN:
        return
    reason = REFUSED.get(dataset, "its verifier was not read, and is not on the list of those that only compare")
    raise UnsafeVerifierError(
        f"the dataset {dataset!r} of reasoning-gym is refused: {reason}. A model's answer is never evaluated in this "
        "process; choose another dataset, or write a task of your own with a verifier that only compares."
    )


def require_read_version() -> None:
    """Raise unless the installed library is the one whose verifiers were read.

    Raises:
        UnsafeVerifierError: another version.
    """
    found = importlib.metadata.version("reasoning-gym")
    if found != READ_VERSION:
        raise UnsafeVerifierError(
            f"reasoning-gym {found} is installed; its verifiers were read in version {READ_VERSION}, and another may "
            f"evaluate answers: pip install 'reasoning-gym=={READ_VERSION}'."
        )


def verifier_of(dataset: str, score_answer: Callable[..., float]) -> Verifier:
    """What scores answers of a dataset.

    Args:
        dataset: its name in reasoning-gym.
        score_answer: the library's verifier; it is called only where it is harmless, with a copy of the entry's
            metadata, which some of them write to.

    Raises:
        UnsafeVerifierError: see `require_scorable` and `require_read_version`.
    """
    require_scorable(dataset)
    if dataset in OWN:
        return OWN[dataset]
    require_read_version()
    guard = GUARDED.get(dataset)

    def verify(answer: str, entry: Entry) -> float:
        if guard is not None and not guard(answer, entry):
            return 0.0
        return score_answer(answer, {**entry, "metadata": dict(entry["metadata"])})

    return verify


def too_long(answer: str, right: str) -> bool:
    """Whether an answer is longer than any that is scored."""
    return len(answer) > max(LONGEST_ANSWER, 4 * len(right))
