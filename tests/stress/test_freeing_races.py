"""Threads that write, zero, trim and read at once, while freed clusters are punched and used again.

Each thread owns every n-th cluster and knows what is in its own.  Everybody reads everything: a sector holds zeros or
a stamp with its own number, whatever happens to its cluster meanwhile.  A reader under which a cluster was reused
would see another sector's stamp, and a writer would put its own where it does not belong.
"""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest
from stress.images import make_image, verify_metadata

import qedcore
from qedcore.engine.cluster_map import FOUND
from qedcore.maintenance.tidy import tidy

pytestmark = pytest.mark.usefixtures("frequent_switches")

KiB, MiB = 1024, 1024 * 1024
SECTOR = 512
THREADS = 8
OPERATIONS = 250  # per thread
STAMP = struct.Struct("<QQ")  # sector number, write number


def stamped(sector: int, n: int, number: int) -> bytes:
    return b"".join(STAMP.pack(s, number) * (SECTOR // STAMP.size) for s in range(sector, sector + n))


def run(path: Path, seed: str, cluster_size: int, size: int, base: bytes) -> None:
    """The workload; AssertionError at the first wrong byte."""
    per_cluster = cluster_size // SECTOR
    clusters = size // cluster_size
    empty = bytes(cluster_size)
    model = [base[c * cluster_size :][:cluster_size].ljust(cluster_size, b"\0") for c in range(clusters)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def check_sectors(data: bytes, sector: int) -> None:
        for at in range(0, len(data), STAMP.size):
            found, number = STAMP.unpack_from(data, at)
            own = sector + at // SECTOR
            assert (found, number) == (0, 0) or found == own, f"sector {own} shows {found}, write {number}"

    def owner(thread: int) -> None:
        rng = random.Random(f"{seed}/{thread}")
        mine = range(thread, clusters, THREADS)
        for count in range(OPERATIONS):
            cluster = rng.choice(mine)
            pos, choice = cluster * cluster_size, rng.random()
            if choice < 0.4:
                start = rng.randrange(per_cluster)
                n = rng.randrange(1, per_cluster - start + 1)
                data = stamped(cluster * per_cluster + start, n, count << 8 | thread)
                image.pwrite(data, pos + start * SECTOR)
                at = start * SECTOR
                model[cluster] = model[cluster][:at] + data + model[cluster][at + len(data) :]
            elif choice < 0.55:
                kind, _, _ = image.lookup(pos, cluster_size)  # nobody else changes it
                image.trim(pos, cluster_size)
                if kind is FOUND:
                    model[cluster] = empty
                assert image.pread(cluster_size, pos) == model[cluster], f"cluster {cluster} of thread {thread}"
            elif choice < 0.7:
                image.zero(pos, cluster_size, may_trim=choice < 0.66)
                model[cluster] = empty
            elif choice < 0.78:
                image.flush()
            else:
                assert image.pread(cluster_size, pos) == model[cluster], f"cluster {cluster} of thread {thread}"

    def reader(thread: int) -> None:
        rng = random.Random(f"{seed}/reader {thread}")
        while not stop.is_set():
            sector = rng.randrange(size // SECTOR - 2 * per_cluster)
            check_sectors(image.pread(rng.choice((1, 3, 2 * per_cluster)) * SECTOR, sector * SECTOR), sector)

    def body(work: object, number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)
            stop.set()

    with qedcore.open_image(path, l2_cache=0) as image:
        owners = [threading.Thread(target=body, args=(owner, n)) for n in range(THREADS)]
        readers = [threading.Thread(target=body, args=(reader, n)) for n in range(3)]
        for thread in owners + readers:
            thread.start()
        for thread in owners:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
        if errors:
            raise errors[0]
        assert not image._requests._in_flight.now
        content = image.pread(size, 0)
        assert content == b"".join(model)
        tidy(image)
        assert image.pread(size, 0) == content
    with qedcore.open_image(path, writable=False) as image:
        assert image.pread(size, 0) == content


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("geometry", [(4 * KiB, 1, MiB), (4 * KiB, 2, 6 * MiB), (64 * KiB, 4, 6 * MiB)], ids=str)
def test_readers_race_freeing_and_reuse(
    tmp_path: Path, geometry: tuple[int, int, int], backing: bool, seed: str
) -> None:
    cluster_size, table_size, size = geometry
    base = stamped(0, size // 2 // SECTOR, 1 << 40) if backing else b""
    path = make_image(tmp_path, cluster_size, table_size, size, base)
    run(path, seed, cluster_size, size, base)
    verify_metadata(path, table_size)
