"""Trace events and fault points of an image, and what they cost when they are off."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, QedFile, assert_sound

import qedcore
from qedcore.errors import StorageError
from qedcore.trace import DIALECTS, EVENTS_7_2, FAULT_POINTS

ROOT = Path(__file__).resolve().parents[2]


CS = 64 * KiB


Image = Callable[..., Built]


Event = tuple[str, tuple[Any, ...]]


def traced(path: Path, dialect: str = "7.2", **options: Any) -> tuple[qedcore.QEDImage, list[Event]]:
    events: list[Event] = []
    img = qedcore.open_image(
        path, trace=lambda name, args: events.append((name, args)), trace_dialect=dialect, **options
    )
    events.clear()
    return img, events


def shown(events: list[Event], dialect: str) -> list[str]:
    """Events without qed_, with those of their arguments that are not identities."""
    hidden = {"l2_cache", "entry", "s", "table", "acb", "opaque"}
    lines = []
    for event, args in events:
        names = DIALECTS[dialect].get(event, EVENTS_7_2[event])
        assert len(args) == len(names), (event, args)
        words = [f"{name}={arg}" for name, arg in zip(names, args) if name not in hidden]
        lines.append(" ".join([event[len("qed_") :], *words]))
    return lines


# The first 4 KiB write of a default image, at 4 KiB: event by event what the reference prints.
FIRST_WRITE = """\
aio_setup sector_num=8 nb_sectors=8 flags=1
aio_next_io ret=0 cur_pos=4096
aio_write_data ret=3 offset=0 len=4096
cancel_need_check_timer
aio_next_io ret=0 cur_pos=4096
aio_write_data ret=3 offset=0 len=4096
aio_write_prefill start=0 len=4096 offset=327680
aio_write_postfill start=8192 len=57344 offset=335872
aio_write_main ret=0 offset=331776 len=4096
alloc_l2_cache_entry
write_table offset=393216 index=0 n=32768
write_table_cb flush=1 ret=0
write_table offset=65536 index=0 n=1
write_table_cb flush=0 ret=0
find_l2_cache_entry offset=393216 ref=1
aio_next_io ret=0 cur_pos=8192
aio_complete ret=0
unref_l2_cache_entry ref=1
start_need_check_timer
"""


# One cluster further, fully written: table and cache entry are there, nothing to fill.
SECOND_WRITE = """\
aio_setup sector_num=128 nb_sectors=128 flags=1
aio_next_io ret=0 cur_pos=65536
find_l2_cache_entry offset=393216 ref=1
aio_write_data ret=2 offset=0 len=65536
cancel_need_check_timer
aio_next_io ret=0 cur_pos=65536
unref_l2_cache_entry ref=1
find_l2_cache_entry offset=393216 ref=1
aio_write_data ret=2 offset=0 len=65536
aio_write_prefill start=65536 len=0 offset=655360
aio_write_postfill start=131072 len=0 offset=720896
aio_write_main ret=0 offset=655360 len=65536
write_table offset=393216 index=1 n=1
write_table_cb flush=0 ret=0
aio_next_io ret=0 cur_pos=131072
aio_complete ret=0
unref_l2_cache_entry ref=1
start_need_check_timer
"""


IN_PLACE = """\
aio_setup sector_num=10 nb_sectors=1 flags=1
aio_next_io ret=0 cur_pos=5120
find_l2_cache_entry offset=393216 ref=1
aio_write_data ret=0 offset=327680 len=512
aio_write_main ret=0 offset=332800 len=512
aio_next_io ret=0 cur_pos=5632
aio_complete ret=0
unref_l2_cache_entry ref=1
"""


READ = """\
aio_setup sector_num=9 nb_sectors=3 flags=0
aio_next_io ret=0 cur_pos=4608
find_l2_cache_entry offset=393216 ref=1
aio_read_data ret=0 offset=332288 len=1536
aio_next_io ret=0 cur_pos=6144
aio_complete ret=0
unref_l2_cache_entry ref=1
"""


def dialect_of_2010(text: str) -> list[str]:
    """No timers, no flush argument, is_write for flags, and offsets of clusters for read_data and write_main."""
    lines = []
    for line in text.splitlines():
        if "timer" in line:
            continue
        words = [word for word in line.split() if not word.startswith("flush=")]
        words = [word.replace("flags=", "is_write=") for word in words]
        if words[0] in ("aio_read_data", "aio_write_main"):
            offset = int(words[2].partition("=")[2])
            words[2] = f"offset={offset // CS * CS}"
        lines.append(" ".join(words))
    return lines


STEPS: list[tuple[str, Callable[[qedcore.QEDImage], object]]] = [
    (FIRST_WRITE, lambda img: img.pwrite(b"x" * 4096, 4096)),
    (SECOND_WRITE, lambda img: img.pwrite(b"x" * CS, CS)),
    (IN_PLACE, lambda img: img.pwrite(b"x" * 512, 5120)),
    (READ, lambda img: img.pread(1536, 4608)),
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_events(image: Image, dialect: str) -> None:
    img, events = traced(image().path, dialect)
    with img:
        for text, step in STEPS:
            step(img)
            known = [(name, args) for name, args in events if name in DIALECTS[dialect]]
            want = text.splitlines() if dialect == "7.2" else dialect_of_2010(text)
            assert shown(known, dialect) == want
            events.clear()


def test_identities(image: Image) -> None:
    """s, acb, table and entry tell objects apart and stay the same for one of them."""
    img, events = traced(image().path)
    with img:
        for _, step in STEPS:
            step(img)
        numbers: dict[str, set[object]] = {}
        for event, args in events:
            for name, arg in zip(EVENTS_7_2[event], args):
                numbers.setdefault(f"{event}.{name}", set()).add(arg)
        assert len(numbers["qed_aio_setup.acb"]) == len(STEPS)
        assert numbers["qed_aio_setup.acb"] == numbers["qed_aio_complete.acb"] == numbers["qed_aio_next_io.acb"]
        assert len(numbers["qed_aio_setup.s"]) == 1
        assert len(numbers["qed_find_l2_cache_entry.entry"]) == 1
        assert numbers["qed_find_l2_cache_entry.entry"] <= numbers["qed_alloc_l2_cache_entry.entry"]
        assert len(numbers["qed_write_table.table"]) == 2  # L2, L1


# (what is done, flags or is_write, sectors) of qed_aio_setup
SETUPS: list[tuple[Callable[[qedcore.QEDImage], object], int, tuple[int, int]]] = [
    (lambda img: img.pread(512, 0), 0, (0, 1)),
    (lambda img: img.pwrite(b"x", 511), 1, (0, 1)),
    (lambda img: img.pwrite(b"xy", 511), 1, (0, 2)),
    (lambda img: img.zero(1024, 4096), 3, (2, 8)),
    (lambda img: img.pread(1025, 1), 0, (0, 3)),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("number", range(len(SETUPS)))
def test_setup(image: Image, number: int, dialect: str) -> None:
    step, flags, sectors = SETUPS[number]
    img, events = traced(image(layout="D").path, dialect)
    with img:
        step(img)
    name, args = events[0]
    assert name == "qed_aio_setup"
    assert args[2:] == (*sectors, 0, flags if dialect == "7.2" else flags & 1)


def test_load_of_a_table(image: Image) -> None:
    built = image(layout="D")
    img, events = traced(built.path)
    with img:
        img.pread(512, 0)
    names = [name for name, _ in events]
    at = names.index("qed_read_table")
    assert names[at - 1 : at + 2] == ["qed_alloc_l2_cache_entry", "qed_read_table", "qed_read_table_cb"]
    assert events[at][1][1] == built.l2_offsets[0]
    assert events[at + 1][1][2] == 0


def test_failed_load(image: Image) -> None:
    def fault(point: str) -> None:
        if point == "read_aio":
            raise OSError(errno.EIO, "")

    img, events = traced(image(layout="D").path, fault=fault)
    with img:
        with pytest.raises(StorageError):
            img.pread(512, 0)
    completed = [args for name, args in events if name == "qed_aio_complete"]
    assert [args[2] for args in completed] == [-errno.EIO]


def test_timer_events(image: Image) -> None:
    now = [0.0]
    img, events = traced(image().path, clock=lambda: now[0])
    with img:
        img.pwrite(b"x", 0)
        events.clear()
        assert img._gate is not None
        img._gate.clear(5.0)
        now[0] = 6.0
        img._gate.clear(5.0)
        assert {name for name, _ in events} == {"qed_need_check_timer_cb"}


# point -> a request that meets it, on an image with data, zeros and nothing over a backing file of stamp(9)
LAYOUT = "DZ-D---- "


BACKED: dict[str, Callable[[qedcore.QEDImage], object]] = {
    "pwritev": lambda img: img.pwrite(b"n" * 1000, 100),
    "pwritev_zero": lambda img: img.zero(2 * CS, CS),
    "cow_write": lambda img: img.pwrite(b"n" * 1000, 2 * CS + 100),
    "write_aio": lambda img: img.pwrite(b"n" * 1000, 100),
    "flush_to_os": lambda img: img.flush(),
    "flush_to_disk": lambda img: img.pwrite(b"n" * 1000, 100, fua=True),
    "l2_update": lambda img: img.pwrite(b"n" * CS, 2 * CS),
    "l1_update": lambda img: img.pwrite(b"n" * 1000, 3 << 30),
    "pwritev_done": lambda img: img.pwrite(b"n" * 1000, 100),
    "l2_load": lambda img: img.pread(100, 0),
    "read_aio": lambda img: img.pread(100, 0),
    "read_backing_aio": lambda img: img.pread(100, 2 * CS),
}


def test_every_fault_point_has_a_request() -> None:
    assert set(BACKED) == set(FAULT_POINTS)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EAGAIN])
@pytest.mark.parametrize("point", FAULT_POINTS)
def test_fault_point(image: Image, tmp_path: Path, point: str, code: int) -> None:
    """The request fails with that errno; the image stays usable and loses nothing, then or later (P5, B2, B6)."""
    armed = [False]
    met: list[str] = []

    def fault(name: str) -> None:
        met.append(name)
        if armed[0] and name == point:
            raise OSError(code, os.strerror(code))

    (tmp_path / "base.raw").write_bytes(stamp(9, 0, 16 * CS))
    built = image(layout=LAYOUT, size=4 << 30, backing="base.raw", no_probe=True)
    request = BACKED[point]
    want = built.read(0, 16 * CS, lambda pos, n: (stamp(9, 0, 16 * CS)[pos : pos + n] + bytes(n))[:n])
    img = qedcore.open_image(built.path, fault=fault)
    armed[0] = True
    with pytest.raises(StorageError, match=point) as caught:
        request(img)
    assert caught.value.errno == code
    armed[0] = False
    got = img.pread(16 * CS, 0)
    if point not in ("pwritev_done", "flush_to_disk"):  # all others are met before anything is written
        assert_same(got, want)
        with QedFile(built.path) as file:
            assert_same(file.read(0, 16 * CS), want)
    request(img)
    img.pwrite(b"after" * 100, 5 * CS + 7)
    img.pwrite(b"there" * 100, (3 << 30) + CS)
    img.flush()
    expected = img.pread(16 * CS, 0)
    assert expected[5 * CS + 7 : 5 * CS + 507] == b"after" * 100
    assert_same(expected[9 * CS :], want[9 * CS :], 9 * CS)
    img.close()
    assert point in met
    with QedFile(built.path) as file:
        assert_same(file.read(0, 16 * CS), expected)
        assert file.read(3 << 30, 1) == (b"n" if point == "l1_update" else b"\0")
        assert file.read((3 << 30) + CS, 500) == b"there" * 100
        assert not file.verify().errors


def test_fault_points_of_a_first_write(image: Image) -> None:
    met: list[str] = []
    with qedcore.open_image(image().path, fault=met.append) as img:
        img.pwrite(b"x" * 4096, 4096)
        flushes = ["flush_to_os", "flush_to_disk"]
        want = ["pwritev", *flushes, "write_aio", "l2_update", *flushes, "l1_update", "pwritev_done"]
        assert [name for name in met if name != "cow_write"] == want


def test_data_writes_meet_write_aio_once(image: Image) -> None:
    met: list[str] = []
    with qedcore.open_image(image(layout="DDD").path, fault=met.append) as img:
        img.pwrite(b"x" * 2 * CS, 100)
    assert met.count("write_aio") == 1


def test_other_exceptions_of_a_hook_pass(image: Image) -> None:
    """A mistake in a hook is not taken for a failure of the storage."""

    def fault(name: str) -> None:
        raise ZeroDivisionError

    img = qedcore.open_image(image(layout="D").path, writable=False, fault=fault)
    with pytest.raises(ZeroDivisionError):
        img.pread(1, 0)
    img.close()


OFF = """
import sys
import qedcore, qedcore.server.shared_image
qedcore.create(sys.argv[1], 1 << 30)
with qedcore.open_image(sys.argv[1]) as img:
    img.pwrite(b"x" * 5000, 3000); img.zero(0, 4096); img.pread(9999, 0); img.flush(); img.extents(0, 1 << 30)
