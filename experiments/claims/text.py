"""What the small GLM reads: counting modulo 16 with its steps written down, and letters of a random language."""

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
"""Counting is modulo this; every number is one token."""
STRIDES = 4
"""What is added is 1 to this."""
LETTERS = 12
PROMPT = 4
"""Tokens of a problem."""
MOST_TIMES = LETTERS - STRIDES
"""How often a stride can be added: every number of times is a letter."""
FIRST_LETTER = FIRST_NUMBER + NUMBERS
VOCABULARY = FIRST_LETTER + LETTERS


class Problems(NamedTuple):
    """Counting: "9 +3 twice =" and the steps "12 15" with their end; what they lead to is the result.

    Attributes:
        prompt: a number, a stride, how often it is added, and the sign of equality.
        answer: right-padded steps, the last one the result, and the end.
        answer_mask: which tokens of the answer are real.
        times: how often the stride is added.
    """

    prompt: Int[Array, "B 4"]
    answer: Int[Array, "B R"]
    answer_mask: Bool[Array, "B R"]
    times: Int[Array, " B"]

    @property
    def result(self) -> Int[Array, " B"]:
        """The token of the result."""
        return jnp.take_along_axis(self.answer, self.times[:, None] - 1, axis=1)[:, 0]


def draw_problems(key: PRNGKey, count: int, *, longest: int) -> Problems:
    """Uniform numbers and strides, added once to `longest` - 1 times in equal shares."""
    keys = jax.random.split(key, 3)
    start = jax.random.randint(keys[0], (count, 1), 0, NUMBERS)
    stride = jax.random.randint(keys[1], (count, 1), 0, STRIDES)
    times = jax.random.randint(keys[2], (count, 1), 1, longest)
    return _problems(start, stride, times, longest)


def all_problems(*, longest: int) -> Problems:
    """Every problem there is, once."""
    start, stride, times = jnp.indices((NUMBERS, STRIDES, longest - 1)).reshape(3, -1, 1)
    return _problems(start, stride, times + 1, longest)


def _problems(start: Int[Array, "B 1"], stride: Int[Array, "B 1"], times: Int[Array, "B 1"], longest: int) -> Problems:
    column = jnp.arange(longest)
    steps = (start + (stride + 1) * (column + 1)) % NUMBERS + FIRST_NUMBER
    # Strides and repetitions are letters: what a token means is to be seen from the token.
    letters = [stride + FIRST_LETTER, times - 1 + FIRST_LETTER + STRIDES]
    return Problems(
        prompt=jnp.concatenate([start + FIRST_NUMBER, *letters, jnp.full_like(start, EQUALS)], axis=1),
        answer=jnp.where(column < times, steps, jnp.where(column == times, END, PAD)),
        answer_mask=column <= times,
        times=times[:, 0],
    )


def counting_text(key: PRNGKey, rows: int, length: int, *, longest: int) -> Int[Array, "B T"]:
    """Rows of problems with their answers, one behind the other; the last one may be cut."""
    shortest = PROMPT + 2  # one step and the end
    drawn = draw_problems(key, rows * -(-length // shortest), longest=longest)
    tokens = jnp.concatenate([drawn.prompt, drawn.answer], axis=1).reshape(rows, -1)
    mask = jnp.concatenate([drawn.prompt > PAD, drawn.answer_mask], axis=1).reshape(rows, -1)
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
