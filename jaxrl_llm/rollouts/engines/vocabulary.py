"""Whether an engine's token ids mean what the trainer's do."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.models.tokenizers import Tokenizer

PROBE = (
    "The quick brown fox, 1234567890 + 0.5 = ?\n\tdef f(x):\n        return {'a': x ** 2}  # naïve café, Straße, "
    "日本語, привет, 🙂\n<p>I'll don't WE'VE</p> antidisestablishmentarianism"
)
"""A text whose pieces differ between tokenizers: words, digits, white space, code, accents, other scripts, emoji."""


def require_same_tokens(ours: Sequence[str | None], theirs: Sequence[str], *, engine: str) -> None:
    """Raise unless every token that both sides have is the same one, and the engine has all of ours.

    Args:
        ours: the trainer's tokens by id, in the byte alphabet; None where the id is not used.
        theirs: the engine's tokens by id.
        engine: its name, for the sentence.

    Raises:
        ValueError: naming the first token that differs.
    """
    for token, ours_text in enumerate(ours):
        if ours_text is None:
            continue
        if token >= len(theirs):
            raise ValueError(
                f"{engine} has {len(theirs)} tokens and the trainer's tokenizer {len(ours)}: the first that is missing "
                f"there is token {token}, {ours_text!r}."
            )
        if theirs[token] != ours_text:
            raise ValueError(
                f"{engine} has another vocabulary: the first token that differs is {token}, {theirs[token]!r} there "
                f"and {ours_text!r} in the trainer's tokenizer."
            )


def require_tokenizer_of_gguf(tokenizer: Tokenizer, metadata: Mapping[str, Any], *, engine: str) -> None:
    """Raise unless a GGUF file has the tokens of this tokenizer.

    Raises:
        ValueError: naming the first token that differs, or because the file has no vocabulary.
    """
    theirs = metadata.get("tokenizer.ggml.tokens")
    if theirs is None:
        raise ValueError(
            f"{engine} has no vocabulary to compare with; pass tokenizer=None to go without the comparison."
        )
    ours = [tokenizer.backend.id_to_token(token) for token in range(tokenizer.vocab_size)]
    require_same_tokens(ours, theirs, engine=engine)


def require_same_pieces(tokenizer: Tokenizer, theirs: Sequence[int], *, engine: str, text: str = PROBE) -> None:
    """Raise unless a server cut the probe text into the same tokens.

    Raises:
        ValueError: naming the first token that differs.
    """
    ours = tokenizer.encode(text, add_special_tokens=False)
    for place in range(max(len(ours), len(theirs))):
        pair = [ids[place] if place < len(ids) else None for ids in (theirs, ours)]
        if pair[0] != pair[1]:
            raise ValueError(
                f"{engine} has another tokenizer: the first token that differs in a probe text, number {place}, is "
                f"{pair[0]} there and {pair[1]} in the trainer's ({_names(tokenizer, pair)})."
            )


def _names(tokenizer: Tokenizer, pair: Sequence[int | None]) -> str:
    """What the trainer's tokenizer calls both; the end of the text has no number."""
    return " and ".join("the end" if token is None else repr(tokenizer.backend.id_to_token(token)) for token in pair)
