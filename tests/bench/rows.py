"""What is measured: the rows of the table, the points of the scale curves, and what a run of one gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

CLUSTER = 64 * KiB  # bytes: QED's default, and of all images here

# The QED plugin, and what it is compared with.
OURS = "qed"
QEMU = "qemu-nbd"  # its defaults: --aio=threads, --cache=writeback; qemu-img, where no server takes part
QEMU_THREADS = "qemu-nbd-threads"  # for a QEMU with another default
QEMU_IO_URING = "qemu-nbd-io_uring"
RAW = "nbdkit-file"  # nbdkit's file plugin (or nbd plugin, in remote rows), on a raw file of the same content
FLOOR = "nbdkit-alone"  # a plugin in C that is part of it, and does nothing: what nbdkit and the client cost
PLAIN = "nbdkit-python"  # plain.py: what Python costs besides
CONTENDERS = (OURS, QEMU, QEMU_IO_URING, RAW, FLOOR, PLAIN, QEMU_THREADS)
DEFAULT_CONTENDERS = CONTENDERS[:-1]
QEMUS = (QEMU, QEMU_THREADS, QEMU_IO_URING)


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    work: str = "fio"  # or "copy-out", "copy-in", "convert", "check", "map", "open"
    image: str = "full"  # a method of images.Images
    rw: str = ""  # fio's --rw
    bs: int = 4 * KiB  # bytes of a request
    depth: int = 16  # requests in flight on each connection
    connections: int = 1
    remote: bool = False  # the image is on an NBD server of this machine
    flush_every: int = 0  # writes
    fio_fsync: int = 0  # fio's --fsync
    size: int = 0  # bytes of the guest device; 0: as --image-size and the like tell
    fill: int = 0  # percent of the clusters
    zones: tuple[tuple[int, int], ...] = ()  # fio's random_distribution=zoned_abs: percent of requests, bytes
    repeat: int = 1  # runs per round: for those that are over at once
    slices: bool = False  # keep the requests per second of each part of the run
    curve: str = ""  # the curve it is a point of
    x: float = 0  # where on that curve

    @property
    def writes(self) -> bool:
        return "write" in self.rw

    @property
    def allocates(self) -> bool:
        return self.writes and self.image != "copy"

    @property
    def timed(self) -> bool:
        """Measured in seconds, not in requests per second."""
        return self.work != "fio"

    def takes_part(self, contender: str) -> bool:
        if self.work == "check":
            return contender in (OURS, QEMU)
        if self.remote and contender in (FLOOR, PLAIN):
            return False
        if contender == FLOOR:
            return self.work in ("fio", "open") and self.image in ("full", "copy") or self.image in ("sparse", "half")
        if contender == PLAIN and self.curve:
            return False
        if contender in (RAW, PLAIN):
            return self.image in ("full", "copy", "empty", "target") or bool(self.curve and self.image != "filled")
        return True


ROWS = (
    Row("randread-1", "4 KiB random read, depth 1", rw="randread", depth=1),
    Row("randread-16", "4 KiB random read, depth 16", rw="randread"),
    Row("randread-64", "4 KiB random read, depth 64", rw="randread", depth=64),
    Row("randread-4x16", "4 KiB random read, 4 connections × depth 16", rw="randread", connections=4),
    Row("seqread", "256 KiB sequential read, depth 8", rw="read", bs=256 * KiB, depth=8),
    Row("overwrite", "4 KiB random overwrite, depth 16", image="copy", rw="randwrite"),
    Row("randalloc", "4 KiB random allocating write, depth 16", image="empty", rw="randwrite"),
    Row("seqalloc", "256 KiB sequential allocating write, depth 8", image="empty", rw="write", bs=256 * KiB, depth=8),
    Row("backing", "4 KiB random write over a backing file, depth 16", image="overlay", rw="randwrite"),
    Row("fsync", "4 KiB random allocating write, a flush every 32", image="empty", rw="randwrite", flush_every=32),
    # fio fills its queue with flushes then: the faster the server, the more.
    Row(
        "fsync-fio",
        "the same with fio's --fsync=32, one every 3 to 6",
        image="empty",
        rw="randwrite",
        fio_fsync=32,
    ),
    Row("remote-1", "image on an NBD server: 4 KiB random read, depth 1", rw="randread", depth=1, remote=True),
    Row("remote-16", "image on an NBD server: 4 KiB random read, depth 16", rw="randread", remote=True),
    Row("remote-write", "image on an NBD server: 4 KiB random overwrite", image="copy", rw="randwrite", remote=True),
    Row(
        "remote-fsync",
        "the same with a flush every 32",
        image="copy",
        rw="randwrite",
        flush_every=32,
        remote=True,
    ),
    Row(
        "remote-seqread",
        "image on an NBD server: 256 KiB sequential read, depth 8",
        rw="read",
        bs=256 * KiB,
        depth=8,
        remote=True,
    ),
    Row("copy-out", "nbdcopy out, {image}", work="copy-out"),
    Row("copy-in", "nbdcopy in, {image}", work="copy-in", image="target"),
    Row("convert", "qemu-img convert out, {image}", work="convert"),
    Row("copy-sparse", "nbdcopy out, {huge}, 1 % scattered data", work="copy-out", image="sparse"),
    Row("check", "check, {huge}, full", work="check", image="mapped", repeat=3),
    Row("map", "extents of {huge}, half allocated", work="map", image="half"),
    Row("open", "open to first byte", work="open", repeat=4),
)

# -- scale ------------------------------------------------------------------------------------------

SIZES = (GiB, 16 * GiB, 256 * GiB, 4 * TiB, 64 * TiB)  # bytes: 64 TiB is the most with QED's default geometry
FILLS = (1, 25, 50, 75, 95)  # percent
TABLE_SPAN = 2 * GiB  # guest bytes that one L2 table maps
SPOTS = 20  # so that each gets 5 % of the requests
FILLED_SIZE = SPOTS * TABLE_SPAN  # bytes: all tables fit into the caches of both
CONNECTIONS = (1, 4, 16)

CURVES = {
    "size-read": "4 KiB random reads in 20 places of the image",
    "size-read-all": "4 KiB random reads all over the image",
    "size-write": "4 KiB random allocating writes in 20 places of the image",
    "fill-read": "4 KiB random reads, tables filled by",
    "fill-write": "4 KiB random allocating writes, tables filled by",
    "connections": "4 KiB random reads, depth 16, connections:",
    "start": "open to first byte",
    "long-read": "4 KiB random reads without a pause",
    "long-write": "4 KiB allocating writes without a pause, each to the next cluster",
}


def spot_stride(size: int) -> int:
    """Bytes from one of the places to the next; where there is room, each begins with a table."""
    stride = size // SPOTS
    return stride // TABLE_SPAN * TABLE_SPAN or stride // MiB * MiB


def spot_length(size: int) -> int:
    """Bytes of each of the places: at most one table's worth, all together at most the image."""
    return min(TABLE_SPAN, spot_stride(size))


