"""A filter of system calls for programs that only compute: no process or thread, no socket, no memory beyond limits.

A limit on processes does not hold for root; a filter does. It is a program of the kernel's packet filter (seccomp(2)),
which bubblewrap loads: wrong architecture, kill; a forbidden call, EPERM; else go on.
"""

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Machine(NamedTuple):
    """What the kernel calls an architecture, and its numbers of the forbidden calls."""

    audit: int
    calls: Mapping[str, int]


_X86_64 = {
    # Processes and threads.
    "clone": 56, "fork": 57, "vfork": 58, "clone3": 435,
    # The network; io_uring opens sockets without the call that does.
    "socket": 41, "socketpair": 53, "io_uring_setup": 425,
    # Memory that no limit of a process counts.
    "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "io_setup": 206,
    # Ways out, and into other processes.
    "unshare": 272, "setns": 308, "mount": 165, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250,
}  # fmt: skip
_AARCH64 = {
    "clone": 220, "clone3": 435,
    "socket": 198, "socketpair": 199, "io_uring_setup": 425,
    "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
    "io_setup": 0,
    "unshare": 97, "setns": 268, "mount": 40, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
    "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219,
}  # fmt: skip
MACHINES = MappingProxyType({"x86_64": Machine(0xC000003E, _X86_64), "aarch64": Machine(0xC00000B7, _AARCH64)})
"""By the name that `platform.machine` gives."""

LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, ALLOW, DENY = 0x80000000, 0x7FFF0000, 0x00050001
OTHER_ABI = 0x40000000
"""Numbers of the x32 ABI of the same architecture; nothing on aarch64."""


def filter_program(machine: str) -> bytes:
    """The filter, as seccomp takes it.

    Args:
        machine: a key of `MACHINES`.
    """
    audit, calls = MACHINES[machine]
    numbers = sorted(calls.values())
    program = [
        (LOAD, 0, 0, 4),  # the architecture
        (EQUAL, 1, 0, audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number of the call
        (AT_LEAST, len(numbers) + 1, 0, OTHER_ABI),
        # Each jumps over those behind it and over what allows.
        *((EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, DENY),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def decide(program: bytes, *, audit: int, number: int) -> int:
    """What a filter of these instructions says of a call, as the kernel reads it.

    Args:
        program: see `filter_program`.
        audit: architecture of the caller.
        number: of the call.
    """
    instructions = [struct.unpack_from("=HBBI", program, place) for place in range(0, len(program), 8)]
    place, loaded = 0, 0
    while True:
        code, then, otherwise, value = instructions[place]
        if code == RETURN:
            return value
        if code == LOAD:
            loaded, jump = (number if value == 0 else audit), 0
        else:
            jump = then if (loaded == value if code == EQUAL else loaded >= value) else otherwise
        place += 1 + jump