print(*sys.modules)
"""


def test_off_is_not_even_loaded(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-c", OFF, str(tmp_path / "x.qed")]
    done = subprocess.run(args, env=env, capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "qedcore.engine.read" in modules
    assert not modules & {"qedcore.engine.traced", "qedcore.trace"}


def called_files(work: Callable[[], object]) -> set[str]:
    """Names of the files whose functions are called."""
    files: set[str] = set()

    def profile(frame: Any, event: str, arg: object) -> None:
        if event == "call":
            files.add(os.path.basename(frame.f_code.co_filename))

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return files


def test_off_costs_no_call(image: Image) -> None:
    """Not even with the modules loaded, and another image traced."""
    other, events = traced(image("other.qed").path)

    def work(img: qedcore.QEDImage) -> None:
        img.pwrite(b"x" * 5000, 3000)
        img.pwrite(b"x" * 5000, 3000)
        img.pwrite(b"x" * MiB, CS - 5)
        img.zero(100, 2 * CS)
        img.pread(MiB, 0)
        img.pread(512, 0)
        img.flush()

    with qedcore.open_image(image().path) as img:
        files = called_files(lambda: work(img))
    assert "read.py" in files
    assert not files & {"traced.py", "trace.py"}
    assert not events
    with other:
        assert "traced.py" in called_files(lambda: work(other))
    assert events
    assert_sound(other.storage.name)


def test_traced_and_plain_images_are_the_same(image: Image) -> None:
    """Tracing changes nothing in the file."""
    files = []
    for name, options in (("a", {}), ("b", {"trace": lambda name, args: None}), ("c", {"fault": lambda name: None})):
        built = image(f"{name}.qed", layout="DZ-D")
        with qedcore.open_image(built.path, **options) as img:
            img.pwrite(b"x" * 5000, CS - 100)
            img.pwrite(b"y" * 3 * CS, 3 * CS + 7)
            img.zero(5 * CS, 100)
            img.flush()
        files.append(built.path.read_bytes())
    assert files[0] == files[1] == files[2]
