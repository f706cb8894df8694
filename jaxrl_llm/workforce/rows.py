"""The record of a task as a row of tokens: what the learners wrote is marked, everything else is context.

    given       chosen   given                      given                     chosen
    the prompt  a plan   who does what, results ..  why it failed, the cue    another plan

Actor 0 is the planner, 1 the coordinator, 2, 3, .. the workers in their order, whoever learns; the n-th text that
learners wrote in a row is step n. The outcome stands at the last chosen token, with which a row ends.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.workforce.protocol import COORDINATOR
from jaxrl_llm.workforce.protocol import PLANNER
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.protocol import Turn


@dataclass(frozen=True)
class RecordRow:
    """One row.

    Attributes:
        tokens: ids.
        steps, actors: of each token; -1 where nobody who learns chose it.
        log_probs: of each token, 0 where it was given; None where a chosen one is unknown.
        ended: whether the whole record is there.
    """

    tokens: list[int]
    steps: list[int]
    actors: list[int]
    log_probs: list[float] | None
    ended: bool = True


def actor_names(cards: Sequence[Card]) -> tuple[str, ...]:
    """Who has which number in `Trajectories.actor_ids`."""
    return (PLANNER, COORDINATOR, *(card.name for card in cards))


def turn_tokens(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each turn: the one way to read a record, for whoever continues it and for who learns from it.

    Each turn is encoded on its own, so that what comes later changes no token. What an actor chose is taken as it was
    sampled where its tokens are known, else encoded, with the end token behind it.

    Args:
        turns: the record.
        tokenizer: of the policy.
    """
    pieces: list[list[int]] = []
    for turn in turns:
        if turn.said.tokens is not None:
            pieces.append([*turn.said.tokens])
            continue
        ids = tokenizer.encode(turn.said.text, add_special_tokens=not any(pieces))
        pieces.append([*ids, tokenizer.eos_id] if turn.acted else ids)
    return pieces


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """What a policy reads that writes the next turn of a record: the tokens that stand before it in its row.

    Args:
        turns: the record so far.
        tokenizer: of the policy.
    """
    return [*itertools.chain.from_iterable(turn_tokens(turns, tokenizer))]


def encode_turns(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, actors: Sequence[str], learners: Sequence[str] = (PLANNER,)
) -> RecordRow:
    """The row of a record, up to the last token that a learner chose.

    Before each chosen text stands what `encode_prompt` gives for the turns before it.

    Args:
        turns: the record.
        tokenizer: of the policy.
        actors: see `actor_names`.
        learners: whose texts are marked.
    """
    tokens: list[int] = []
    steps: list[int] = []
    chosen_by: list[int] = []
    log_probs: list[float] = []
    recorded, step, end = True, 0, 0
    for turn, ids in zip(turns, turn_tokens(turns, tokenizer), strict=True):
        said, learned = turn.said, turn.acted and turn.actor in learners
        tokens += ids
        steps += [step if learned else OUTSIDE] * len(ids)
        chosen_by += [actors.index(turn.actor) if learned else OUTSIDE] * len(ids)
        known = said.log_probs if learned else None
        log_probs += [0.0] * len(ids) if known is None else known
        if learned:
            recorded, step, end = recorded and known is not None, step + 1, len(tokens)
    return _cut(RecordRow(tokens, steps, chosen_by, log_probs if recorded else None), end, ended=True)


def records_to_trajectories(
    records: Sequence[Sequence[Turn]],
    tokenizer: Tokenizer,
    *,
    cards: Sequence[Card],
    rewards: Sequence[float],
    group_ids: Sequence[int],
    width: int,
    learners: Sequence[str] = (PLANNER,),
    version: int = OUTSIDE,
) -> Trajectories:
    """Records as experience; log-probs are there where all of them are known.

    Args:
        records: of each task its turns.
        tokenizer: of the policy.
        cards: of the workers, in their order.
        rewards: outcome of each task.
        group_ids: equal for records of one task, which are compared with each other.
        width: T. Of a longer record the beginning is kept, up to the last chosen token that fits; it has not ended.
        learners: actors whose texts are learned.
        version: updates of the weights that wrote them.

    Raises:
        ValueError: a learner that is no actor, a number of rewards or groups that is not that of the records, log-probs
            that are not as many as tokens, or a record of which no chosen token fits.
    """
    actors = actor_names(cards)
    _check(records, actors, rewards=rewards, group_ids=group_ids, learners=learners)
    shape = (len(records), width)
    tokens = np.full(shape, tokenizer.pad_id, np.int32)
    steps, ids = np.full(shape, OUTSIDE, np.int32), np.full(shape, OUTSIDE, np.int32)
    real, earned, log_probs = np.zeros(shape, bool), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    ended, recorded = np.zeros(len(records), bool), True
    for number, turns in enumerate(records):
        row = _fitted(encode_turns(turns, tokenizer, actors=actors, learners=learners), width, number)
        count = len(row.tokens)
        tokens[number, :count], steps[number, :count], ids[number, :count] = row.tokens, row.steps, row.actors
        real[number, :count], ended[number], earned[number, count - 1] = True, row.ended, rewards[number]
        recorded = recorded and row.log_probs is not None
        if row.log_probs is not None:
            log_probs[number, :count] = row.log_probs
    return Trajectories(
        tokens=tokens,
        token_mask=real,
        action_mask=steps != OUTSIDE,
        group_ids=np.asarray(group_ids, np.int32),
        rewards=earned,
        log_prob_behaviour=log_probs if recorded else None,
        step_ids=steps,
        actor_ids=ids,
        versions=np.where(steps != OUTSIDE, np.int32(version), np.int32(OUTSIDE)),
        ended=ended,
    )


def _fitted(row: RecordRow, width: int, number: int) -> RecordRow:
    """The row up to the last chosen token that fits."""
    chosen = np.flatnonzero(np.asarray(row.steps[:width]) != OUTSIDE)
    if not len(chosen):
        raise ValueError(
            f"record {number} has no chosen token among its first {width} (width), of {len(row.tokens)}; each needs "
            "one, or nothing can be learned from it."
        )
    return _cut(row, int(chosen[-1]) + 1, ended=len(row.tokens) <= width)


def _cut(row: RecordRow, end: int, *, ended: bool) -> RecordRow:
    log_probs = None if row.log_probs is None else row.log_probs[:end]
    return RecordRow(row.tokens[:end], row.steps[:end], row.actors[:end], log_probs, ended)


def _check(
    records: Sequence[Sequence[Turn]],
    actors: Sequence[str],
    *,
    rewards: Sequence[float],
    group_ids: Sequence[int],
    learners: Sequence[str],
) -> None:
    for name in learners:
        if name not in actors:
            raise ValueError(f"learners name {name!r}; the actors are {', '.join(actors)}.")
    for name, given in (("rewards", rewards), ("group_ids", group_ids)):
        if len(given) != len(records):
            raise ValueError(f"{name} has {len(given)} entries for {len(records)} records; expected one for each.")
    for number, turns in enumerate(records):
        for said in (turn.said for turn in turns if turn.said.log_probs is not None):
            if len(said.log_probs or ()) != len(said.tokens or ()):
                raise ValueError(
                    f"record {number} has a text of {len(said.tokens or ())} tokens with {len(said.log_probs or ())} "
                    "log-probs; it must have one of each."
                )