def spot_zones(size: int) -> tuple[tuple[int, int], ...]:
    length, stride = spot_length(size), spot_stride(size)
    zones = [(5, length), (0, stride - length)] * SPOTS + [(0, size - SPOTS * stride)]
    return tuple(zone for zone in zones if zone[1])


def fill_zones(fill: int, free: bool) -> tuple[tuple[int, int], ...]:
    """The requests of a table go to its filled part, the first, or to its free part."""
    filled = TABLE_SPAN // CLUSTER * fill // 100 * CLUSTER
    parts = ((0 if free else 5, filled), (5 if free else 0, TABLE_SPAN - filled))
    return tuple(zone for zone in parts * SPOTS if zone[1])


def amount(n: int) -> str:
    """A number of bytes, such as 4 TiB."""
    for unit, text in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB")):
        if n >= unit:
            return f"{n / unit:.4g} {text}"
    return f"{n / KiB:.4g} KiB"


def scale_rows() -> list[Row]:
    rows = []

    def add(curve: str, label: str, x: float, **fields: Any) -> None:
        title = f"{CURVES[curve]}{' ' if curve[:4] in ('fill', 'conn') else ', '}{label}".rstrip(", ")
        name = f"{curve}@{label.replace(' ', '')}".rstrip("@")
        rows.append(dataclasses.replace(Row(name, title), curve=curve, x=x, **fields))

    for curve, image, rw in (
        ("size-read", "spots", "randread"),
        ("size-read-all", "thin", "randread"),
        ("size-write", "vacant", "randwrite"),
    ):
        for size in SIZES:
            zones = () if image == "thin" else spot_zones(size)
            add(curve, amount(size), size, image=image, rw=rw, size=size, zones=zones)
    for curve, rw in (("fill-read", "randread"), ("fill-write", "randwrite")):
        for fill in FILLS:
            zones = fill_zones(fill, free=rw == "randwrite")
            add(curve, f"{fill} %", fill, image="filled", rw=rw, size=FILLED_SIZE, fill=fill, zones=zones)
    for n in CONNECTIONS:
        add("connections", str(n), n, rw="randread", connections=n)
    for size in SIZES:
        add("start", amount(size), size, work="open", image="spots", size=size, repeat=4)
    add("long-read", "", 0, rw="randread", slices=True)
    add("long-write", "", 0, image="empty", rw=f"write:{CLUSTER - 4 * KiB}", slices=True, size=TiB)
    return rows


# -- results ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a client saw."""

    seconds: float  # wall time
    requests: int = 0  # completed; 0 where whole processes are measured
    bytes: int = 0  # guest data moved
    p50_us: float = 0  # median of the requests' latency, microseconds
    p99_us: float = 0  # its 99th percentile
    flushes: int = 0  # among them, not counted in requests
    slices: tuple[float, ...] = ()  # requests per second


@dataclass(frozen=True)
class Sample(Measured):
    """One run of one contender.  Those with the same run and round were measured side by side."""

    row: str = ""
    contender: str = ""
    round: int = 0
    run: int = 0  # of the benchmark, when several results are read
    cpu: float = 0  # the server's CPU seconds
    rss: int = 0  # its peak resident set, bytes

    @property
    def speed(self) -> float:
        """Higher is better: requests per second, or runs per second."""
        return (self.requests or 1) / self.seconds
