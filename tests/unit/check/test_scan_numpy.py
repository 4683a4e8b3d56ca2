"""With numpy the scan finds what it finds without."""

from __future__ import annotations

import importlib.util
import random
import struct
from pathlib import Path

import pytest
from support.patterns import KiB
from support.qed_image import Geometry, ImageSpec, QedFile, build

from qedcore.check.cluster_use import READ
from qedcore.check.scan import Blocks, Damage, Scan, ScanResult
from qedcore.format.header import read_header as read_qed_header
from qedcore.storage import Storage
from qedcore.storage.file import FileStorage

HAS_NUMPY = importlib.util.find_spec("numpy") is not None
CS = 4 * KiB
SMALL = {"cluster_size": CS, "table_size": 2}
E = Geometry(CS, 2).entries  # 1024: one L2 table maps 4 MiB


def scan(storage: Storage, vectors: bool | None = None) -> tuple[ScanResult, list[str], bytes]:
    """What is found, in words, and the map."""
    header, geometry, bounds = read_qed_header(storage)
    damage: list[Damage] = []
    target = Scan(storage, geometry, bounds, header.l1_table_offset, report=damage.append, vectors=vectors)
    result = target.run()
    return result, [str(d) for d in damage], bytes(byte & ~READ for byte in target.use.map[: target.use.clusters])


@pytest.mark.skipif(not HAS_NUMPY, reason="numpy is not installed")
def test_numpy_finds_the_same(tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables full of entries in any order, with and without damage: vectors, blocks and single entries agree."""
    entries, clusters = E, 3 * E
    header = ImageSpec(**SMALL, size=3 * E * CS)
    for damage in range(12):
        built = build(tmp_path / "a.qed", header)
        first = built.end + 3 * 2 * CS
        offsets = [first + n * CS for n in range(clusters)]
        if damage % 3:
            rng.shuffle(offsets)
        for _ in range(rng.randrange(damage + 1)):
            values = [0, 1, 2, rng.getrandbits(64), rng.choice(offsets), CS, first - CS, first + clusters * CS]
            offsets[rng.randrange(clusters)] = rng.choice([*values, rng.choice(offsets) | 1])
        with built.path.open("r+b") as f:
            f.truncate(first + clusters * CS)
            f.seek(CS)
            f.write(struct.pack("<3Q", *(built.end + i * 2 * CS for i in range(3))))
            f.seek(built.end)
            f.write(struct.pack(f"<{3 * entries}Q", *offsets))
        plain = scan(FileStorage(built.path, False), False)
        assert scan(FileStorage(built.path, False), True) == plain
        with monkeypatch.context() as patch:
            patch.setattr(Blocks, "claim", lambda *_: None)
            patch.setattr(Blocks, "claim_run", lambda *_: None)
            assert scan(FileStorage(built.path, False), False) == plain
        with QedFile(built.path) as oracle:
            report = oracle.verify()
        assert plain[0].corruptions == len(report.errors) or any(b & 1 and b & 2 for b in plain[2])


@pytest.mark.skipif(not HAS_NUMPY, reason="numpy is not installed")
@pytest.mark.parametrize("tables", [1, 31, 32, 33, 64, 65, 97])
def test_numpy_finds_the_same_in_many_tables(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, tables: int
) -> None:
    """Tables that are runs, shuffled, sparse, blank, or holes in the file: sound, and with one wrong entry."""
    monkeypatch.setattr("qedcore.check.scan_numpy._BATCH_ENTRIES", 32 * E)  # tables at once
    path = tmp_path / "a.qed"
    full = ["run", "run", "shuffled", "pieces"]
    for damaged, kinds in (False, full), (False, [*full, "sparse", "zeros", "blank", "hole"]), (True, full):
        built = build(path, ImageSpec(**SMALL, size=tables * E * CS))
        places = list(range(tables))
        rng.shuffle(places)
        data = built.end + tables * 2 * CS
        contents = []
        for number in range(tables):
            entries = [data + (number * E + n) * CS for n in range(E)]
            kind = rng.choice(kinds)
            if kind == "shuffled":
                rng.shuffle(entries)
            elif kind == "pieces":
                at = rng.randrange(E)
                entries = entries[at:] + entries[:at]
            elif kind == "sparse":
                entries = [rng.choice((0, 0, 1, entry)) for entry in entries]
            elif kind != "run":
                entries = [int(kind == "zeros")] * E
            contents.append((kind, entries))
        if damaged:
            kind, entries = rng.choice(contents)
            entries[rng.randrange(E)] = rng.choice([2, CS, data + rng.randrange(tables * E) * CS, data + 8, 1 << 60])
        with path.open("r+b") as f:
            f.truncate(data + tables * E * CS)
            f.seek(CS)
            f.write(struct.pack(f"<{tables}Q", *(built.end + place * 2 * CS for place in places)))
            for place, (kind, entries) in zip(places, contents):
                if kind != "hole" or any(entries):
                    f.seek(built.end + place * 2 * CS)
                    f.write(struct.pack(f"<{E}Q", *entries))
        plain = scan(FileStorage(path, False), False)
        assert scan(FileStorage(path, False), True) == plain
        with monkeypatch.context() as patch:
            patch.setattr(Blocks, "claim", lambda *_: None)
            patch.setattr(Blocks, "claim_run", lambda *_: None)
            assert scan(FileStorage(path, False), False) == plain
