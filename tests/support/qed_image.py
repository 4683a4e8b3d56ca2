"""An independent QED implementation for tests: a builder and a reader/verifier. Does not import qedcore.

build() turns a declarative ImageSpec into a file, byte by byte, sound or broken, and knows the guest content.
QedFile parses any file, lists its entries, verifies the metadata and reads the guest.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from support.patterns import KiB, MiB, Reader, stamp, zeros

HEADER = struct.Struct("<IIIIQQQQQII")
FIELDS = (
    "magic",
    "cluster_size",
    "table_size",
    "header_size",
    "features",
    "compat_features",
    "autoclear_features",
    "l1_table_offset",
    "image_size",
    "backing_filename_offset",
    "backing_filename_size",
)
MAGIC = 0x00444551
F_BACKING_FILE = 1
F_NEED_CHECK = 2
F_NO_PROBE = 4
ZERO = 1  # L2 entry of a zero cluster

FULL_STAMP = MiB  # bytes: larger data clusters are stamped at head, middle and tail only, and stay sparse
EDGE = 4 * KiB  # bytes stamped at each of the three places

Entry = Union[int, Callable[["Built"], int]]


@dataclass(frozen=True)
class Geometry:
    cluster_size: int  # bytes
    table_size: int  # clusters

    @property
    def entries(self) -> int:
        return self.cluster_size * self.table_size // 8

    @property
    def table_bytes(self) -> int:
        return self.cluster_size * self.table_size

    @property
    def l2_span(self) -> int:
        """Guest bytes mapped by one L2 table."""
        return self.entries * self.cluster_size

    @property
    def max_size(self) -> int:
        return self.entries * self.l2_span

    @property
    def qemu_opens(self) -> bool:
        """QEMU cannot open table_size 1 (B3) and computes the maximum size mod 2**64 (B4a)."""
        return self.table_size > 1 and self.max_size < 1 << 64

    def __str__(self) -> str:
        cs = self.cluster_size
        return f"{cs // MiB}M_{self.table_size}" if cs >= MiB else f"{cs // KiB}K_{self.table_size}"


@dataclass
class ImageSpec:
    """What to build. Clusters are named by guest cluster number; offsets follow from the order of the file."""

    size: int = 16 * MiB  # image_size, bytes
    cluster_size: int = 64 * KiB
    table_size: int = 4  # clusters
    header_size: int = 1  # clusters, as stored; the file always has at least one cluster of header
    # Guest cluster -> "data", "zero" or "-" (unallocated in an L2 table that exists); or one character per
    # guest cluster: "D", "Z", "-", and " " for "no table because of me".
    layout: Mapping[int, str] | str = ""
    entries: Mapping[int, Entry] = field(default_factory=dict)  # raw L2 entries, win over layout
    l1_entries: Mapping[int, Entry] = field(default_factory=dict)  # raw L1 entries, win over layout
    l1_last: bool = False  # L1 table after all data instead of after the header
    reverse: bool = False  # data in descending order, and before the L2 tables
    features: int = 0  # or-ed with what backing and no_probe need
    compat_features: int = 0
    autoclear_features: int = 0
    backing: str | bytes | None = None
    no_probe: bool = False
    backing_at: int = 64  # bytes, where the name is stored
    header: Mapping[str, int] = field(default_factory=dict)  # final word on any header field
    leaks: int = 0  # unreferenced clusters at the end of the file
    # Asked behind each "table" and "data" cluster for the contents of unreferenced clusters there; b"" is a hole.
    litter: Callable[[str], Sequence[bytes]] = lambda behind: ()
    length: int | None = None  # final length of the file, bytes (cuts or extends it)
    trailing: bytes = b""  # after everything else
    tag: int = 1

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.cluster_size, self.table_size)

    def kinds(self) -> dict[int, str]:
        if isinstance(self.layout, str):
            words = {"D": "data", "Z": "zero", "-": "-"}
            return {i: words[c] for i, c in enumerate(self.layout) if c != " "}
        return dict(self.layout)


@dataclass
class Built:
    """A built image: where things are, and what the guest must read."""

    path: Path
    spec: ImageSpec
    kinds: dict[int, str]
    l1_offset: int = 0
    l2_offsets: dict[int, int] = field(default_factory=dict)  # L1 index -> file offset
    offsets: dict[int, int] = field(default_factory=dict)  # guest cluster -> file offset of its data
    end: int = 0  # bytes: the first cluster never used

    def read(self, pos: int, length: int, backing: Reader = zeros) -> bytes:
        """Expected guest bytes; backing gives zeros past its own end."""
        cs = self.spec.cluster_size
        out = bytearray()
        while len(out) < length:
            cluster, start = divmod(pos + len(out), cs)
            n = min(cs - start, length - len(out))
            kind = self.kinds.get(cluster, "-")
            if kind == "data":
                out += cluster_data(self.spec.tag, cluster, cs, start, n)
            elif kind == "zero":
                out += bytes(n)
            else:
                out += backing(pos + len(out), n)
        return bytes(out)

    def ranges(self) -> list[tuple[int, int]]:
        """Guest (pos, length) worth comparing: everything if small, else cluster heads, middles and tails."""
        size, cs = self.spec.size, self.spec.cluster_size
        if size <= 32 * MiB:
            return [(0, size)] if size else []
        found = [(0, EDGE), (size - EDGE, EDGE)]
        for cluster in sorted(self.kinds):
            for pos in (cluster * cs - EDGE, cluster * cs + cs // 2 - EDGE, (cluster + 1) * cs - EDGE):
                start, stop = max(0, pos), min(size, pos + 2 * EDGE)
                if start < stop:
                    found.append((start, stop - start))
        return found


def cluster_data(tag: int, cluster: int, cluster_size: int, start: int, length: int) -> bytes:
    """Bytes [start, start + length) of the data that build() puts into a guest cluster."""
    pos = cluster * cluster_size + start
    if cluster_size <= FULL_STAMP:
        return stamp(tag, pos, length)
    out = bytearray(length)
    for first in _edges(cluster_size):
        lo, hi = max(first, start), min(first + EDGE, start + length)
        if lo < hi:
            out[lo - start : hi - start] = stamp(tag, cluster * cluster_size + lo, hi - lo)
    return bytes(out)


def _edges(cluster_size: int) -> tuple[int, int, int]:
    return 0, cluster_size // 2, cluster_size - EDGE


def pack_header(values: Mapping[str, int]) -> bytes:
    return HEADER.pack(*(values[name] for name in FIELDS))


def read_header(path: str | os.PathLike[str]) -> dict[str, int]:
    """Header fields by name, straight from the file."""
    with open(path, "rb") as f:
        raw = f.read(HEADER.size)
    return dict(zip(FIELDS, HEADER.unpack(raw)))


def patch_header(path: str | os.PathLike[str], **fields: int) -> None:
    """Overwrite header fields of an existing image."""
    values = read_header(path)
    values.update(fields)
    with open(path, "r+b") as f:
        f.write(pack_header(values))


def build(path: str | os.PathLike[str], spec: ImageSpec) -> Built:
    """Write the image described by spec to path."""
    geometry = spec.geometry
    cs = spec.cluster_size
    built = Built(Path(path), spec, spec.kinds())
    cursor = max(1, spec.header_size)
    litter: dict[int, bytes] = {}  # offset -> content

    def take(clusters: int, what: str = "table") -> int:
        nonlocal cursor
        offset = cursor * cs
        cursor += clusters
        for content in spec.litter(what):
            litter[cursor * cs] = content
            cursor += 1
        return offset

    if not spec.l1_last:
        built.l1_offset = take(spec.table_size)
    named = set(built.kinds) | set(spec.entries)
    tables = sorted({cluster // geometry.entries for cluster in named})
    data = sorted((c for c, kind in built.kinds.items() if kind == "data"), reverse=spec.reverse)
    if spec.reverse:
        built.offsets = {cluster: take(1, "data") for cluster in data}
        built.l2_offsets = {index: take(spec.table_size) for index in tables}
    else:
        for index in tables:
            for cluster in data:
                if cluster // geometry.entries == index:
                    built.offsets[cluster] = take(1, "data")
            built.l2_offsets[index] = take(spec.table_size)
    if spec.l1_last:
        built.l1_offset = take(spec.table_size)
    cursor += spec.leaks
    built.end = cursor * cs

    l2: dict[int, dict[int, int]] = {index: {} for index in tables}
    for cluster, kind in built.kinds.items():
        index, slot = divmod(cluster, geometry.entries)
        l2[index][slot] = {"data": built.offsets.get(cluster, 0), "zero": ZERO, "-": 0}[kind]
    for cluster, entry in spec.entries.items():
        index, slot = divmod(cluster, geometry.entries)
        l2[index][slot] = entry(built) if callable(entry) else entry
    l1: dict[int, int] = dict(built.l2_offsets)
    for index, entry in spec.l1_entries.items():
        l1[index] = entry(built) if callable(entry) else entry

    name = os.fsencode(spec.backing) if spec.backing is not None else b""
    features = spec.features
    if spec.backing is not None:
        features |= F_BACKING_FILE | (F_NO_PROBE if spec.no_probe else 0)
    header = {
        "magic": MAGIC,
        "cluster_size": cs,
        "table_size": spec.table_size,
        "header_size": spec.header_size,
        "features": features,
        "compat_features": spec.compat_features,
        "autoclear_features": spec.autoclear_features,
        "l1_table_offset": built.l1_offset,
        "image_size": spec.size,
        "backing_filename_offset": spec.backing_at if name else 0,
        "backing_filename_size": len(name),
    }
    header.update(spec.header)

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(fd, built.end)
        _write(fd, built.l1_offset, _table(l1))
        for index, offset in built.l2_offsets.items():
            _write(fd, offset, _table(l2[index]))
        for cluster, offset in built.offsets.items():
            if cs <= FULL_STAMP:
                os.pwrite(fd, stamp(spec.tag, cluster * cs, cs), offset)
                continue
            for start in _edges(cs):
                os.pwrite(fd, stamp(spec.tag, cluster * cs + start, EDGE), offset + start)
        for offset, content in litter.items():
            os.pwrite(fd, content, offset)
        if name:
            os.pwrite(fd, name, spec.backing_at)
        os.pwrite(fd, pack_header(header), 0)
        if spec.length is not None:
            os.ftruncate(fd, spec.length)
        if spec.trailing:
            os.pwrite(fd, spec.trailing, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return built


def _table(entries: Mapping[int, int]) -> dict[int, bytes]:
    """Entries of a table as byte position in the table -> bytes, zero ones left as holes."""
    return {slot * 8: struct.pack("<Q", value) for slot, value in entries.items() if value}


def _write(fd: int, offset: int, pieces: Mapping[int, bytes]) -> None:
    for start, raw in pieces.items():
        os.pwrite(fd, raw, offset + start)


# The oracle


@dataclass
class Report:
    """What verify() found."""

    errors: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)  # of the errors: entries that lead nowhere
    leaks: list[int] = field(default_factory=list)  # cluster numbers in the file
    allocated: int = 0  # data clusters
    zero: int = 0  # zero clusters
    tables: int = 0  # L2 tables
    file_clusters: int = 0  # whole or partial, header included
    need_check: bool = False

    @property
    def clean(self) -> bool:
        return not self.errors and not self.leaks and not self.need_check


class QedFile:
    """Read-only view of a QED file; parses on demand and trusts nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_header(path)
        if self.header["magic"] != MAGIC:
            raise ValueError(f"{path}: not QED")
        self.geometry = Geometry(self.header["cluster_size"], self.header["table_size"])
        self.size = self.header["image_size"]
        self._fd = os.open(path, os.O_RDONLY)
        self.length = os.fstat(self._fd).st_size
        self.l1 = _entries(self._fd, self.header["l1_table_offset"], self.geometry.table_bytes)
        self._l2: dict[int, dict[int, int]] = {}  # table offset -> slot -> nonzero entry
        self._backing: Reader | None = None
        self._parents: list[QedFile] = []

    def __enter__(self) -> QedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for parent in self._parents:
            parent.close()

    @property
    def need_check(self) -> bool:
        return bool(self.header["features"] & F_NEED_CHECK)

    @property
    def backing_name(self) -> str | None:
        if not self.header["features"] & F_BACKING_FILE or not self.header["backing_filename_size"]:
            return None
        at, size = self.header["backing_filename_offset"], self.header["backing_filename_size"]
        return os.fsdecode(os.pread(self._fd, size, at).split(b"\0")[0])

    def l2_table(self, offset: int) -> dict[int, int]:
        """Slot -> nonzero entry of the table at a file offset."""
        if offset not in self._l2:
            self._l2[offset] = _entries(self._fd, offset, self.geometry.table_bytes)
        return self._l2[offset]

    def entry(self, cluster: int) -> int:
        """L2 entry of a guest cluster; 0 also when it has no table."""
        index, slot = divmod(cluster, self.geometry.entries)
        offset = self.l1.get(index, 0)
        return self.l2_table(offset).get(slot, 0) if offset else 0

    def entries(self) -> dict[int, int]:
        """Guest cluster -> nonzero L2 entry, for the whole image."""
        found: dict[int, int] = {}
        for index, offset in sorted(self.l1.items()):
            for slot, value in sorted(self.l2_table(offset).items()):
                found[index * self.geometry.entries + slot] = value
        return found

    def backing(self) -> Reader:
        """Reader of the backing chain below this image; zeros without one and past its end."""
        if self._backing is None:
            name = self.backing_name
            if name is None:
                self._backing = zeros
            else:
                path = self.path.parent / name
                raw = bool(self.header["features"] & F_NO_PROBE)
                with open(path, "rb") as f:
                    probed = f.read(4) == struct.pack("<I", MAGIC)
                if probed and not raw:
                    parent = QedFile(path)
                    self._parents.append(parent)
                    self._backing = parent.read
                else:
                    self._backing = raw_reader(path)
        return self._backing

    def read(self, pos: int, length: int) -> bytes:
        """Guest bytes by the format's rules; zeros past the end of the device."""
        cs = self.geometry.cluster_size
        out = bytearray()
        while len(out) < length:
            at = pos + len(out)
            cluster, start = divmod(at, cs)
            n = min(cs - start, length - len(out))
            if at >= self.size:
                out += bytes(length - len(out))
                break
            n = min(n, self.size - at)
            value = self.entry(cluster)
            if value == ZERO:
                out += bytes(n)
            elif value:
                if value % cs:
                    raise OSError(errno.EIO, f"entry {value:#x} of guest cluster {cluster}")
                raw = os.pread(self._fd, n, value + start)
                out += raw + bytes(n - len(raw))
            else:
                out += self.backing()(at, n)
        return bytes(out)

    def leads_somewhere(self, offset: int, clusters: int = 1) -> bool:
        """Whether an entry may have this value: aligned, after the header, and inside the file."""
        cs = self.geometry.cluster_size
        inside = self.header["header_size"] * cs <= offset and offset + clusters * cs <= self.length
        return inside and offset % cs == 0

    def is_lost(self, cluster: int) -> bool:
        """Whether an impossible entry hides what a guest cluster holds."""
        index = cluster // self.geometry.entries
        offset = self.l1.get(index, 0)
        if offset and not self.leads_somewhere(offset, self.geometry.table_size):
            return True
        entry = self.entry(cluster)
        return entry > ZERO and not self.leads_somewhere(entry)

    def in_use(self) -> set[int]:
        """Clusters of the file that are the header's or that something leads to."""
        cs, ts = self.geometry.cluster_size, self.geometry.table_size
        tables = [self.header["l1_table_offset"], *self.l1.values()]
        used = set(range(max(1, self.header["header_size"])))
        used.update(offset // cs + i for offset in tables if self.leads_somewhere(offset, ts) for i in range(ts))
        return used | {value // cs for value in self.entries().values() if self.leads_somewhere(value)}

    def verify(self) -> Report:
        """Every referenced cluster aligned, after the header, wholly inside the file, referenced once."""
        cs, ts = self.geometry.cluster_size, self.geometry.table_size
        first = self.header["header_size"]
        report = Report(need_check=self.need_check, file_clusters=-(-self.length // cs))
        owner: dict[int, str] = {}

        def claim(offset: int, clusters: int, what: str) -> bool:
            if not self.leads_somewhere(offset, clusters):
                error = f"{what}: {offset:#x} is not aligned, or outside the file of {self.length:#x}"
                report.impossible.append(error)
                report.errors.append(error)
                return False
            good = True
            for number in range(offset // cs, offset // cs + clusters):
                if number in owner:
                    report.errors.append(f"{what}: cluster {number} is also {owner[number]}")
                    good = False
                owner.setdefault(number, what)
            return good

        claim(self.header["l1_table_offset"], ts, "L1 table")
        for index, offset in sorted(self.l1.items()):
            report.tables += 1
            if not claim(offset, ts, f"L2 table {index}"):
                continue
            for slot, value in sorted(self.l2_table(offset).items()):
                if value == ZERO:
                    report.zero += 1
                else:
                    report.allocated += 1
                    claim(value, 1, f"guest cluster {index * self.geometry.entries + slot}")
        report.leaks = [n for n in range(max(1, first), report.file_clusters) if n not in owner]
        return report


def raw_reader(path: str | os.PathLike[str]) -> Reader:
    """Reader of a raw file, zeros past its end."""

    def read(pos: int, length: int) -> bytes:
        with open(path, "rb") as f:
            f.seek(pos)
            data = f.read(length)
        return data + bytes(length - len(data))

    return read


def _entries(fd: int, offset: int, table_bytes: int) -> dict[int, int]:
    """Nonzero entries of a table by slot, skipping holes and zero blocks; short files read as zeros."""
    found: dict[int, int] = {}
    block = 64 * KiB
    blank = bytes(block)
    at = offset
    end = offset + table_bytes
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            raise
        at = max(at, offset + (data - offset) // 8 * 8)
        if at >= end:
            break
        raw = os.pread(fd, min(block, end - at), at)
        if not raw:
            break
        if raw != blank[: len(raw)]:
            words = array("Q", raw + bytes(-len(raw) % 8))
            if struct.pack("=H", 1) != struct.pack("<H", 1):
                words.byteswap()
            base = (at - offset) // 8
            found.update((base + i, value) for i, value in enumerate(words) if value)
        at += len(raw)
    return found


def assert_sound(path: str | os.PathLike[str], *, leaks: int | None = 0, need_check: bool = False) -> Report:
    """The image has no errors, at most `leaks` leaked clusters (None: any) and the expected NEED_CHECK bit."""
    with QedFile(path) as image:
        report = image.verify()
    assert not report.errors, report.errors[:10]
    assert report.need_check is need_check, "NEED_CHECK is " + ("set" if report.need_check else "clear")
    if leaks is not None:
        assert len(report.leaks) <= leaks, f"leaked clusters {report.leaks[:10]}"
    return report


GEOMETRIES: Sequence[Geometry] = (
    Geometry(4 * KiB, 1),
    Geometry(4 * KiB, 2),
    Geometry(4 * KiB, 16),
    Geometry(64 * KiB, 4),
    Geometry(64 * KiB, 16),
    Geometry(MiB, 2),
    Geometry(4 * MiB, 2),  # the largest clusters that QEMU opens (B4a)
    Geometry(64 * MiB, 2),
)
QEMU_GEOMETRIES: Sequence[Geometry] = tuple(g for g in GEOMETRIES if g.qemu_opens)
