"""Experience from preferences: two answers to one prompt, of which somebody liked one better.

A line is {"prompt": .., "chosen": .., "rejected": ..}. Each is a text or a list of messages; `chosen` and `rejected`
may hold the prompt's messages again. With both "score_chosen" and "score_rejected", equal scores are a tie.

A pair is two neighbouring rows of one group: the chosen one with outcome 1, then the rejected one with outcome 0.
Nobody's log-probs are known.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.models.chat import ChatFormat
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

KEYS = ("prompt", "chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")
OUTCOMES = (1.0, 0.0)
"""Of the chosen answer and of the rejected one."""

Pair = tuple[Row, Row]


class PreferenceCollector:
    """Batches of pairs, each epoch in an order of its own.

    Pairs whose rows have the same tokens (as cut) say nothing, and neither do ties: both are dropped and counted. The
    cursor is that of `DemonstrationCollector`.
    """

    brings = Brings(log_probs=False, pairs=True)

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        pairs: int,
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
            pairs: pairs per batch, half the number of rows.
            path, tokenizer, width, actions, chat_format, too_long, seed, ignored: as for `DemonstrationCollector`; a
                pair is dropped where one of its rows is.
            samples: pairs of each batch that are written down.

        Raises:
            FileNotFoundError, ModuleNotFoundError: no such file, or no pyarrow.
            ValueError: a setting that cannot be; a line that cannot be used, by its number.
        """
        self._shape = BatchShape(2 * pairs, 2, width, width - 1 if actions is None else actions)
        require_settings(width=width, too_long=too_long)
        self._tokenizer, self._encoder = tokenizer, DialogEncoder(tokenizer, chat_format)
        self._too_long: TooLong = too_long
        self._seed, self._samples = seed, samples
        self._ignored = frozenset(ignored)
        self._records = open_records(path, self._check)

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._shape

    def __len__(self) -> int:
        """Pairs in the file."""
        return len(self._records)

    def collect(
        self, policy: PolicySnapshot | None, key: PRNGKey | None, step: int, cursor: Mapping[str, Any]
    ) -> Experience:
        """See `Collector.collect`; only the cursor is looked at.

        Raises:
            ValueError: no pair can be used, or the cursor belongs to another file.
        """
        dropped = {"equal": 0, "ties": 0, "dropped": 0}

        def use(index: int) -> Pair | None:
            found = self._pair(index)
            if isinstance(found, str):
                dropped[found] += 1
                return None
            return found

        walk = Walk.of(cursor, self._records)
        why = f"all are ties, have equal answers, or do not fit into {room(self._shape)}"
        taken = take(len(self._records), self._shape.groups, walk, self._seed, use, why=why)
        rows = [row for _, pair in taken.items for row in pair]
        trajectories = rows_to_trajectories(
            rows,
            width=self._shape.width,
            pad_id=self._tokenizer.pad_id,
            group_ids=[row // 2 for row in range(len(rows))],
            outcomes=OUTCOMES * len(taken.items),
        )
        texts = tuple("\n".join(chosen_texts(row, self._tokenizer)) for row in rows)
        metrics = {
            "preferences/epochs": taken.walk.epochs(len(self._records)),
            "preferences/cut": float(sum(not row.ended for row in rows)),
        }
        return Experience(
            trajectories=trajectories,
            per_row={"preferences/tokens": trajectories.action_mask.sum(axis=1).astype(np.float32)},
            metrics=metrics | {f"preferences/{name}": float(count) for name, count in dropped.items()},
            samples=tuple(
                {"place": self._records.place(index), "chosen": texts[2 * pair], "rejected": texts[2 * pair + 1]}
                for pair, (index, _) in enumerate(taken.items[: self._samples])
            ),
            texts=texts,
            cursor=taken.walk.cursor(self._records),
        )

    def _pair(self, index: int) -> Pair | str:
        """The rows of a pair, or why it is dropped."""
        record, place = self._records[index], self._records.place(index)
        if _is_tie(record):
            return "ties"
        made = []
        for dialog in _dialogs(record, place):
            row = fitted(self._encoder.encode(dialog), self._shape.width, self._shape.actions, self._too_long)
            if row is None:
                return "dropped"
            made.append(row)
        chosen, rejected = made
        return "equal" if np.array_equal(chosen.tokens, rejected.tokens) else (chosen, rejected)

    def _check(self, record: Record, place: str) -> None:
        for dialog in _checked(record, place, self._ignored):
            self._encoder.check(dialog, place)


def check_preferences(path: str | Path, *, chat: bool) -> None:
    """Read a file of pairs as far as no tokenizer is needed for it.

    Args:
        path: the file.
        chat: whether turns will be written in a chat format.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as `PreferenceCollector`.
    """

    def check(record: Record, place: str) -> None:
        for dialog in _checked(record, place, frozenset()):
            check_turns(dialog, place, chat=chat)

    open_records(path, check)


def _checked(record: Record, place: str, ignored: frozenset[str]) -> list[Dialog]:
    """The dialogues of a line that has what it must have.

    Raises:
        ValueError: naming the place, what stands there and what is expected.
    """
    keys = frozenset(record) - ignored
    if not frozenset(KEYS) <= keys <= frozenset((*KEYS, *SCORES)):
        raise ValueError(
            f"{place} has the keys {sorted(record)}; expected {', '.join(KEYS)}, and perhaps "
            f"{' and '.join(SCORES)}. Further keys can be named to be ignored."
        )
    scores = [record.get(name) for name in SCORES]
    if any(score is not None and type(score) not in (int, float) for score in scores):
        raise ValueError(f"{place} has the scores {scores}; expected numbers.")
    better, worse = scores
    if better is not None and worse is not None and not better >= worse:
        raise ValueError(f"{place} has the scores {scores}; the chosen answer must not have the lower one.")
    return _dialogs(record, place)


def _is_tie(record: Record) -> bool:
    chosen, rejected = (record.get(name) for name in SCORES)
    return chosen is not None and chosen == rejected


def _dialogs(record: Record, place: str) -> list[Dialog]:
    """The dialogue that was chosen and the one that was rejected.

    Raises:
        ValueError: a value is of another type, or an answer does not follow the prompt.
    """
    prompt = as_messages(record["prompt"], "user", f"prompt in {place}")
    if not prompt:
        raise ValueError(f"prompt in {place} has no messages; an answer needs one.")
    dialogs = []
    for name in KEYS[1:]:
        answer = as_messages(record[name], "assistant", f"{name} in {place}")
        answer = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
        if not answer or answer[0]["role"] != "assistant":
            raise ValueError(
                f"{name} in {place} has no response: it must go on with the assistant's turn after the prompt."
            )
        dialogs.append(Dialog((*prompt, *answer), first_chosen=len(prompt)))
    return dialogs
