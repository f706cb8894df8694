"""The task channel: packets that are posted, claimed by one worker, returned, and archived or withdrawn.

    SENT -> PROCESSING -> RETURNED -> ARCHIVED

An operation that its packet's status does not allow raises and changes nothing. One thread owns a channel: the room's.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


class Status(enum.Enum):
    """Where a packet is on its way."""

    SENT = "sent"
    PROCESSING = "processing"
    RETURNED = "returned"
    ARCHIVED = "archived"


class PacketId(NamedTuple):
    """Which step of which attempt at which task, each counted as its owner counts: from 0, 1 and 1."""

    task: int
    attempt: int
    step: int


@dataclass(frozen=True)
class Packet:
    """One subtask on its way.

    Attributes:
        id: what it is.
        assignee: the worker that it is for.
        status: where it is.
    """

    id: PacketId
    assignee: str
    status: Status = Status.SENT


class ChannelError(ValueError):
    """An operation that the packet's status does not allow: a mistake of the caller's."""


class TaskChannel:
    """The packets, in the order in which they were posted; those archived stay."""

    def __init__(self) -> None:
        self._packets: dict[PacketId, Packet] = {}
        # Of each worker, so that what is done with a packet does not depend on how many there are.
        self._waiting: dict[str, dict[PacketId, None]] = {}

    @property
    def packets(self) -> Mapping[PacketId, Packet]:
        """All of them, by id, to read."""
        return MappingProxyType(self._packets)

    def post(self, number: PacketId, assignee: str) -> None:
        """Put in a new packet.

        Raises:
            ChannelError: there is one with this id.
        """
        if number in self._packets:
            raise ChannelError(f"packet {tuple(number)} was posted before; a packet is posted once.")
        self._packets[number] = Packet(number, assignee)
        self._waiting.setdefault(assignee, {})[number] = None

    def waiting(self, assignee: str) -> tuple[PacketId, ...]:
        """What can be claimed by a worker, oldest first."""
        return tuple(self._waiting.get(assignee, ()))

    def claim(self, number: PacketId, assignee: str) -> None:
        """A worker takes a packet, which nobody can take again.

        Raises:
            ChannelError: it is not there, is for another worker, or was claimed before.
        """
        owner = self._at(number, Status.SENT).assignee
        if owner != assignee:
            raise ChannelError(f"packet {tuple(number)} is for {owner!r}; {assignee!r} cannot claim it.")
        self._move(number, Status.SENT, Status.PROCESSING)
        del self._waiting[owner][number]

    def give_back(self, number: PacketId) -> None:
        """The worker has finished, well or not.

        Raises:
            ChannelError: the packet is not being worked on.
        """
        self._move(number, Status.PROCESSING, Status.RETURNED)

    def archive(self, number: PacketId) -> None:
        """The publisher has read what came back.

        Raises:
            ChannelError: nothing came back.
        """
        self._move(number, Status.RETURNED, Status.ARCHIVED)

    def withdraw(self, task: int) -> None:
        """Take out the packets of a task that nobody has claimed: its attempt is over."""
        for waiting in self._waiting.values():
            for number in [number for number in waiting if number.task == task]:
                del waiting[number], self._packets[number]

    def count(self, status: Status) -> int:
        """Packets with this status."""
        return sum(packet.status is status for packet in self._packets.values())

    def _at(self, number: PacketId, status: Status) -> Packet:
        packet = self._packets.get(number)
        if packet is None or packet.status is not status:
            there = "not in the channel" if packet is None else packet.status.value
            raise ChannelError(f"packet {tuple(number)} is {there}; it must be {status.value}.")
        return packet

    def _move(self, number: PacketId, before: Status, after: Status) -> None:
        self._packets[number] = dataclasses.replace(self._at(number, before), status=after)
