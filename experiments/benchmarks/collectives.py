"""What a compiled program sends between devices, read off its text."""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
"""Of dtypes whose name does not end in them."""

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)(?:e\w+)?\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """How often a kind runs in one step, and the bytes of its results on one device; a loop's as often as it runs."""

    count: int
    bytes: int


def size_of(text: str) -> int:
    """Bytes of the largest array of a result's type; an asynchronous one lists operand and result."""
    sizes = []
    for dtype, shape in ARRAY.findall(text):
        bits = BITS.get(dtype) or int(dtype[1:])
        sizes.append(math.prod(int(size) for size in shape.split(",") if size) * bits // 8)
    return max(sizes, default=0)


def collectives(text: str) -> dict[str, Collective]:
    """Collectives of an optimised HLO module, by kind; loops whose length it does not say count once.

    What the compiler has fused into an all-reduce that keeps its own part alone counts as a reduce-scatter.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    callers: dict[str, list[tuple[str, int]]] = {}
    entry = current = ""
    for line in text.splitlines():
        if (start := COMPUTATION.match(line)) is not None:
            current = start[2]
            entry = current if start[1] else entry
            found[current] = []
            continue
        made = INSTRUCTION.match(line)
        if made is None:
            continue
        kind = made[2].removesuffix("-start")
        if kind in KINDS:
            kind = "reduce-scatter" if current.startswith("all-reduce-scatter") else kind
            found[current].append((kind, size_of(made[1])))
        trips = int(trip[1]) if made[2] == "while" and (trip := TRIPS.search(line)) is not None else 1
        names = CALLED.findall(line) + [name for one in BRANCHES.findall(line) for name in re.findall(r"[\w.\-]+", one)]
        for name in names:
            callers.setdefault(name, []).append((current, trips))

    times: dict[str, int] = {}

    def runs(name: str) -> int:
        if name not in times:
            times[name] = 1 if name == entry else sum(trips * runs(caller) for caller, trips in callers.get(name, []))
        return times[name]

    sums: dict[str, Collective] = {}
    for name, inside in found.items():
        for kind, size in inside:
            before = sums.get(kind, Collective(0, 0))
            sums[kind] = Collective(before.count + runs(name), before.bytes + runs(name) * size)
    return dict(sorted(sums.items()))
