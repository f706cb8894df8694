"""What the small GLM reads: sums modulo 16 whose steps are written down, and letters of a random language."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

PAD, END, EQUALS, FIRST_NUMBER = 0, 1, 2, 3
NUMBERS = 16
"""Sums are modulo this; every number is one token."""
LETTERS = 12
FIRST_LETTER = FIRST_NUMBER + NUMBERS
VOCABULARY = FIRST_LETTER + LETTERS


class Problems(NamedTuple):
    """Sums: "3 9 7 =" and the running sums "12 3" with their end, for prompts of two to `widest` terms.

    Attributes:
        prompt: left-padded terms and the sign of equality.
        prompt_mask: which of them are real.
        answer: right-padded running sums, the last one the result, and the end.
        answer_mask: which of them are real.
        terms: of each sum.
    """

    prompt: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    answer: Int[Array, "B R"]
    answer_mask: Bool[Array, "B R"]
    terms: Int[Array, " B"]

    @property
    def result(self) -> Int[Array, " B"]:
        """The token of the result."""
        return jnp.take_along_axis(self.answer, self.terms[:, None] - 2, axis=1)[:, 0]


def draw_problems(key: PRNGKey, count: int, *, widest: int) -> Problems:
    """Sums of uniform numbers, with 2 to `widest` terms in equal shares."""
    number_key, length_key = jax.random.split(key)
    numbers = jax.random.randint(number_key, (count, widest), 0, NUMBERS)
    terms = jax.random.randint(length_key, (count,), 2, widest + 1)
    real = jnp.arange(widest) >= widest - terms[:, None]
    running = jnp.cumsum(jnp.where(real, numbers, 0), axis=1) % NUMBERS
    column = jnp.arange(widest)
    # The running sum after the second term comes first.
    source = jnp.minimum(widest - terms[:, None] + 1 + column, widest - 1)
    steps = jnp.take_along_axis(running, source, axis=1) + FIRST_NUMBER
    last = terms[:, None] - 1
    answer = jnp.where(column < last, steps, jnp.where(column == last, END, PAD))
    equals = jnp.full((count, 1), EQUALS)
    return Problems(
        prompt=jnp.concatenate([jnp.where(real, numbers + FIRST_NUMBER, PAD), equals], axis=1),
        prompt_mask=jnp.concatenate([real, equals == EQUALS], axis=1),
        answer=answer,
        answer_mask=column <= last,
        terms=terms,
    )


def sums_text(key: PRNGKey, rows: int, length: int, *, widest: int) -> Int[Array, "B T"]:
    """Rows of sums with their answers, one behind the other; the last one may be cut."""
    shortest = 5  # two terms, the sign, the result and the end
    each = -(-length // shortest)
    drawn = draw_problems(key, rows * each, widest=widest)
    tokens = jnp.concatenate([drawn.prompt, drawn.answer], axis=1).reshape(rows, -1)
    mask = jnp.concatenate([drawn.prompt_mask, drawn.answer_mask], axis=1).reshape(rows, -1)
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :length]
    return jnp.take_along_axis(tokens, order, axis=1)


def draw_language(key: PRNGKey) -> Float[Array, "L L L"]:
    """Logits of the next letter after each pair of letters; how sure they are differs from pair to pair."""
    logit_key, scale_key = jax.random.split(key)
    scale = jnp.exp(jax.random.uniform(scale_key, (LETTERS, LETTERS, 1), minval=jnp.log(0.3), maxval=jnp.log(6.0)))
    return scale * jax.random.normal(logit_key, (LETTERS,) * 3)


def letters_text(key: PRNGKey, language: Float[Array, "L L L"], rows: int, length: int) -> Int[Array, "B T"]:
    """Rows of letters, each drawn after the two before it."""
    start_key, key = jax.random.split(key)
    start = jax.random.randint(start_key, (2, rows), 0, LETTERS)

    def draw(pair: tuple[Array, Array], key: PRNGKey) -> tuple[tuple[Array, Array], Array]:
        letter = jax.random.categorical(key, language[pair])
        return (pair[1], letter), letter

    letters = jax.lax.scan(draw, (start[0], start[1]), jax.random.split(key, length))[1]
    return letters.T + FIRST_LETTER
