"""Experience from conversations with thinking and tools: what somebody else answered, as if the policy had written it.

A line is

    {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "reasoning_content": "..", ..}, ..]}

with, where they are needed, "tools" (what may be called), "thinking" (false for answers without) and "first_written"
(answers before this message are given). Messages are those of the chat, such as `glm_chat.GLM4_5`. Every answer is a
stretch of chosen tokens and a step of its own, with the token that ends it. Nobody's log-probs are known, and no reward
is given.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat_pieces import written_pieces
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect.demonstrations import WrittenTexts
from jaxrl_llm.rollouts.collect.dialogs import Row
from jaxrl_llm.rollouts.collect.dialogs import TooLong
from jaxrl_llm.rollouts.collect.dialogs import encode_pieces
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.records import Record

KEYS: dict[str, tuple[type, str]] = {
    "messages": (list, "a list of messages"),
    "tools": (list, "a list of tools"),
    "thinking": (bool, "true or false"),
    "first_written": (int, "a whole number"),
}
"""What a line may have; messages it must."""


class ConversationCollector(WrittenTexts):
    """Batches of conversations, each epoch in an order of its own."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        chat: Chat,
        *,
        rows: int,
        width: int,
        starts: bool = True,
        too_long: TooLong = "drop",
        seed: int = 0,
        samples: int = 0,
        ignored: Sequence[str] = (),
    ) -> None:
        """Every line of the file is checked here, so that nothing is computed before a mistake in it is named.

        Args:
            path: JSON lines, or Parquet (which needs pyarrow).
            tokenizer: of the policy.
            chat: how messages are written.
            rows: conversations per batch.
            width: most tokens of a row.
            starts: whether the chat writes the start tokens of a text, as GLM-4.5's and Jinja templates do.
            too_long: what becomes of a row that does not fit, see `DemonstrationCollector`.
            seed: of the order.
            samples: conversations of each batch that are written down.
            ignored: further keys that a line may have.

        Raises:
            FileNotFoundError, ModuleNotFoundError: no such file, or no pyarrow.
            ValueError: a setting that cannot be; a line that cannot be used, by its number.
        """
        self._chat, self._starts, self._ignored = chat, starts, frozenset(ignored)
        shape = BatchShape(rows, 1, width, width - 1)
        super().__init__(path, tokenizer, shape=shape, too_long=too_long, seed=seed, samples=samples)

    def _check(self, record: Record, place: str) -> None:
        self._encoded(record, place)

    def _encoded(self, record: Record, place: str) -> Row:
        """The row of a line.

        Raises:
            ValueError: it has other keys or values than it may have, is no conversation, or is several texts.
        """
        _check_keys(record, self._ignored, place)
        options = {name: record[name] for name in KEYS if name != "messages" and record.get(name) is not None}
        try:
            texts = written_pieces(record["messages"], self._chat, tokenizer=self._tokenizer, **options)
            if len(texts) > 1:
                raise ValueError(
                    f"the chat takes back earlier turns, so that its answers stand in {len(texts)} texts; give one "
                    "line for each, with first_written."
                )
            return encode_pieces(texts[0], self._tokenizer, starts=self._starts)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _check_keys(record: Record, ignored: frozenset[str], place: str) -> None:
    unknown = set(record) - set(KEYS) - ignored
    if unknown or "messages" not in record:
        raise ValueError(
            f"{place} has the keys {sorted(record)}; expected messages and, at most, {', '.join(list(KEYS)[1:])}. "
            "Further keys can be named to be ignored."
        )
    for name, (kind, what) in KEYS.items():
        value = record.get(name)
        if value is None and name != "messages":
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} in {place} is a {type(value).__name__}; expected {what}.")
