#!/usr/bin/env python3
"""Images from strangers: sound ones, damaged in their structure, taken through everything that can be done to them.

One case builds an image, changes header fields, table entries, backing names, bytes and the length of the file, and
then has it described, checked, salvaged, read, written, zeroed, trimmed, repaired and read again.  Whatever it is:

F1. Nothing but QEDError is raised, and the command ends with one of its exit codes.
F2. Nothing takes longer than CPU_LIMIT and TIME_LIMIT, or more memory than MEMORY_LIMIT.
F3. No file is opened but those that the operator has named or allowed, no program started, no server asked.
F4. What only reads changes nothing.
F5. Guest data that the damage does not touch stays what it is, through writing, killing and all repairs; what was
    written is there afterwards.
F6. An image that `check -r all` calls clean is sound.

What the damage does not touch is found by an independent reader (intact()).  `fuzz.py --seed S --first N --cases 1`
runs a case again; failures print its words.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from support.patterns import GiB, KiB, MiB, assert_same, stamp
from support.qed_image import (
    F_NEED_CHECK,
    FIELDS,
    ZERO,
    Built,
    Geometry,
    ImageSpec,
    QedFile,
    build,
    pack_header,
    read_header,
)
from support.tools import scratch

import qedcore
from qedcore.backing.policy import BackingPolicy
from qedcore.cli.main import main as qed
from qedcore.engine.chain import close_source
from qedcore.errors import QEDError

CPU_LIMIT = 20  # seconds, for a case
TIME_LIMIT = 100  # seconds, for a case: it waits for something
MEMORY_LIMIT = 160 * MiB  # bytes, for a case, beyond what the process had
ADDRESS_LIMIT = 6 * GiB  # bytes: rather a MemoryError than a machine that swaps
EDGE = 4 * KiB  # bytes: of a large cluster, its first and last ones are compared

GEOMETRIES = (
    (Geometry(4 * KiB, 1), 500),
    (Geometry(4 * KiB, 2), 400),
    (Geometry(4 * KiB, 16), 40),
    (Geometry(16 * KiB, 2), 100),
    (Geometry(64 * KiB, 4), 30),
    (Geometry(64 * KiB, 16), 8),
    (Geometry(MiB, 2), 4),
    (Geometry(64 * MiB, 1), 2),
    (Geometry(64 * MiB, 16), 3),
)
HOSTILE_NAMES = (
    b"../secret",
    b"/etc/passwd",
    b"/dev/zero",
    b"/proc/self/mem",
    b"/dev/stdin",
    b"file:../secret",
    b"image.qed",
    b"./image.qed",
    b"missing",
    b"link",
    b"fifo",
    b"..",
    b"",
    b"\xff\xfe",
    b"a\nb",
    b"a\0../secret",
    b"x" * 300,
    b"nbd://127.0.0.1:9/x",
    b"nbd:127.0.0.1:9",
    b"nbd:unix:/nowhere",
    b"http://127.0.0.1:9/",
    b"rbd:pool/x",
    b"json:{",
    b"json:[]",
    b"json:" + b"[" * 3000,
    b'json:{"driver":"raw","file":{"driver":"file","filename":"../secret"}}',
    b'json:{"driver":"qed","file":{"driver":"file","filename":"a\\u0000b"}}',
    b'json:{"driver":"raw","file":{"driver":"file","filename":"\\ud800"}}',
    b'json:{"driver":"raw","offset":-512,"file":{"driver":"file","filename":"base.raw"}}',
    b'json:{"driver":"raw","size":99999999999999999999,"file":{"driver":"file","filename":"base.raw"}}',
    b'json:{"driver":"raw","size":1e999,"file":{"driver":"file","filename":"base.raw"}}',
    b'json:{"driver":"nbd","host":"127.0.0.1","port":"9"}',
    b'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.raw"}}',
    b'json:{"file.filename":"../secret"}',
    b'json:{"driver":"raw","offset":' + b"9" * 4000 + b',"file":{"driver":"file","filename":"base.raw"}}',
)
# Header fields whose change leaves the guest data where it is.
HARMLESS = {"features", "compat_features", "autoclear_features"}


class Hang(BaseException):
    """A case takes too long: no `except Exception` hides it."""


class Finding(AssertionError):
    """A promise is broken."""


# -- what the process does ---------------------------------------------------------------------------------------


class Watch:
    """Records what is opened and started (F3), by audit hook: those cannot be removed, so there is one."""

    def __init__(self) -> None:
        self.active = False
        self.opened: list[tuple[str, int]] = []  # real path, flags
        self.other: list[str] = []
        self._others: set[int | None] = set()  # identifiers of threads
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or threading.get_ident() in self._others:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            self.opened.append((os.fsdecode(args[0]), args[2]))
        elif event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.system", "socket.connect"):
            self.other.append(f"{event} {args!r}")

    @contextlib.contextmanager
    def only(self, *allowed: Path) -> Iterator[None]:
        """Nothing may be opened but these, what is in these directories, and Python's own modules."""
        self.opened.clear()
        self.other.clear()
        # Threads that another test of this process has left behind are no work of this one.
        self._others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        self.active = True
        try:
            yield
        finally:
            self.active = False
        roots = [os.path.realpath(path) for path in (*allowed, *PYTHON_DIRS)]
        for path, _ in self.opened:
            real = os.path.realpath(path)
            if not any(real == root or real.startswith(root + "/") for root in roots):
                raise Finding(f"F3: opened {path!r}")
        if self.other:
            raise Finding(f"F3: {self.other[0]}")


