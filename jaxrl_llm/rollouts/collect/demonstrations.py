"""Experience from demonstrations: what somebody else answered, as if the policy had chosen it.

A line is one of

    {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}, ..]}
    {"prompt": "..", "response": ".."}              also "completion"; the prompt may be a list of messages
    {"instruction": "..", "input": "..", "output": ".."}          "input" may be missing or empty

and all lines of a file are alike. Every turn of the assistant is a stretch of chosen tokens and a step of its own; its
end token is chosen too. Nobody's log-probs are known, and no reward is given.
"""

import abc
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat import Message
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect.dialogs import Dialog
from jaxrl_llm.rollouts.collect.dialogs import DialogEncoder
from jaxrl_llm.rollouts.collect.dialogs import Row
from jaxrl_llm.rollouts.collect.dialogs import TooLong
from jaxrl_llm.rollouts.collect.dialogs import as_messages
from jaxrl_llm.rollouts.collect.dialogs import check_turns
from jaxrl_llm.rollouts.collect.dialogs import chosen_texts
from jaxrl_llm.rollouts.collect.dialogs import fitted
from jaxrl_llm.rollouts.collect.dialogs import require_settings
from jaxrl_llm.rollouts.collect.dialogs import room
from jaxrl_llm.rollouts.collect.dialogs import rows_to_trajectories
from jaxrl_llm.rollouts.collect.epochs import Walk
from jaxrl_llm.rollouts.collect.epochs import take
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.records import Record
from jaxrl_llm.rollouts.collect.records import open_records
from jaxrl_llm.typing import PRNGKey

FORMS: dict[frozenset[str], tuple[str, str]] = {
    frozenset({"messages"}): ("messages", ""),
    frozenset({"prompt", "response"}): ("prompt", "response"),
    frozenset({"prompt", "completion"}): ("prompt", "completion"),
    frozenset({"instruction", "output"}): ("instruction", "output"),
}
"""Keys that a line must have, and which of them ask and answer."""

OPTIONAL_INPUT = "input"


class WrittenTexts(abc.ABC):
    """Batches of what somebody else wrote, each epoch in an order of its own: what its two kinds share.

    The cursor is {"epoch", "position", "file"}: records done in this epoch, and the SHA-256 of the file.
    """

    brings = Brings(rewards=False, log_probs=False)

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        shape: BatchShape,
        too_long: TooLong,
        seed: int,
        samples: int,
    ) -> None:
        """Read and check the file; what `_row` and `_check` need must be there already."""
        require_settings(width=shape.width, too_long=too_long)
        self._tokenizer, self._shape = tokenizer, shape
        self._too_long: TooLong = too_long
        self._seed, self._samples = seed, samples
        self._records = open_records(path, self._check)

    @abc.abstractmethod
    def _encoded(self, record: Record, place: str) -> Row:
        """The row of a line."""

    @abc.abstractmethod
    def _check(self, record: Record, place: str) -> None:
        """Refuse a line that cannot be used."""

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._shape

    def __len__(self) -> int:
        """Texts in the file."""
        return len(self._records)

    def collect(
        self, policy: PolicySnapshot | None, key: PRNGKey | None, step: int, cursor: Mapping[str, Any]
    ) -> Experience:
        """See `Collector.collect`; only the cursor is looked at.

        Raises:
            ValueError: no text fits, or the cursor belongs to another file.
        """
        walk = Walk.of(cursor, self._records)
        why = f"none fits into {room(self._shape)}"
        taken = take(len(self._records), self._shape.rows, walk, self._seed, self._row, why=why)
        rows = [row for _, row in taken.items]
        trajectories = rows_to_trajectories(
            rows,
            width=self._shape.width,
            pad_id=self._tokenizer.pad_id,
            group_ids=range(len(rows)),
            outcomes=[0.0] * len(rows),
        )
        texts = tuple("\n".join(chosen_texts(row, self._tokenizer)) for row in rows)
        return Experience(
            trajectories=trajectories,
            per_row={"demonstrations/tokens": trajectories.action_mask.sum(axis=1).astype(np.float32)},
            metrics={
                "demonstrations/epochs": taken.walk.epochs(len(self._records)),
                "demonstrations/cut": float(sum(not row.ended for row in rows)),
                "demonstrations/dropped": float(taken.unusable),
            },
            samples=tuple(
                {"place": self._records.place(index), "text": text}
                for (index, _), text in zip(taken.items[: self._samples], texts, strict=False)
            ),
            texts=texts,
            cursor=taken.walk.cursor(self._records),
        )

    def _row(self, index: int) -> Row | None:
        row = self._encoded(self._records[index], self._records.place(index))
        return fitted(row, self._shape.width, self._shape.actions, self._too_long)


