"""Images whose file operations are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.patterns import stamp
from support.qed_image import Built

import qedcore
from qedcore.errors import QEDError
from unit.engine.tapped import BASE, CS, Image, Tapped
from unit.fakes import Hook, Tap, open_tapped


@pytest.fixture
def tapped(image: Image, tmp_path: Path) -> Iterator[Tapped]:
    opened = []

    def make(hook: Hook | None = None, backing: int = 0, **spec: Any) -> tuple[qedcore.QEDImage, Tap, Built]:
        """backing: bytes of a raw file under the image, 0 for none."""
        if backing:
            (tmp_path / "base.raw").write_bytes(stamp(BASE, 0, backing))
            spec |= {"backing": "base.raw", "no_probe": True}
        built = image(**spec)
        img, tap = open_tapped(built.path, hook)
        opened.append((img, tap))
        tap.log.clear()
        return img, tap, built

    yield make
    for img, tap in opened:
        tap.hook = None
        try:
            img.close()
        except QEDError:
            pass


@pytest.fixture
def dirty(tapped: Tapped) -> Tapped:
    """As tapped; the dirty period has begun, and the first tables are in the cache."""

    def make(**spec: Any) -> tuple[qedcore.QEDImage, Tap, Built]:
        img, tap, built = tapped(**spec)
        img.pwrite(b"first", 100 * CS)
        tap.log.clear()
        return img, tap, built

    return make
