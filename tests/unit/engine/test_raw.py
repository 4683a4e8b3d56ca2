"""Raw files in a chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built

import qedcore
from qedcore.errors import UnsupportedError

Image = Callable[..., Built]


CS = 64 * KiB


def test_part_of_a_raw_file(image: Image, tmp_path: Path) -> None:
    base = raw(tmp_path / "base", 3 * CS).read_bytes()
    options = {"driver": "raw", "offset": 1000, "size": CS + 5, "file": {"driver": "file", "filename": "base"}}
    with qedcore.open_image(image(backing=f"json:{json.dumps(options)}").path, writable=False) as img:
        assert_same(img.pread(2 * CS, 0), base[1000 : 1000 + CS + 5] + bytes(CS - 5))
        assert_same(img.pread(100, 50), base[1050:1150])
    del options["size"]
    with qedcore.open_image(image(backing=f"json:{json.dumps(options)}").path, writable=False) as img:
        assert_same(img.pread(3 * CS, 0), base[1000:] + bytes(1000))
    for wrong in ({"offset": 3 * CS + 1}, {"offset": 0, "size": 3 * CS + 1}, {"offset": -1}, {"size": -1}):
        built = image(backing=f"json:{json.dumps({**options, **wrong})}")
        with pytest.raises(UnsupportedError, match=f"has {3 * CS} bytes"):
            qedcore.open_image(built.path)


def raw(path: Path, size: int = MiB, start: bytes = b"") -> Path:
    path.write_bytes(start + stamp(9, 0, size)[len(start) :])
    return path
