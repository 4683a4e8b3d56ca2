"""Images with every kind of damage, and what is wrong in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from support.patterns import GiB, KiB, MiB

CS = 64 * KiB
REACH = 2 * GiB  # of one L2 table at the default geometry


@dataclass(frozen=True)
class Bad:
    """A damaged entry that the scan must find: guest position, table and kind."""

    table: str
    pos: int
    kind: str  # "crash" (past the end), "shared" or "wild"


def kind_of(damage: Any) -> str:
    return "shared" if damage.shared else "crash" if damage.past_end else "wild"


# name -> (spec, damage in the order of guest positions)
DAMAGED: dict[str, tuple[dict[str, Any], list[Bad]]] = {
    "L2 at the end": ({"layout": "D", "entries": {1: lambda b: b.end}}, [Bad("L2", CS, "crash")]),
    "L2 far past the end": ({"layout": "D", "entries": {7: 1 << 40}}, [Bad("L2", 7 * CS, "crash")]),
    "L2 at 2**64 - 1 cluster": ({"entries": {0: 2**64 - CS}}, [Bad("L2", 0, "crash")]),
    "L2 unaligned": ({"layout": "D", "entries": {1: 6 * CS + 512}}, [Bad("L2", CS, "wild")]),
    "L2 unaligned past the end": ({"entries": {1: (1 << 40) + 1}}, [Bad("L2", CS, "wild")]),
    "L2 is 2": ({"entries": {0: 2}}, [Bad("L2", 0, "wild")]),
    "L2 in the header": ({"header_size": 2, "entries": {0: CS}}, [Bad("L2", 0, "wild")]),
    "L2 in the L1 table": ({"entries": {0: 4 * CS}}, [Bad("L2", 0, "shared")]),
    "L2 in its own table": ({"entries": {0: lambda b: b.l2_offsets[0] + CS}}, [Bad("L2", 0, "shared")]),
    "two L2 on one cluster": ({"layout": "D", "entries": {9: lambda b: b.offsets[0]}}, [Bad("L2", 9 * CS, "shared")]),
    "last entry of a table": (
        {"size": 4 * GiB, "layout": {32768: "data"}, "entries": {32767: lambda b: b.end}},
        [Bad("L2", REACH - CS, "crash")],
    ),
    "past the end of the device": (
        {"size": 2 * CS, "layout": "D", "entries": {30000: lambda b: b.offsets[0], 30001: 3}},
        [Bad("L2", 30000 * CS, "shared"), Bad("L2", 30001 * CS, "wild")],
    ),
    "L1 at the end": ({"size": 4 * GiB, "l1_entries": {1: lambda b: b.end}}, [Bad("L1", REACH, "crash")]),
    "L1 straddles the end": (
        {"size": 4 * GiB, "leaks": 3, "l1_entries": {1: lambda b: b.end - 3 * CS}},
        [Bad("L1", REACH, "crash")],
    ),
    "L1 ends with the file": ({"size": 4 * GiB, "leaks": 4, "l1_entries": {1: lambda b: b.end - 4 * CS}}, []),
    "L1 at 2**64 - 1 table": ({"l1_entries": {0: 2**64 - 4 * CS}}, [Bad("L1", 0, "crash")]),
    "L1 is 1": ({"layout": "", "l1_entries": {0: 1}}, [Bad("L1", 0, "wild")]),
    "L1 unaligned": ({"layout": "D", "l1_entries": {1: 6 * CS + 8}}, [Bad("L1", REACH, "wild")]),
    "L1 in the header": ({"header_size": 2, "l1_entries": {5: CS}}, [Bad("L1", 5 * REACH, "wild")]),
    "L1 on the L1 table": ({"l1_entries": {0: CS}}, [Bad("L1", 0, "shared")]),
    "two L1 on one table": (
        {"size": 4 * GiB, "layout": "D", "l1_entries": {1: lambda b: b.l2_offsets[0]}},
        [Bad("L1", REACH, "shared")],
    ),
    "L1 overlaps a table": (
        {"size": 4 * GiB, "layout": "D", "leaks": 4, "l1_entries": {1: lambda b: b.l2_offsets[0] + CS}},
        [Bad("L1", REACH, "shared")],
    ),
    "L1 on data": (
        {"size": 4 * GiB, "layout": "D", "l1_entries": {1: lambda b: b.offsets[0]}},
        [Bad("L2", 0, "shared"), Bad("L1", REACH, "shared")],
    ),
    "L1 past the end of the device": ({"size": CS, "l1_entries": {9: 1 << 40}}, [Bad("L1", 9 * REACH, "crash")]),
    "data on a table that comes later": (
        {"size": 4 * GiB, "layout": {0: "data", 32768: "data"}, "entries": {1: lambda b: b.l2_offsets[1] + CS}},
        [Bad("L2", CS, "shared")],  # tables come first
    ),
    "in a later slice": (
        {
            "cluster_size": MiB,
            "table_size": 2,
            "size": 1 << 40,
            "layout": {0: "data"},
            "entries": {131071: 5, 131072: lambda b: b.offsets[0], 262143: lambda b: b.end},
        },
        [Bad("L2", 131071 * MiB, "wild"), Bad("L2", 131072 * MiB, "shared"), Bad("L2", 262143 * MiB, "crash")],
    ),
    "clusters at multiples of cluster_size - 1": (  # QEMU misses a table that straddles one (B12)
        {
            "cluster_size": 4096,
            "table_size": 2,
            "size": 2 * 4 * MiB,
            "layout": dict.fromkeys(range(1024), "data"),
            "leaks": 3200,
            "l1_entries": {1: 4094 * 4096},
            "entries": {5: 4095 * 4096},
        },
        [Bad("L2", 5 * 4096, "shared")],
    ),
    "several": (
        {"layout": "DD", "entries": {2: 7, 3: lambda b: b.end, 4: lambda b: b.offsets[1]}},
        [Bad("L2", 2 * CS, "wild"), Bad("L2", 3 * CS, "crash"), Bad("L2", 4 * CS, "shared")],
    ),
}
