"""The scan of all tables, on images of the independent builder."""

from __future__ import annotations

from typing import Any

import pytest
from support.patterns import GiB, MiB
from support.qed_image import QedFile, assert_sound

from unit.check.damaged import CS, DAMAGED, Bad, kind_of
from unit.check.scanned import Image, scan

SOUND: dict[str, dict[str, Any]] = {
    "empty": {},
    "data": {"layout": "DDD"},
    "mixed": {"layout": "D-ZZ-DD"},
    "reversed": {"layout": "DDDD", "reverse": True},
    "several tables": {"size": 8 * GiB, "layout": {0: "data", 32767: "data", 32768: "data", 100000: "zero"}},
    "L1 last": {"layout": "DD", "l1_last": True},
    "header of 3": {"layout": "D", "header_size": 3},
    "table of 1": {"cluster_size": 4096, "table_size": 1, "layout": {0: "data", 511: "data", 512: "data"}},
    "past the end of the device": {"size": 2 * CS, "layout": "DDDD"},
    "leaks": {"layout": "D", "leaks": 3},
    "several slices": {
        "cluster_size": MiB,
        "table_size": 2,
        "size": 1 << 40,
        "layout": {0: "data", 131071: "data", 131072: "zero", 200000: "data"},
    },
}


@pytest.mark.parametrize("name", SOUND)
def test_sound(image: Image, name: str) -> None:
    built = image(**SOUND[name])
    found, damage = scan(built.path)
    oracle = assert_sound(built.path, leaks=None)
    assert not damage and not found.corruptions
    assert found.allocated == oracle.allocated == len(built.offsets)
    assert found.leaks == len(oracle.leaks)
    assert found.end == built.end - built.spec.leaks * built.spec.cluster_size


# layout options -> data clusters that do not follow the one before
FRAGMENTED = (
    ({"layout": "DDD"}, 0),
    ({"layout": "D--D"}, 0),
    ({"layout": "DDDD", "reverse": True}, 3),
    ({"layout": "D-Z", "leaks": 3, "entries": {3: lambda b: b.end - CS}}, 1),
)


@pytest.mark.parametrize(("changes", "count"), FRAGMENTED)
def test_fragmented(image: Image, changes: dict[str, Any], count: int) -> None:
    assert scan(image(**changes).path)[0].fragmented == count


@pytest.mark.parametrize("name", DAMAGED)
def test_damage(image: Image, name: str) -> None:
    spec, bad = DAMAGED[name]
    built = image(**spec)
    before = built.path.read_bytes() if built.end < 32 * MiB else b""
    _, found = scan(built.path)
    assert [Bad(damage.table, damage.pos, kind_of(damage)) for damage in found] == bad
    with QedFile(built.path) as oracle:
        assert bool(oracle.verify().errors) is bool(bad)
        for damage in found:  # place and value are those in the file
            index, slot = divmod(damage.pos // built.spec.cluster_size, built.spec.geometry.entries)
            at = damage.table_offset
            want = (built.l1_offset, index) if damage.table == "L1" else (oracle.l1[index], slot)
            assert (at, damage.index) == want
            value = oracle.l1[index] if damage.table == "L1" else oracle.l2_table(at)[slot]
            assert damage.value == value
            text = str(damage)
            assert f"{damage.table} entry {damage.index} at {at + damage.index * 8:#x}" in text
            assert f"{value:#x}" in text and f"{damage.pos:#x}" in text and "\n" not in text
    assert not before or built.path.read_bytes() == before
