"""What a scan finds, and what the tables say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.qed_image import Built, QedFile

from qedcore.check.scan import Damage, Scan, ScanResult
from qedcore.format.header import read_header
from qedcore.storage.file import FileStorage

Image = Callable[..., Built]


def scan(path: Path) -> tuple[ScanResult, list[Damage]]:
    """What is found, and the damage in the order of guest positions."""
    damage: list[Damage] = []
    storage = FileStorage(path, writable=False)
    try:
        header, geometry, bounds = read_header(storage)
        target = Scan(storage, geometry, bounds, header.l1_table_offset, report=damage.append, vectors=False)
        return target.run(), sorted(damage, key=lambda found: found.pos)
    finally:
        storage.close()


def entries(path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """Nonzero L1 entries, and L2 entries by guest cluster where there is a table."""
    with QedFile(path) as file:
        first = file.header["header_size"] * file.geometry.cluster_size
        found = {}
        for index, offset in file.l1.items():
            aligned = offset % file.geometry.cluster_size == 0
            if aligned and first <= offset <= file.length - file.geometry.table_bytes:
                for slot, value in file.l2_table(offset).items():
                    found[index * file.geometry.entries + slot] = value
        return dict(file.l1), found