class DemonstrationCollector(WrittenTexts):
    """Batches of demonstrations, each epoch in an order of its own."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        rows: int,
        width: int,
        actions: int | None = None,
        chat_format: ChatFormat | None = None,
        too_long: TooLong = "drop",
        seed: int = 0,
        samples: int = 0,
        ignored: Sequence[str] = (),
    ) -> None:
        """Every line of the file is checked here, so that nothing is computed before a mistake in it is named.

        Args:
            path: JSON lines, or Parquet (which needs pyarrow).
            tokenizer: of the policy.
            rows: demonstrations per batch.
            width: most tokens of a row.
            actions: most chosen tokens of a row; None takes all that fit into `width`.
            chat_format: how turns are written; None joins a prompt and a response as they are.
            too_long: what becomes of a row that does not fit: "drop" or "cut" (at its end; `ended` is false then). Both
                are counted.
            seed: of the order.
            samples: demonstrations of each batch that are written down.
            ignored: further keys that a line may have.

        Raises:
            FileNotFoundError, ModuleNotFoundError: no such file, or no pyarrow.
            ValueError: a setting that cannot be; a line that cannot be used, by its number.
        """
        shape = BatchShape(rows, 1, width, width - 1 if actions is None else actions)
        self._encoder, self._lines = DialogEncoder(tokenizer, chat_format), _Lines(ignored)
        super().__init__(path, tokenizer, shape=shape, too_long=too_long, seed=seed, samples=samples)

    def _encoded(self, record: Record, place: str) -> Row:
        return self._encoder.encode(self._lines.dialog(record, place))

    def _check(self, record: Record, place: str) -> None:
        self._encoder.check(self._lines.dialog(record, place), place)


def check_demonstrations(path: str | Path, *, chat: bool) -> None:
    """Read a file of demonstrations as far as no tokenizer is needed for it.

    Args:
        path: the file.
        chat: whether turns will be written in a chat format.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as `DemonstrationCollector`.
    """
    lines = _Lines(())
    open_records(path, lambda record, place: check_turns(lines.dialog(record, place), place, chat=chat))


class _Lines:
    """Lines of one form, as dialogues; the first one says which form that is."""

    def __init__(self, ignored: Sequence[str]) -> None:
        self._ignored, self._form = frozenset(ignored), frozenset[str]()

    def dialog(self, record: Record, place: str) -> Dialog:
        """The dialogue of a line.

        Raises:
            ValueError: it has other keys than it may have, or than the lines before it, or a value of another type.
        """
        keys = frozenset(record) - self._ignored
        if keys - {OPTIONAL_INPUT} not in FORMS or (OPTIONAL_INPUT in keys and "instruction" not in keys):
            raise ValueError(
                f"{place} has the keys {sorted(record)}; expected messages, or prompt and response (or completion), or "
                "instruction and output. Further keys can be named to be ignored."
            )
        form = keys - {OPTIONAL_INPUT}
        if self._form and form != self._form:
            raise ValueError(
                f"{place} has the keys {sorted(form)}, lines before it {sorted(self._form)}; mix no forms."
            )
        self._form = form
        return _dialog(record, form, place)


def _dialog(record: Record, form: frozenset[str], place: str) -> Dialog:
    """The dialogue of a line of this form.

    Raises:
        ValueError: a value is of another type.
    """
    asks, answers = FORMS[form]
    if not answers:
        return Dialog(as_messages(record[asks], "user", f"messages in {place}"))
    prompt = as_messages(record[asks], "user", f"{asks} in {place}")
    more = record.get(OPTIONAL_INPUT)
    if more:
        if not isinstance(more, str):
            raise ValueError(f"input in {place} is a {type(more).__name__}; expected a text.")
        prompt = (*prompt[:-1], Message(role="user", content=f"{prompt[-1]['content']}\n\n{more}"))
    if not isinstance(record[answers], str):
        raise ValueError(f"{place} has no response: {answers} is a {type(record[answers]).__name__}; expected a text.")
    return Dialog((*prompt, Message(role="assistant", content=record[answers])), first_chosen=len(prompt))