PYTHON_DIRS = {Path(module.__file__).parent for module in (os, qedcore) if module.__file__} | {
    Path(path) for path in sys.path if path.endswith("-packages")
}
_watch: Watch | None = None


def watch() -> Watch:
    global _watch
    _watch = _watch or Watch()
    return _watch


def _peak() -> int:
    """Bytes: the most memory since reset_peak()."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KiB
    return 0


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """F2."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"F2: more than {CPU_LIMIT if number == signal.SIGPROF else TIME_LIMIT} s")

    before = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_LIMIT if hard < 0 else min(ADDRESS_LIMIT, hard), hard))
    _reset_peak()
    start = _peak()
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT)
    try:
        yield
        used = _peak() - start
        if used > MEMORY_LIMIT:
            raise Finding(f"F2: {used} bytes of memory")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# -- images ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """An image, and what was done to it."""

    directory: Path
    built: Built
    notes: list[str] = field(default_factory=list)
    same_layout: bool = True  # the header still says where everything is
    same_backing: bool = True

    @property
    def path(self) -> Path:
        return self.built.path


def make_case(rng: random.Random, directory: Path) -> Case:
    """directory/images holds the image and what it may refer to; what is beside is forbidden."""
    images = directory / "images"
    images.mkdir()
    (directory / "secret").write_bytes(b"SECRET" * 1000)
    (images / "base.raw").write_bytes(stamp(99, 0, 256 * KiB + 512))
    (images / "link").symlink_to("../secret")
    os.mkfifo(images / "fifo")
    geometry = rng.choices([g for g, _ in GEOMETRIES], [weight for _, weight in GEOMETRIES])[0]
    cs, entries = geometry.cluster_size, geometry.entries
    tables = rng.choice((1, 1, 2, 3))
    layout: dict[int, str] = {}
    for table in range(tables):
        start = table * entries
        for _ in range(rng.choice((0, 1, 3, 8))):
            cluster = start + rng.choice((rng.randrange(12), rng.randrange(entries)))
            layout[cluster] = rng.choices(("data", "zero", "-"), (6, 2, 1))[0]
    top = min((tables - 1) * entries * cs + 12 * cs, geometry.max_size)
    size = rng.choice((top, top - 512, top + 5 * cs, tables * geometry.l2_span, geometry.max_size))
    size = max(0, min(size, geometry.max_size, (1 << 63) - 512) // 512 * 512)
    backing = rng.choices((None, b"base.raw", b"base.qed", rng.choice(HOSTILE_NAMES)), (10, 4, 3, 3))[0]
    if backing == b"base.qed":
        below = ImageSpec(
            size=MiB, cluster_size=4 * KiB, table_size=2, layout=dict.fromkeys(range(0, 60, 3), "data"), tag=50
        )
        build(images / "base.qed", below)
    spec = ImageSpec(
        size=size,
        cluster_size=cs,
        table_size=geometry.table_size,
        header_size=rng.choice((1, 1, 1, 2)),
        layout=layout,
        l1_last=rng.random() < 0.2,
        reverse=rng.random() < 0.3,
        features=F_NEED_CHECK if rng.random() < 0.5 else 0,
        backing=backing[: cs - 64] if backing is not None else None,
        no_probe=backing is not None and backing != b"base.qed" and rng.random() < 0.7,
        leaks=rng.choice((0, 0, 1, 5)),
        tag=1,
    )
    case = Case(directory, build(images / "image.qed", spec))
    case.notes.append(f"{geometry} size {size} {layout} backing {backing!r}"[:300])
    if backing is not None and backing not in (b"base.raw", b"base.qed"):
        case.same_backing = False
    return case


def near(rng: random.Random, case: Case, bits: int) -> int:
    """A number at which something may go wrong."""
    built, cs = case.built, case.built.spec.cluster_size
    places = [built.l1_offset, built.end, *built.l2_offsets.values(), *built.offsets.values()]
    value = rng.choice(
        (
            rng.choice(places),
            rng.choice(places),
            rng.choice(places) + rng.choice((-cs, cs, 1, 8, 512, -512, cs // 2)),
            rng.choice((0, 1, 2, 3, 7, 512, cs, 2 * cs, cs * built.spec.table_size)),
            1 << rng.randrange(64),
            (1 << rng.randrange(1, 65)) - rng.choice((1, 512, cs)),
            built.end + cs * rng.randrange(8),
            rng.randrange(1 << bits),
            rng.randrange(64) * cs,
        )
    )
    return value & ((1 << bits) - 1)


def mutate(rng: random.Random, case: Case) -> None:
    """Change one thing."""
    built, cs = case.built, case.built.spec.cluster_size
    tables = [built.l1_offset, *built.l2_offsets.values()]
    table_bytes = built.spec.geometry.table_bytes
    kind = rng.choices(("entry", "header", "byte", "length", "table", "name", "extend"), (50, 12, 8, 10, 5, 3, 4))[0]
    with open(case.path, "r+b", buffering=0) as f:
        length = os.fstat(f.fileno()).st_size
        if length < 64:
            kind = "extend"
        if kind == "entry":
            table = rng.choice(tables)
            used = range(min(table_bytes // 8, 16))
            slot = rng.choice((rng.choice(used), rng.choice(used), rng.randrange(table_bytes // 8)))
            value = near(rng, case, 64)
            note = f"entry {slot} of the table at {table:#x} = {value:#x}"
            os.pwrite(f.fileno(), struct.pack("<Q", value), table + slot * 8)
        elif kind == "header":
            name = rng.choice(FIELDS)
            values = read_header(case.path)
            bits = 64 if name in FIELDS[4:9] else 32
            values[name] = rng.choice((near(rng, case, bits), values[name] ^ (1 << rng.randrange(bits))))
            if name in ("cluster_size", "table_size") and rng.random() < 0.7:
                values[name] = 1 << rng.randrange(28 if name == "cluster_size" else 6)
            if name == "features" and rng.random() < 0.7:
                values[name] = rng.randrange(8)
            note = f"{name} = {values[name]:#x}"
            os.pwrite(f.fileno(), pack_header(values), 0)
            case.same_layout = case.same_layout and name in HARMLESS
            case.same_backing = False
        elif kind == "byte":
            at = rng.choice((rng.randrange(64), rng.choice(tables) + rng.randrange(256)))
            data = rng.randbytes(rng.choice((1, 1, 2, 8, 64)))
            note = f"{data.hex()} at {at:#x}"
            os.pwrite(f.fileno(), data, at)
            if at < 256:
                case.same_layout = case.same_backing = False
        elif kind == "length":
            new = rng.choice(
                (length - rng.randrange(1, 2 * cs), rng.randrange(length + 1), length - cs, rng.choice(tables) + 8)
            )
            new = max(0, new)
            note = f"cut at {new:#x}"
            os.ftruncate(f.fileno(), new)
            if new < 4 * KiB:
                case.same_layout = case.same_backing = False
        elif kind == "extend":
            new = length + rng.choice((1, 511, 512, cs - 512, cs, 5 * cs, GiB, 16 * GiB))
            note = f"extended to {new:#x}"
            os.ftruncate(f.fileno(), new)
        elif kind == "table":
            source, target = rng.choice(tables), rng.choice(tables)
            n = min(table_bytes, 64 * KiB)
            data = rng.choice((os.pread(f.fileno(), n, source), rng.randbytes(256), b"\xff" * 512))
            note = f"table at {target:#x} overwritten with {len(data)} bytes"
            os.pwrite(f.fileno(), data, target)
        else:
            name = rng.choice(HOSTILE_NAMES)[: cs - 64]
            values = read_header(case.path)
            values.update(backing_filename_offset=64, backing_filename_size=len(name))
            values["features"] = values["features"] & 2 | 1 | rng.choice((0, 4))
            note = f"backing name {name[:80]!r}"
            os.pwrite(f.fileno(), pack_header(values) + name, 0)
            case.same_backing = False
    case.notes.append(note)


# -- the guest's data -----------------------------------------------------------------------------------------------


class Guest:
    """Pieces of the device whose content is known: {position: bytes}, none of them in more than one cluster."""

    def __init__(self, cluster_size: int) -> None:
        self.cluster_size = cluster_size
        self.pieces: dict[int, bytearray] = {}

    def overlapping(self, pos: int, length: int) -> list[tuple[int, int, int]]:
        """(position of the piece, start, stop) of what [pos, pos + length) touches."""
        found = []
        for at, data in self.pieces.items():
            start, stop = max(pos, at), min(pos + length, at + len(data))
            if start < stop:
                found.append((at, start, stop))
        return found

    def write(self, pos: int, data: bytes) -> None:
        for at, start, stop in self.overlapping(pos, len(data)):
            self.pieces[at][start - at : stop - at] = data[start - pos : stop - pos]

    def zero(self, pos: int, length: int) -> None:
        for at, start, stop in self.overlapping(pos, length):
            self.pieces[at][start - at : stop - at] = bytes(stop - start)

    def trim(self, pos: int, length: int, read: Callable[[int, int], bytes]) -> None:
        """Each piece is what it was, or zeros."""
        for at, start, stop in self.overlapping(pos, length):
            got = read(stop - start, start)
            if got != bytes(stop - start) and got != self.pieces[at][start - at : stop - at]:
                raise Finding(f"F5: neither old nor zeros at {start:#x} after a trim")
            self.pieces[at][start - at : stop - at] = got

    def forget(self, pos: int, length: int) -> None:
        for at, _, _ in self.overlapping(pos, length):
            del self.pieces[at]

    def check(self, read: Callable[[int, int], bytes], when: str) -> None:
        for at, data in self.pieces.items():
            try:
                assert_same(read(len(data), at), bytes(data), at)
            except (AssertionError, QEDError) as error:
                raise Finding(f"F5: {when}, at {at:#x}: {error}") from error


def intact(case: Case) -> Guest:
    """What no damage touches: its tables and clusters are in the file, and nothing else refers to them."""
    cs = case.built.spec.cluster_size
    guest = Guest(cs)
    if not case.same_layout:
        return guest
    with QedFile(case.path) as image:
        geometry, first = image.geometry, image.header["header_size"] * cs
        owners: Counter[int] = Counter()

        def clusters(offset: int, n: int) -> range | None:
            if offset % cs or offset < first or offset + n * cs > image.length:
                return None
            return range(offset // cs, offset // cs + n)

        def whole(offset: int, n: int) -> bool:
            found = clusters(offset, n)
            return found is not None and all(owners[number] == 1 for number in found)

        owners.update(clusters(image.header["l1_table_offset"], geometry.table_size) or ())
        for offset in image.l1.values():
            found = clusters(offset, geometry.table_size)
            owners.update(found or ())
            if found:
                owners.update(n for value in image.l2_table(offset).values() for n in clusters(value, 1) or ())
        if not whole(image.header["l1_table_offset"], geometry.table_size):
            return guest
        named = set(case.built.kinds) | {0, 1, geometry.entries, 2 * geometry.entries + 1}
        for cluster in sorted(named)[:40]:
            pos = cluster * cs
            n = min(cs, image.size - pos)
            if n <= 0:
                continue
            index, slot = divmod(cluster, geometry.entries)
            table = image.l1.get(index, 0)
            if table and not whole(table, geometry.table_size):
                continue
            value = image.l2_table(table).get(slot, 0) if table else 0
            if value > ZERO and not whole(value, 1) or (value == 0 and not case.same_backing):
                continue
            parts = [(pos, n)] if n <= 64 * KiB else [(pos, EDGE), (pos + n - EDGE, EDGE)]
            for at, length in parts:
                guest.pieces[at] = bytearray(image.read(at, length))
    return guest


# -- what is done -----------------------------------------------------------------------------------------------


def command(*words: str | Path) -> tuple[int, str]:
    """`qed WORDS`: exit code and error text (F1)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = qed([str(word) for word in words])
    if code not in (0, 1, 2, 3, 63):
        raise Finding(f"F1: {words[0]} ended with {code}: {err.getvalue()}")
    return code, err.getvalue()


def request_range(rng: random.Random, case: Case, size: int) -> tuple[int, int]:
    """(pos, length), mostly inside the device."""
    cs = case.built.spec.cluster_size
    cluster = rng.choice((*case.built.kinds, 0, 1, 2, 5, size // cs))
    pos = cluster * cs + rng.choice((0, 0, 0, 1, 512, cs // 2, cs - 512, -512))
    length = rng.choice((0, 1, 511, 512, 4096, cs, cs - 1, cs + 512, 3 * cs, 12 * cs, MiB))
    pos, length = max(0, pos), min(length, 4 * MiB)
    if rng.random() < 0.9:
        pos = min(pos, size)
        length = min(length, size - pos)
    return pos, length


def session(rng: random.Random, case: Case, guest: Guest, writable: bool, policy: BackingPolicy) -> None:
    """Open, any requests, close."""
    try:
        image = qedcore.open_image(
            case.path, writable, policy=policy, l2_cache=rng.choice((0, 64 * KiB, 8 * MiB)), log=lambda line: None
        )
    except QEDError:
        return
    killed = writable and rng.random() < 0.3
    try:
        guest.check(image.pread, "when opened")
        for _ in range(rng.randrange(1, 14)):
            pos, length = request_range(rng, case, image.size)
            kind = rng.choice(("read", "extents", "write", "write", "write", "zero", "trim", "flush"))
            fua = rng.random() < 0.1
            try:
                if kind == "read":
                    image.pread(length, pos)
                elif kind == "extents":
                    length = min(length * rng.choice((1, 1, 1000)), max(0, image.size - pos), 4 * GiB - 512)
                    _, sizes = image.extents(pos, length, rng.random() < 0.5)
                    if any(n <= 0 for n in sizes) or sum(sizes) > length or (length and not sizes):
                        raise Finding(f"F1: extents of {length} bytes at {pos}: {sizes[:20]}")
                elif kind == "write":
                    data = stamp(rng.randrange(2, 40), pos, length)
                    image.pwrite(data, pos, fua)
                    guest.write(pos, data)
                elif kind == "zero":
                    fast = rng.random() < 0.1
                    image.zero(pos, length, fua, may_trim=rng.random() < 0.5, only_fast=fast)
                    guest.zero(pos, length)
                elif kind == "trim":
                    image.trim(pos, length, fua)
                    guest.trim(pos, length, image.pread)
                else:
                    image.flush()
            except QEDError:
                if writable and kind in ("write", "zero", "trim"):
                    guest.forget(pos, length)
        guest.check(image.pread, "after requests")
    finally:
        if killed:
            close_source(image)
        else:
            with contextlib.suppress(QEDError):
                image.close()


def run_case(rng: random.Random, directory: Path, notes: list[str]) -> str:
    """One case; what came of it, in a word.  `notes` takes what it was."""
    case = make_case(rng, directory)
    notes += case.notes
    case.notes = notes
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        mutate(rng, case)
    images, out = case.path.parent, directory / "out.raw"
    guest = intact(case)
    notes.append(f"{len(guest.pieces)} intact pieces")
    confined = BackingPolicy(dirs=(os.path.realpath(images),))
    policy = rng.choice((confined, confined, confined, BackingPolicy(follow="none")))
    word = ""
    with limits():
        os.utime(case.path, ns=(0, 0))
        with watch().only(case.path):
            command("info", case.path)
            command("check", case.path)
        if rng.random() < 0.3:
            with watch().only(case.path, directory / "out.raw", directory):
                if command("salvage", case.path, out)[0] == 1 and out.exists():
                    raise Finding("F1: a salvage that failed left a file")
            out.unlink(missing_ok=True)
        with watch().only(images):
            session(rng, case, guest, False, policy)
        if case.path.stat().st_mtime_ns:
            raise Finding("F4: changed by reading")
        with watch().only(images):
            session(rng, case, guest, True, policy)
        if rng.random() < 0.5:
            with watch().only(case.path):
                command("check", "-r", "leaks", case.path)
            verify(case, guest, confined, "after -r leaks")
        with watch().only(case.path):
            code, _ = command("check", "-r", "all", case.path)
        verify(case, guest, confined, f"after -r all ({code})")
        if code == 0:
            word = "repaired"
            # A last cluster whose final sector is cut short counts, as in QEMU.
            os.truncate(case.path, -(-case.path.stat().st_size // 512) * 512)
            with QedFile(case.path) as image:
                report = image.verify()
            if report.errors or report.need_check or report.leaks:
                raise Finding(f"F6: {report.errors[:3]}, leaks {report.leaks[:3]}, {report.need_check}")
            with watch().only(images):
                session(rng, case, guest, True, policy)
    return word or f"check -r all: {code}"


def verify(case: Case, guest: Guest, policy: BackingPolicy, when: str) -> None:
    """F5, as far as there is something to compare, and the backing file may be opened."""
    if not guest.pieces:
        return
    try:
        with qedcore.open_image(case.path, False, policy=policy) as image:
            guest.check(image.pread, when)
    except QEDError as error:
        if case.same_backing:
            raise Finding(f"F5: {when}: {error}") from error


def run(seed: str, first: int, cases: int, directory: Path) -> Counter[str]:
    """Run cases; what came of them.  Raises Finding, which tells the case and how to run it again."""
    words: Counter[str] = Counter()
    for number in range(first, first + cases):
        place = directory / "case"
        place.mkdir()
        notes: list[str] = []
        try:
            words[run_case(random.Random(f"{seed}/{number}"), place, notes)] += 1
        except BaseException as error:
            shown = "\n    ".join(notes)
            raise Finding(
                f"case {number} of seed {seed!r}: {type(error).__name__}: {error}\n    {shown}\n"
                f"again: tests/fuzz/fuzz.py --seed '{seed}' --first {number} --cases 1"
            ) from error
        finally:
            shutil.rmtree(place)
    return words


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(1 << 32)))
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qedfuzz-", dir=scratch()) as directory:
        words: Counter[str] = Counter()
        for number in range(args.first, args.first + args.cases):
            try:
                words += run(args.seed, number, 1, Path(directory))
            except Finding as error:
                words["FOUND"] += 1
                traceback.print_exception(type(error), error, error.__traceback__)
            if number % 500 == 499:
                print(f"{number + 1} cases: {dict(words)}", flush=True)
    print(f"{args.cases} cases in {time.monotonic() - start:.0f} s: {dict(words)}")
    return 1 if words["FOUND"] else 0


if __name__ == "__main__":
    sys.exit(main())
