"""Epochs: every record once in each, in another order, and the same batches however often one stops."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxrl_llm.rollouts.collect.epochs import Walk
from jaxrl_llm.rollouts.collect.epochs import order
from jaxrl_llm.rollouts.collect.epochs import take

FILE = SimpleNamespace(fingerprint="f" * 64)


def batches(count: int, wanted: int, number: int, seed: int = 0, use=lambda index: index):
    """`number` batches one after another, and the places they left off at."""
    walk, found = Walk(), []
    for _ in range(number):
        taken = take(count, wanted, walk, seed, use)
        walk = Walk.of(taken.walk.cursor(FILE), FILE)  # as a run that stops and goes on
        found.append(taken)
    return found


def test_an_epoch_has_every_record_once() -> None:
    found = [index for taken in batches(7, 3, 7) for index, _ in taken.items]
    epochs = np.array(found).reshape(3, 7)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(7), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_array_equal(epochs[1], order(7, 0, 1))


def test_the_place_counts_epochs() -> None:
    walks = [taken.walk for taken in batches(4, 3, 4)]
    assert walks == [Walk(0, 3), Walk(1, 2), Walk(2, 1), Walk(2, 4)]
    assert [walk.epochs(4) for walk in walks] == [0.75, 1.5, 2.25, 3.0]


def test_seeds_differ_and_the_same_seed_does_not() -> None:
    orders = {tuple(order(20, seed, 0)) for seed in range(5)}
    assert len(orders) == 5
    assert tuple(order(20, 3, 0)) in orders


def test_what_cannot_be_used_is_counted_and_replaced() -> None:
    taken = take(6, 6, Walk(), 0, lambda index: index if index % 2 else None)
    assert sorted(index for index, _ in taken.items) == [1, 1, 3, 3, 5, 5]
    # The walk ends with the last usable record, which may stand before the last of its epoch.
    assert 4 <= taken.unusable <= 6
    assert 6 + taken.unusable == taken.walk.epoch * 6 + taken.walk.position


def test_nothing_usable_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(ValueError, match="none of the 6 records can be used; each was dropped"):
        take(6, 1, Walk(0, 3), 0, lambda index: None)
    for start in range(6):  # one in six is found from wherever one starts
        assert take(6, 1, Walk(0, start), 0, lambda index: index if index == 4 else None).items == [(4, 4)]


def test_a_cursor_of_another_file_or_collector_is_refused() -> None:
    cursor = Walk(1, 2).cursor(FILE)
    assert Walk.of(cursor, FILE) == Walk(1, 2)
    assert Walk.of({}, FILE) == Walk()
    with pytest.raises(ValueError, match="the file has changed since the cursor was written: its SHA-256 is ffff"):
        Walk.of(cursor | {"file": "0" * 64}, FILE)
    with pytest.raises(
        ValueError, match=r"the cursor has the keys \['curriculum'\]; expected epoch, file and position"
    ):
        Walk.of({"curriculum": {}}, FILE)
