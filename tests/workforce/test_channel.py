"""Packets are claimed once and none is lost, whatever the order of operations."""

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jaxrl_llm.workforce import ChannelError
from jaxrl_llm.workforce import PacketId
from jaxrl_llm.workforce import Status
from jaxrl_llm.workforce import TaskChannel

WORKERS = ("a", "b")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["post", "claim", "give_back", "archive", "withdraw"]), st.integers(0, 11))))
def test_packets_are_claimed_once_and_none_is_lost(operations: list[tuple[str, int]]) -> None:
    """Against a model: sets of ids, whose moves are the only ones that succeed."""
    channel = TaskChannel()
    where: dict[PacketId, str] = {}
    claims: dict[PacketId, int] = {}
    for name, which in operations:
        number, worker = PacketId(which % 3, 1, 1 + which // 3), WORKERS[which % 2]
        allowed = {"post": None, "claim": "sent", "give_back": "processing", "archive": "returned"}
        after = {"post": "sent", "claim": "processing", "give_back": "returned", "archive": "archived"}
        if name == "withdraw":
            channel.withdraw(number.task)
            where = {key: at for key, at in where.items() if key.task != number.task or at != "sent"}
            continue
        arguments = (number, worker) if name in ("post", "claim") else (number,)
        if where.get(number) != allowed[name]:
            with pytest.raises(ChannelError):
                getattr(channel, name)(*arguments)
            continue
        getattr(channel, name)(*arguments)
        where[number] = after[name]
        claims[number] = claims.get(number, 0) + (name == "claim")
    assert {key: packet.status.value for key, packet in channel.packets.items()} == where
    # A step that was withdrawn before anybody had it may be posted again; one that somebody had may not.
    assert all(count <= 1 for count in claims.values())
    assert sum(channel.count(status) for status in Status) == len(where)
    waiting = [number for worker in WORKERS for number in channel.waiting(worker)]
    assert sorted(waiting) == sorted(key for key, at in where.items() if at == "sent")


def test_a_packet_is_claimed_by_its_worker_only() -> None:
    number = PacketId(0, 1, 1)
    channel = TaskChannel()
    channel.post(number, "a")
    with pytest.raises(ChannelError, match=r"packet \(0, 1, 1\) is for 'a'; 'b' cannot claim it"):
        channel.claim(number, "b")
    assert channel.waiting("a") == (number,)
    assert channel.waiting("b") == ()
    channel.claim(number, "a")
    with pytest.raises(ChannelError, match="is processing; it must be sent"):
        channel.claim(number, "a")


def test_many_packets_go_their_way() -> None:
    """What looks at every packet for each of them would not end here."""
    channel, count = TaskChannel(), 5000
    numbers = [PacketId(task, 1, 1) for task in range(count)]
    for number in numbers:
        channel.post(number, "a")
    for number in numbers:
        channel.claim(number, "a")
        channel.give_back(number)
        channel.archive(number)
    assert channel.count(Status.ARCHIVED) == count
