"""Many threads on one image, with an exact oracle.

Two workloads.  *Interleaved*: each thread owns every n-th sector, so that all threads allocate, fill and zero the
same clusters, and every read of an own sector must give exactly what was last written.  *Overlapping*: any thread
writes anywhere; each sector carries a stamp of its position and write, so that a read of anything but a whole legal
write shows, and at the end no sector may hold a write that another one overwrote.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from stress.images import make_image, verify_metadata

import qedcore

pytestmark = pytest.mark.usefixtures("frequent_switches")

KiB, MiB = 1024, 1024 * 1024
SECTOR = 512
THREADS = 8
OPERATIONS = 120  # per thread
STAMP = struct.Struct("<QQ")  # sector number, write number

# cluster_size, table_size, image size: several L2 tables where the image is worth it
GEOMETRIES = [
    (4 * KiB, 1, 12 * MiB),
    (4 * KiB, 2, 12 * MiB),
    (64 * KiB, 4, 24 * MiB),
    (64 * KiB, 16, 24 * MiB),
    (1 * MiB, 2, 64 * MiB),
]


def run_threads(work: Callable[[int], None]) -> None:
    """Run work(0) ... work(THREADS - 1) at once; the first error fails the test."""
    errors: list[BaseException] = []

    def body(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def base_sector(sector: int) -> bytes:
    return STAMP.pack(sector, 1 << 40) * (SECTOR // STAMP.size)


def make(tmp_path: Path, geometry: tuple[int, int, int], backing: bool) -> tuple[Path, int]:
    """An empty image of the geometry, over a shorter backing file of stamped sectors if wanted; its backing size."""
    cluster_size, table_size, size = geometry
    base_size = size // 2 + 3 * SECTOR if backing else 0
    base = b"".join(map(base_sector, range(base_size // SECTOR)))
    return make_image(tmp_path, cluster_size, table_size, size, base), base_size


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0] // KiB}k-{g[1]}")
def test_interleaved(tmp_path: Path, geometry: tuple[int, int, int], backing: bool, seed: str) -> None:
    path, base_size = make(tmp_path, geometry, backing)
    size = geometry[2]
    sectors = size // SECTOR
    model: list[bytes] = [
        base_sector(sector) if sector * SECTOR < base_size else bytes(SECTOR) for sector in range(sectors)
    ]
    # A few regions, so that threads really meet; the last one ends with the device.
    width = 256
    starts = [random.Random(seed).randrange(sectors - width) for _ in range(12)] + [sectors - width]

    def work(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        for count in range(OPERATIONS):
            start = rng.choice(starts)
            own = [sector for sector in range(start, start + width) if sector % THREADS == number]
            sector = rng.choice(own)
            pos = sector * SECTOR
            choice = rng.random()
            if choice < 0.55:
                data = STAMP.pack(sector, count << 8 | number) * (SECTOR // STAMP.size)
                image.pwrite(data, pos, fua=choice < 0.02)
                model[sector] = data
            elif choice < 0.7:
                # Part of a sector: the rest of it must stay.
                at, data = rng.randrange(SECTOR), rng.randbytes(rng.randrange(1, 40))
                data = data[: SECTOR - at]
                image.pwrite(data, pos + at)
                model[sector] = model[sector][:at] + data + model[sector][at + len(data) :]
            elif choice < 0.78:
                image.zero(pos, SECTOR)
                model[sector] = bytes(SECTOR)
            elif choice < 0.8:
                image.flush()
            else:
                assert image.pread(SECTOR, pos) == model[sector], f"sector {sector} of thread {number}"

    with qedcore.open_image(path, l2_cache=0) as image:  # the smallest cache: tables come and go
        run_threads(work)
        content = image.pread(size, 0)
        assert content == b"".join(model)
    verify_metadata(path, geometry[1])
    with qedcore.open_image(path, writable=False) as image:
        assert image.pread(size, 0) == content


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0] // KiB}k-{g[1]}")
def test_overlapping(tmp_path: Path, geometry: tuple[int, int, int], backing: bool, seed: str) -> None:
    path, base_size = make(tmp_path, geometry, backing)
    cluster_size, _, size = geometry
    sectors = size // SECTOR
    clock_lock = threading.Lock()
    clock = 0
    # sector -> [(when its write began, when it ended, write number)]; number 0 is zeros
    writes: dict[int, list[tuple[int, int, int]]] = {}

    def tick() -> int:
        nonlocal clock
        with clock_lock:
            clock += 1
            return clock

    def expected_before(sector: int) -> int:
        return 1 << 40 if sector * SECTOR < base_size else 0

    def whole_write(sector: int, data: bytes) -> int:
        """The number of the write that the sector holds; it must be a whole one, of this sector."""
        found, number = STAMP.unpack(data[: STAMP.size])
        if data == bytes(SECTOR):
            return 0
        assert found == sector, f"sector {sector} holds data of sector {found}"
        assert data == data[: STAMP.size] * (SECTOR // STAMP.size), f"sector {sector} mixes two writes"
        return int(number)

    def work(thread: int) -> None:
        rng = random.Random(f"{seed}/{thread}")
        for count in range(OPERATIONS):
            number = (count + 1) << 8 | thread
            start = rng.choice((rng.randrange(sectors), rng.randrange(min(sectors, 4 * cluster_size // SECTOR))))
            n = min(rng.choice((1, 2, 7, 8, cluster_size // SECTOR, 2 * cluster_size // SECTOR + 1)), sectors - start)
            n = min(n, 600)
            if rng.random() < 0.7:
                data = b"".join(STAMP.pack(s, number) * (SECTOR // STAMP.size) for s in range(start, start + n))
                began = tick()
                if rng.random() < 0.2:
                    number = 0
                    image.zero(start * SECTOR, n * SECTOR)
                else:
                    image.pwrite(data, start * SECTOR)
                ended = tick()
                with clock_lock:
                    for s in range(start, start + n):
                        writes.setdefault(s, []).append((began, ended, number))
            else:
                data = image.pread(n * SECTOR, start * SECTOR)
                for i in range(n):
                    sector = data[i * SECTOR : (i + 1) * SECTOR]
                    # Two words are written by one store or two, never by halves of a word.
                    for at in range(0, SECTOR, STAMP.size):
                        found, got = STAMP.unpack_from(sector, at)
                        assert (found, got) == (0, 0) or found == start + i, f"sector {start + i} shows {found}"

    with qedcore.open_image(path, l2_cache=0) as image:
        run_threads(work)
        for sector in range(sectors):
            number = whole_write(sector, image.pread(SECTOR, sector * SECTOR))
            history = writes.get(sector, [])
            if not history:
                assert number == expected_before(sector), f"sector {sector} was never written"
                continue
            ends = [ended for _, ended, written in history if written == number]
            assert ends, f"sector {sector} holds write {number:#x}, which was not to it"
            assert not any(began > max(ends) for began, _, _ in history), f"sector {sector}: a later write was lost"
    verify_metadata(path, geometry[1])
