"""Rehearsal: what is written shows, what is below stays, and holes are known."""

from __future__ import annotations

import random
from pathlib import Path

from support.patterns import GiB, KiB

from qedcore.storage.file import FAR, FileStorage
from qedcore.storage.overlay import Rehearsal


def test_against_a_bytearray(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "file"
    for _ in range(20):
        model = bytearray(64 * KiB)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(60 * KiB)
            model[at : at + 5000] = rng.randbytes(5000)[: len(model) - at]
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.truncate(len(model))
            for at in range(0, len(model), 4 * KiB):  # the rest are holes
                if any(model[at : at + 4 * KiB]):
                    file.seek(at)
                    file.write(model[at : at + 4 * KiB])
        before = path.read_bytes()
        below = FileStorage(path, writable=False)
        storage = Rehearsal(below)
        for _ in range(50):
            at = rng.randrange(80 * KiB)
            if rng.randrange(4):
                data = rng.randbytes(rng.randrange(1, 6000))
                storage.pwrite(data, at)
                model[len(model) :] = bytes(max(at + len(data) - len(model), 0))
                model[at : at + len(data)] = data
            else:
                storage.truncate(at)
                model[at:] = b""
                model[len(model) :] = bytes(at - len(model))
            assert storage.size() == len(model)
            found = bytearray(100 * KiB)
            storage.pread_into(found, 0)
            assert found == model.ljust(len(found), b"\0")
            at = rng.randrange(100 * KiB)
            data_at = storage.next_data(at)
            assert data_at >= at and not any(model[at:data_at])
        below.close()
        assert path.read_bytes() == before


def test_holes_are_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1024 * GiB)
        file.seek(512 * GiB)
        file.write(b"data")
    storage = Rehearsal(FileStorage(path, writable=False))
    assert storage.next_data(0) == 512 * GiB and storage.next_data(513 * GiB) == FAR
    storage.pwrite(b"x", 600 * GiB + 5)
    assert storage.next_data(513 * GiB) == 600 * GiB
    storage.truncate(100 * GiB)
    assert storage.next_data(0) == FAR
