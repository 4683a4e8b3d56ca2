"""Trim, zero and fast zero through NBD: what becomes free, what a client sees, and that QEMU agrees."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, QedFile
from support.server import Nbdkit, import_nbd

Serve = Callable[..., Nbdkit]
CS = 64 * KiB
Image = Callable[..., Built]


def status(client: Any, length: int, pos: int = 0) -> list[tuple[int, int]]:
    """(bytes, flags) of the base:allocation runs of a range."""
    found: list[tuple[int, int]] = []

    def extent(context: str, offset: int, entries: list[int], error: int) -> None:
        found.extend(zip(entries[::2], entries[1::2]))

    client.block_status(length, pos, extent)
    return found


def on_disk(path: str) -> int:
    return os.stat(path).st_blocks * 512


HOLE = 3  # NBD_STATE_HOLE | NBD_STATE_ZERO


@pytest.fixture
def full(image: Image) -> Built:
    """100 clusters of data."""
    return image(layout=dict.fromkeys(range(100), "data"), size=100 * CS)


def test_what_is_offered(full: Built, serve: Serve) -> None:
    server = serve(full.path)
    client = server.connect(meta=True)
    assert client.can_trim() and client.can_zero() and client.can_fast_zero()
    client.shutdown()
    server.stop()
    reader = serve(full.path, read_only=True).connect(meta=True)
    assert not reader.can_trim() and not reader.can_zero()
    reader.shutdown()


def test_trim_gives_the_space_back(full: Built, serve: Serve) -> None:
    server = serve(full.path)
    client = server.connect(meta=True)
    before = on_disk(full.path)
    client.trim(50 * CS, 10 * CS + 100)  # 49 whole clusters
    client.flush()
    assert before - on_disk(full.path) >= 48 * CS  # the file system may have rounded
    assert status(client, 100 * CS) == [(11 * CS, 0), (49 * CS, HOLE), (40 * CS, 0)]
    assert_same(client.pread(11 * CS, 0), full.read(0, 11 * CS))
    assert client.pread(49 * CS, 11 * CS) == bytes(49 * CS)
    assert_same(client.pread(40 * CS, 60 * CS), full.read(60 * CS, 40 * CS))
    client.shutdown()
    server.stop()
    # What lay behind has moved into the holes.
    qemu.assert_check_clean(full.path)
    assert os.path.getsize(full.path) == full.end - 49 * CS
    with QedFile(full.path) as file:
        assert file.read(0, 11 * CS) == full.read(0, 11 * CS)
        assert file.read(60 * CS, 40 * CS) == full.read(60 * CS, 40 * CS)


@pytest.mark.parametrize("no_hole", [False, True])
def test_zero_with_and_without_holes(full: Built, serve: Serve, no_hole: bool) -> None:
    server = serve(full.path)
    client = server.connect(meta=True)
    client.zero(10 * CS, 0, import_nbd().CMD_FLAG_NO_HOLE if no_hole else 0)
    assert client.pread(10 * CS, 0) == bytes(10 * CS)
    assert status(client, 100 * CS) == ([(100 * CS, 0)] if no_hole else [(10 * CS, HOLE), (90 * CS, 0)])
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(full.path)
    assert os.path.getsize(full.path) == full.end - (0 if no_hole else 10 * CS)


def test_fast_zero(full: Built, serve: Serve) -> None:
    """Succeeds where whole clusters are freed; fails, and changes nothing, where data would be written."""
    client = serve(full.path).connect(meta=True)
    client.zero(2 * CS, CS, import_nbd().CMD_FLAG_FAST_ZERO)
    assert client.pread(2 * CS, CS) == bytes(2 * CS)
    for length, pos, flags in ((CS, 5 * CS + 512, 0), (CS, 5 * CS, import_nbd().CMD_FLAG_NO_HOLE), (512, 5 * CS, 0)):
        with pytest.raises(import_nbd().Error) as caught:
            client.zero(length, pos, import_nbd().CMD_FLAG_FAST_ZERO | flags)
        assert caught.value.errnum == errno.ENOTSUP
    assert_same(client.pread(97 * CS, 3 * CS), full.read(3 * CS, 97 * CS))
    client.shutdown()


def test_requests_that_change_nothing_leave_the_image_alone(image: Image, serve: Serve) -> None:
    built = image(layout="D-Z", size=8 * CS)
    server = serve(built.path)
    client = server.connect(meta=True)
    content = Path(built.path).read_bytes()
    client.trim(7 * CS, CS)
    client.zero(7 * CS, CS)
    client.trim(CS - 1, 1)
    assert Path(built.path).read_bytes() == content  # not even NEED_CHECK
    client.shutdown()


@pytest.mark.parametrize("command", ["trim", "zero"])
def test_fua(full: Built, serve: Serve, command: str) -> None:
    """After it, a kill loses nothing, and the space is free in the same way."""
    server = serve(full.path)
    client = server.connect(meta=True)
    getattr(client, command)(50 * CS, 0, import_nbd().CMD_FLAG_FUA)
    server.kill()
    with QedFile(full.path) as file:
        assert file.read(0, 50 * CS) == bytes(50 * CS)
        assert file.read(50 * CS, 50 * CS) == full.read(50 * CS, 50 * CS)
        assert not file.verify().errors


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_fill_trim_ten_times(tmp_path: Path, image: Image, serve: Serve, rng: random.Random, backing: bool) -> None:
    """Through the server: the file does not grow beyond one fill and 5 %, and every byte is right."""
    size = 24 * MiB
    (tmp_path / "base.raw").write_bytes(stamp(1, 0, size))
    built = image(size=size, backing="base.raw" if backing else None)
    server = serve(built.path)
    client = server.connect(meta=True)
    limit = 0
    for turn in range(10):
        places = list(range(0, size, MiB))
        rng.shuffle(places)
        for pos in places:
            client.pwrite(stamp(turn + 2, pos, MiB), pos)
        assert_same(client.pread(MiB, places[0]), stamp(turn + 2, places[0], MiB))
        used = on_disk(built.path)
        limit = limit or int(used * 1.05)
        assert used <= limit
        client.trim(size, 0)
        client.flush()
        assert client.pread(size, 0) == bytes(size)
        assert on_disk(built.path) < 2 * MiB
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(built.path)
    assert os.path.getsize(built.path) < 2 * MiB
