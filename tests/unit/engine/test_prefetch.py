"""Prefetching through a chain."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.patterns import KiB, stamp

import qedcore
from qedcore.engine.prefetch import prefetch
from qedcore.storage.file import FileStorage
from unit.engine.tapped import CS, Image


def test_what_the_files_are_asked_for(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run where it is: in the image, in the file under it, and nowhere for zeros."""
    (tmp_path / "base.raw").write_bytes(stamp(9, 0, 3 * CS + KiB))
    built = image(layout="D-Z-D", size=5 * CS, backing="base.raw", no_probe=True)
    asked: list[tuple[str, int, int]] = []

    def note(storage: FileStorage, offset: int, length: int) -> None:
        asked.append((Path(storage.name).name, offset, length))

    monkeypatch.setattr(FileStorage, "prefetch", note)
    with qedcore.open_image(built.path, writable=False) as img:
        prefetch(img, 100, 5 * CS - 100)
    name = built.path.name
    assert asked == [
        (name, built.offsets[0] + 100, CS - 100),
        ("base.raw", CS, CS),
        ("base.raw", 3 * CS, KiB),
        (name, built.offsets[4], CS),
    ]
