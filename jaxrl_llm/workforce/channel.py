"""The task channel: packets that are posted, claimed by one worker, returned, and archived or withdrawn.

    SENT -> PROCESSING -> RETURNED -> ARCHIVED

A channel is a value: every operation returns another one, so that any order of operations can be tried and none can be
lost between two threads.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
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


@dataclass(frozen=True)
class TaskChannel:
    """The packets, in the order in which they were posted; those archived stay."""

    packets: Mapping[PacketId, Packet] = field(default_factory=lambda: MappingProxyType({}))

    def post(self, number: PacketId, assignee: str) -> "TaskChannel":
        """With a new packet.

        Raises:
            ChannelError: there is one with this id.
        """
        if number in self.packets:
            raise ChannelError(f"packet {tuple(number)} was posted before; a packet is posted once.")
        return TaskChannel(MappingProxyType({**self.packets, number: Packet(number, assignee)}))

    def waiting(self, assignee: str) -> tuple[PacketId, ...]:
        """What can be claimed by a worker, oldest first."""
        return tuple(p.id for p in self.packets.values() if p.assignee == assignee and p.status is Status.SENT)

    def claim(self, number: PacketId, assignee: str) -> "TaskChannel":
        """A worker takes a packet, which nobody can take again.

        Raises:
            ChannelError: it is not there, is for another worker, or was claimed before.
        """
        owner = self._at(number, Status.SENT).assignee
        if owner != assignee:
            raise ChannelError(f"packet {tuple(number)} is for {owner!r}; {assignee!r} cannot claim it.")
        return self._moved(number, Status.PROCESSING)

    def give_back(self, number: PacketId) -> "TaskChannel":
        """The worker has finished, well or not.

        Raises:
            ChannelError: the packet is not being worked on.
        """
        self._at(number, Status.PROCESSING)
        return self._moved(number, Status.RETURNED)

    def archive(self, number: PacketId) -> "TaskChannel":
        """The publisher has read what came back.

        Raises:
            ChannelError: nothing came back.
        """
        self._at(number, Status.RETURNED)
        return self._moved(number, Status.ARCHIVED)

    def withdraw(self, task: int) -> "TaskChannel":
        """Without the packets of a task that nobody has claimed: its attempt is over."""
        kept = {key: p for key, p in self.packets.items() if key.task != task or p.status is not Status.SENT}
        return TaskChannel(MappingProxyType(kept))

    def count(self, status: Status) -> int:
        """Packets with this status."""
        return sum(packet.status is status for packet in self.packets.values())

    def _at(self, number: PacketId, status: Status) -> Packet:
        packet = self.packets.get(number)
        if packet is None or packet.status is not status:
            there = "not in the channel" if packet is None else packet.status.value
            raise ChannelError(f"packet {tuple(number)} is {there}; it must be {status.value}.")
        return packet

    def _moved(self, number: PacketId, status: Status) -> "TaskChannel":
        moved = dataclasses.replace(self.packets[number], status=status)
        return TaskChannel(MappingProxyType({**self.packets, number: moved}))
