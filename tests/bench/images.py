"""The image files, all in one directory.

A method for each kind of image; for_run() has one ready for one run.  Images that runs only read
or overwrite are made once, the others anew for each run.

    full     every cluster allocated, every cluster with bytes of its own
    copy     the same, to be overwritten
    target   empty, as large as "full"
    empty    so large that almost every random write meets a cluster of its own
    overlay  empty, over a raw backing file full of data
    sparse   1 % of the clusters of a huge image allocated, each alone, with data
    mapped   all clusters of a huge image allocated
    half     half of a huge image allocated, in runs of 1 to 31 clusters with 1 to 31 free ones between

and for the scale curves, of any size:

    spots    20 places allocated, together at most 40 GiB
    thin     every L2 table exists, with one cluster in each
    vacant   every L2 table of 20 places exists, with one cluster in each
    filled   the first part of every L2 table is filled

Where data does not matter, clusters are holes in the file: only the tables take space.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from support.qed_image import FIELDS, MAGIC, QedFile, pack_header

from bench.rows import CLUSTER, SPOTS, TABLE_SPAN, GiB, KiB, MiB, Row, TiB, amount, spot_length, spot_stride
from bench.servers import BenchError, NotHere, run

TABLE_CLUSTERS = 4
ENTRIES = TABLE_CLUSTERS * CLUSTER // 8  # of a table
CHUNK = 8 * MiB  # bytes
SHARED = ("full", "copy", "sparse", "mapped", "half")  # made once


@dataclass(frozen=True)
class Sizes:
    """Bytes of the guest devices."""

    full: int = GiB
    backing: int = 4 * GiB
    empty: int = 64 * GiB  # 32 L2 tables
    huge: int = TiB


class Images:
    def __init__(self, directory: Path, sizes: Sizes) -> None:
        self._dir = directory
        self.sizes = sizes
        self._made: dict[str, Path] = {}
        self._warm: set[Path] = set()

    @contextlib.contextmanager
    def for_run(self, row: Row, fmt: str) -> Iterator[Path]:
        """The image for one run.  A shared one is in the page cache; a new one is removed afterwards."""
        if row.image in SHARED:
            path = self.shared(row.image, fmt)
            self.warm(path)
            yield path
            sync(self._dir)  # overwrites
            return
        path = self._dir / f"new.{fmt}"
        try:
            if fmt == "raw":
                self._raw(path, self.size(row))
            else:
                getattr(self, f"_{row.image}")(path, row)
            sync(self._dir)
            yield path
        finally:
            path.unlink(missing_ok=True)
            sync(self._dir)  # no run pays for the dirty pages of the one before it

    def size(self, row: Row) -> int:
        """Bytes of the row's guest device."""
        sizes = self.sizes
        by_image = dict.fromkeys(("full", "copy", "target"), sizes.full)
        by_image.update(overlay=sizes.backing, empty=sizes.empty)
        return row.size or by_image.get(row.image, sizes.huge)

    def shared(self, kind: str, fmt: str = "qed") -> Path:
        """An image of a kind that is made once."""
        name = f"{kind}.{fmt}"
        if name not in self._made:
            path = self._dir / name
            getattr(self, f"_{kind}_{fmt}")(path)
            sync(self._dir)
            self._made[name] = path
        return self._made[name]

    def forget(self, kind: str) -> None:
        """Remove a shared image that no later row needs."""
        for name in [name for name in self._made if name.startswith(f"{kind}.")]:
            path = self._made.pop(name)
            path.unlink()
            self._warm.discard(path)

    def warm(self, path: Path) -> None:
        """Into the page cache, holes apart."""
        if path in self._warm:
            return
        buffer = bytearray(4 * MiB)
        with open(path, "rb", buffering=0) as f:
            for start, end in data_ranges(f.fileno()):
                f.seek(start)
                while f.tell() < end and f.readinto(buffer):
                    pass
        self._warm.add(path)

    # -- made once

    def _full_raw(self, path: Path) -> None:
        say(f"making the full image, {amount(self.sizes.full)}")
        write_noise(path, self.sizes.full)

    def _full_qed(self, path: Path) -> None:
        run("qemu-img", "convert", "-f", "raw", "-O", "qed", self.shared("full", "raw"), path)
        with QedFile(path) as image:
            report = image.verify()
        if report.errors or report.allocated != self.sizes.full // CLUSTER:
            raise BenchError(f"{path} is not full: {report}")

    def _copy_raw(self, path: Path) -> None:
        shutil.copyfile(self.shared("full", "raw"), path)

    def _copy_qed(self, path: Path) -> None:
        shutil.copyfile(self.shared("full", "qed"), path)

    def _backing_raw(self, path: Path) -> None:
        say(f"making the backing file, {amount(self.sizes.backing)}")
        write_noise(path, self.sizes.backing)

    def sparse_clusters(self) -> list[int]:
        """Guest cluster numbers."""
        clusters = self.sizes.huge // CLUSTER
        return sorted(random.Random(1).sample(range(clusters), clusters // 100))

    def _sparse_qed(self, path: Path) -> None:
        used = self.sparse_clusters()
        needed = len(used) * CLUSTER
        say(f"making the sparse image, {amount(self.sizes.huge)} with {amount(needed)} of data")
        self._require_space(needed)
        mapped_image(path, self.sizes.huge, ((cluster, 1) for cluster in used), data=True)

    def _mapped_qed(self, path: Path) -> None:
        say(f"making the tables of a full image of {amount(self.sizes.huge)}")
        mapped_image(path, self.sizes.huge, [(0, self.sizes.huge // CLUSTER)])

    def half_runs(self) -> list[tuple[int, int]]:
        """First cluster and number of clusters of each run."""
        rng = random.Random(1)
        runs = []
        at, clusters = 0, self.sizes.huge // CLUSTER
        while at < clusters:
            length = min(rng.randint(1, 31), clusters - at)
            runs.append((at, length))
            at += length + rng.randint(1, 31)
        return runs

    def _half_qed(self, path: Path) -> None:
        say(f"making the tables of a half allocated image of {amount(self.sizes.huge)}")
        mapped_image(path, self.sizes.huge, self.half_runs())

    # -- made for each run

    @staticmethod
    def _raw(path: Path, size: int) -> None:
        try:
            with open(path, "wb") as f:
                f.truncate(size)
        except OSError as e:
            if e.errno == errno.EFBIG:
                raise NotHere(f"a file of {amount(size)} is too large for this file system") from e
            raise

    def _empty(self, path: Path, row: Row) -> None:
        run("qemu-img", "create", "-q", "-f", "qed", path, str(self.size(row)))

    _target = _empty

    def _overlay(self, path: Path, row: Row) -> None:
        backing = self.shared("backing", "raw")
        self.warm(backing)
        run("qemu-img", "create", "-q", "-f", "qed", "-b", backing, "-F", "raw", path)

    def _spots(self, path: Path, row: Row) -> None:
        length = spot_length(row.size) // CLUSTER
        mapped_image(path, row.size, [(at, length) for at in self._spot_clusters(row.size)])

    def _vacant(self, path: Path, row: Row) -> None:
        # A place may begin in the middle of a table and end in the next one.
        tables = {
            at // ENTRIES + n
            for at in self._spot_clusters(row.size)
            for n in range((at % ENTRIES + spot_length(row.size) // CLUSTER - 1) // ENTRIES + 1)
        }
        mapped_image(path, row.size, self._one_in_each(row.size, sorted(tables)))

    def _thin(self, path: Path, row: Row) -> None:
        mapped_image(path, row.size, self._one_in_each(row.size, range(-(-row.size // TABLE_SPAN))))

    def _filled(self, path: Path, row: Row) -> None:
        filled = ENTRIES * row.fill // 100
        mapped_image(path, row.size, [(n * ENTRIES, filled) for n in range(row.size // TABLE_SPAN)])

    @staticmethod
    def _spot_clusters(size: int) -> list[int]:
        return [spot_stride(size) * n // CLUSTER for n in range(SPOTS)]

    @staticmethod
    def _one_in_each(size: int, tables: Iterable[int]) -> list[tuple[int, int]]:
        return [(table * ENTRIES + table % (min(size, TABLE_SPAN) // CLUSTER), 1) for table in tables]

    def _require_space(self, needed: int) -> None:
        """Raises BenchError if neither disk nor page cache would hold so much more data."""
        spare = GiB
        free = shutil.disk_usage(self._dir).free
        if free < needed + spare:
            raise NotHere(f"{self._dir} has {amount(free)} free, and {amount(needed + spare)} are needed")
        memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        available = int(memory.split()[1]) * KiB
        if available < needed + spare:
            text = f"{amount(available)} of memory are available, and {amount(needed + spare)} are needed"
            raise NotHere(f"{text} to keep the image in the page cache")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sync(directory: Path) -> None:
    run("sync", "-f", directory)


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is no hole in a file."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def noise_at(noise: bytearray, at: int) -> bytearray:
    """The same noise, with its own position at the start of each cluster."""
    for start in range(0, len(noise), CLUSTER):
        struct.pack_into("<Q", noise, start, at + start)
    return noise


def write_noise(path: Path, size: int) -> None:
    noise = bytearray(os.urandom(CHUNK))
    with open(path, "wb") as f:
        for at in range(0, size, CHUNK):
            f.write(noise_at(noise, at))
        f.truncate(size)


def mapped_image(path: Path, size: int, runs: Iterable[tuple[int, int]], data: bool = False) -> None:
    """Write a QED image with QED's default geometry.

    runs: first guest cluster and number of clusters of what is allocated, in ascending order.  The
    clusters lie in the same order in the file, each table behind its own; without data they are holes.
    """
    blank = bytes(ENTRIES * 8)
    page = 4 * KiB  # only those of a table that are in use are written
    noise = bytearray(os.urandom(CLUSTER))
    with open(path, "wb", buffering=0) as f:
        fd = f.fileno()
        l1 = array("Q", blank)
        cursor = 1 + TABLE_CLUSTERS  # behind the header and the L1 table, clusters
        for table, parts in itertools.groupby(split_at_tables(runs), key=lambda part: part[0] // ENTRIES):
            l2 = array("Q", blank)
            pages: set[int] = set()
            for first, n in parts:
                slot = first % ENTRIES
                l2[slot : slot + n] = array("Q", range(cursor * CLUSTER, (cursor + n) * CLUSTER, CLUSTER))
                pages.update(range(slot * 8 // page, -(-(slot + n) * 8 // page)))
                if data:
                    for offset in range(cursor * CLUSTER, (cursor + n) * CLUSTER, CLUSTER):
                        os.pwrite(fd, noise_at(noise, offset), offset)
                cursor += n
            raw = little_endian(l2)
            for number in sorted(pages):
                os.pwrite(fd, raw[number * page : (number + 1) * page], cursor * CLUSTER + number * page)
            l1[table] = cursor * CLUSTER
            cursor += TABLE_CLUSTERS
        os.pwrite(fd, little_endian(l1), CLUSTER)
        header = dict.fromkeys(FIELDS, 0)
        header.update(magic=MAGIC, cluster_size=CLUSTER, table_size=TABLE_CLUSTERS, header_size=1)
        os.pwrite(fd, pack_header({**header, "l1_table_offset": CLUSTER, "image_size": size}), 0)
        os.ftruncate(fd, cursor * CLUSTER)


def split_at_tables(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for first, n in runs:
        while n:
            part = min(n, ENTRIES - first % ENTRIES)
            yield first, part
            first += part
            n -= part


def little_endian(table: array[int]) -> bytes:
    if sys.byteorder == "big":
        table = table[:]
        table.byteswap()
    return table.tobytes()
