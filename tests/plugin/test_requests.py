"""Requests through a real nbdkit: capabilities, sharing, durability, errors."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.flight import Flight
from support.patterns import KiB, MiB, Model, Op, assert_same, check_model, device, random_ops, stamp, zeros
from support.qed_image import GEOMETRIES, Built, Geometry, QedFile, assert_sound, raw_reader
from support.server import Nbdkit, import_nbd
from support.tools import PLUGIN, PYTHON, require, run, unavailable

Serve = Callable[..., Nbdkit]
CS = 64 * KiB


def fails(code: str, request: Callable[..., Any], *args: Any) -> None:
    nbd = import_nbd()
    with pytest.raises(nbd.Error) as caught:
        request(*args)
    assert caught.value.errno == code, caught.value


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_capabilities(image: Callable[..., Built], serve: Serve, read_only: bool) -> None:
    built = image(layout="D")
    server = serve(built.path, read_only=read_only)
    client = server.connect()
    assert client.get_size() == built.spec.size
    assert client.is_read_only() is read_only
    assert client.can_multi_conn() is True
    if not read_only:
        assert client.can_flush() is True
        assert client.can_fua() is True


def test_fua_is_native_and_the_thread_model_parallel() -> None:
    script = """
import importlib.util, sys, types
nbdkit = types.ModuleType("nbdkit")
class Error(Exception): pass
def attribute(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith("EXTENT"):
        return 1
    return Error if name == "Error" else name if name.isupper() else lambda *a: None
nbdkit.__getattr__ = attribute
sys.modules["nbdkit"] = nbdkit
spec = importlib.util.spec_from_file_location("qed", sys.argv[1])
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)
print(plugin.can_fua(None), plugin.thread_model())
"""
    done = subprocess.run([PYTHON, "-c", script, PLUGIN], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["FUA_NATIVE", "THREAD_MODEL_PARALLEL"], done.stdout + done.stderr
    dump = run(["nbdkit", "python", str(PLUGIN), "--dump-plugin"]).out
    assert "thread_model=parallel" in dump.splitlines()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_boundaries(image: Callable[..., Built], serve: Serve, geometry: Geometry) -> None:
    """Short and odd requests around the ends of clusters, tables and the image."""
    cs, span = geometry.cluster_size, geometry.l2_span
    size = span + 3 * cs + 512
    built = image(
        size=size,
        cluster_size=cs,
        table_size=geometry.table_size,
        layout={0: "data", 1: "zero", span // cs - 1: "data", span // cs + 1: "zero"},
    )
    server = serve(built.path)
    client = server.connect(strict=False)
    model = Model(size, built.read)
    tag = 0
    for edge in (0, cs, 2 * cs, 3 * cs, span, span + cs, size):
        for start in (-1536, -512, -511, -1, 0, 1, 512):
            for length in (1, 511, 512, 2048):
                pos = edge + start
                if pos < 0 or pos + length > size:
                    continue
                assert_same(client.pread(length, pos), model.read(pos, length), pos)
                tag = tag % 127 + 1
                model.write(pos, stamp(tag, pos, length))
                client.pwrite(stamp(tag, pos, length), pos)
    check_model(model, device(client), around=4 * KiB)
    client.shutdown()
    server.stop()
    assert_sound(built.path)
    with QedFile(built.path) as oracle:
        check_model(model, oracle.read, around=4 * KiB)


@pytest.mark.parametrize("length", [MiB, 32 * MiB], ids=["1M", "32M"])
def test_large_requests(image: Callable[..., Built], serve: Serve, length: int) -> None:
    built = image(size=48 * MiB, cluster_size=4 * KiB, table_size=2)  # spans many L2 tables
    server = serve(built.path)
    client = server.connect()
    pos = 5 * KiB
    client.pwrite(stamp(1, pos, length), pos)
    assert_same(client.pread(length, pos), stamp(1, pos, length), pos)
    assert_same(client.pread(pos, 0), bytes(pos))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(built.path)


def test_zero_requests(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="DDDDDD-Z", size=MiB)
    server = serve(built.path)
    client = server.connect()
    model = Model(MiB, built.read)
    for pos, length in ((512, 512), (CS - 512, CS + 1024), (3 * CS, 2 * CS), (6 * CS + 512, 512)):
        client.zero(length, pos)
        model.zero(pos, length)
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(built.path)


def test_one_image_behind_all_connections(image: Callable[..., Built], serve: Serve) -> None:
    built = image(size=8 * MiB)
    server = serve(built.path)
    clients = [server.connect() for _ in range(4)]
    for i, writer in enumerate(clients):
        pos = i * MiB + 3 * KiB
        writer.pwrite(stamp(i + 1, pos, 70 * KiB), pos)
        for reader in clients:
            assert_same(reader.pread(70 * KiB, pos), stamp(i + 1, pos, 70 * KiB), pos)
    for client in clients:
        client.shutdown()
    late = server.connect()
    assert_same(late.pread(70 * KiB, 3 * KiB), stamp(1, 3 * KiB, 70 * KiB))
    late.shutdown()
    server.stop()
    assert_sound(built.path)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_many_connections_mixing_requests(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, rng: random.Random, backing: bool
) -> None:
    """Writes, zeroes and flushes of several clients at once (QEMU's server aborts here, B15)."""
    size = 8 * MiB
    (tmp_path / "base.raw").write_bytes(stamp(120, 0, size // 2))
    built = image(size=size, cluster_size=4 * KiB, table_size=2, backing="base.raw" if backing else None)
    server = serve(built.path, threads=16)
    share = size // 4
    models, flights, owned = [], [], []
    for i in range(4):
        base = i * share
        ops = [Op(op.kind, op.pos + base, op.length, op.tag) for op in random_ops(rng, share, 4096, 60)]
        model = Model(size)
        with QedFile(built.path) as oracle:
            model.write(base, oracle.read(base, share))
        models.append(model)
        owned.append(ops)
        flights.append(Flight(server.connect()))
    for start in range(0, 60, 6):  # batches; within one, no two ops of a client overlap
        for flight, ops, model in zip(flights, owned, models):
            batch: list[Op] = []
            for op in ops[start : start + 6]:
                if all(op.pos >= o.pos + o.length or o.pos >= op.pos + op.length for o in batch):
                    batch.append(op)
                    op.apply(model)
            flight.issue([*batch, Op("flush", 0, 0, 1)])
        for flight in flights:
            flight.drain()
            assert not flight.failed
    for i, (flight, model) in enumerate(zip(flights, models)):
        client = flight.client
        assert_same(client.pread(share, i * share), model.read(i * share, share), i * share)
        client.shutdown()
    server.stop()
    assert server.log() == ""
    qemu.assert_check_clean(built.path)


# Durability, seen by strace.

CALLS = re.compile(r"\b(pwrite64|pwritev2?|pwritev|write|fdatasync|fsync|sync_file_range)\((\d+)")


def strace_calls(log: Path) -> list[str]:
    """Names of the write and sync calls that finished, in order."""
    return [m.group(1) for m in CALLS.finditer(log.read_text(errors="replace"))]


@pytest.mark.parametrize(
    ("cache", "how", "synced"),
    [
        ("writeback", "flush", True),
        ("writeback", "fua", True),
        ("none", "flush", True),
        ("none", "fua", True),
        ("writethrough", "write", True),
        ("unsafe", "flush", False),
        ("unsafe", "fua", False),
    ],
)
def test_flush_and_fua_reach_the_disk(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, cache: str, how: str, synced: bool
) -> None:
    require("strace")
    if run(["strace", "-D", "-o", tmp_path / "probe", "true"]).rc != 0:
        unavailable("strace may not trace here")
    nbd = import_nbd()
    log = tmp_path / "trace"
    built = image(layout="DD", size=MiB)
    server = serve(
        built.path,
        cache=cache,
        wrapper=[
            "strace",
            "-D",
            "-f",
            "-qq",
            "-o",
            str(log),
            "-e",
            "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync",
        ],
    )
    client = server.connect()
    client.pwrite(b"w" * 4096, 4096)
    other = server.connect()  # a flush covers what any connection completed
    if how == "flush":
        other.flush()
    elif how == "fua":
        other.pwrite(b"f" * 4096, CS, nbd.CMD_FLAG_FUA)
    calls = strace_calls(log)
    text = log.read_text()
    last_write = max(i for i, name in enumerate(calls) if name.startswith("pwrite"))
    syncs = [i for i, name in enumerate(calls) if name in ("fdatasync", "fsync")]
    if synced:
        assert (syncs and syncs[-1] > last_write) or "RWF_DSYNC" in text, text
    else:
        assert not syncs, text
    client.shutdown()
    other.shutdown()
    server.stop()


# Errors


def test_read_only_server_refuses_writes(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="D", size=MiB)
    before = built.path.read_bytes()
    server = serve(built.path, read_only=True)
    client = server.connect(strict=False)
    for request in (
        lambda: client.pwrite(b"x" * 512, 0),
        lambda: client.zero(512, 0),
        lambda: client.trim(512, 0),
    ):
        nbd = import_nbd()
        with pytest.raises(nbd.Error) as caught:
            request()
        assert caught.value.errno in ("EPERM", "EROFS")
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()
    server.stop()
    assert built.path.read_bytes() == before


def test_requests_beyond_the_end(image: Callable[..., Built], serve: Serve) -> None:
    size = 3 * CS + 512
    built = image(layout="DDDD", size=size)
    server = serve(built.path)
    client = server.connect(strict=False)
    for pos, length in ((size, 512), (size - 512, 1024), (size + CS, 512), (1 << 50, 512), (2**63 - 512, 512)):
        fails("EINVAL", client.pread, length, pos)
        nbd = import_nbd()
        with pytest.raises(nbd.Error) as caught:
            client.pwrite(b"x" * length, pos)
        assert caught.value.errno in ("EINVAL", "ENOSPC")
    assert_same(client.pread(size, 0), built.read(0, size))
    client.shutdown()
    server.stop()
    assert_sound(built.path)


@pytest.mark.parametrize("size", [0, 512])
def test_tiny_devices(image: Callable[..., Built], serve: Serve, size: int) -> None:
    built = image(size=size)
    server = serve(built.path)
    client = server.connect(strict=False)
    assert client.get_size() == size
    if size:
        client.pwrite(stamp(1, 0, size), 0)
        assert client.pread(size, 0) == stamp(1, 0, size)
    fails("EINVAL", client.pread, 1, size)
    client.shutdown()
    server.stop()
    assert_sound(built.path)


CORRUPT: dict[str, tuple[dict[str, Any], int, str]] = {
    # spec changes, position of the bad request, what the log names
    "misaligned entry": ({"entries": {1: 0x50088}}, CS, "0x50088"),
    "entry beyond the file": ({"entries": {1: 1 << 40}}, CS, "0x10000000000"),
    "bad L1 entry": ({"size": 6 << 30, "l1_entries": {1: 0x123}}, 2 << 30, "0x123"),
}


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_entry_fails_its_requests_only(
    image: Callable[..., Built], serve: Serve, name: str, write: bool
) -> None:
    changes, bad, value = CORRUPT[name]
    built = image(**{"layout": "D", **changes})
    server = serve(built.path)
    client = server.connect()
    other = server.connect()
    if write:
        fails("EIO", client.pwrite, b"w" * 4096, bad)
    else:
        fails("EIO", client.pread, 4096, bad)
    log = server.log()
    errors = log.splitlines()
    assert len(errors) == 1, log
    assert value in errors[0] and "Traceback" not in log
    for user in (client, other):
        assert_same(user.pread(CS, 0), built.read(0, CS))
        user.pwrite(stamp(4, 2 * CS, CS), 2 * CS)
        assert_same(user.pread(CS, 2 * CS), stamp(4, 2 * CS, CS), 2 * CS)
        user.shutdown()
    server.stop()
    # Before the file grows, an entry past its end is marked, and that is told.
    more = server.log()[len(log) :].splitlines()
    assert len(more) == (name == "entry beyond the file") and all("pointed past the end" in line for line in more)
    with QedFile(built.path) as oracle:
        assert len(oracle.verify().errors) == 1  # nothing else went wrong
        assert_same(oracle.read(2 * CS, CS), stamp(4, 2 * CS, CS), 2 * CS)


def test_errors_among_many_requests_in_flight(image: Callable[..., Built], serve: Serve) -> None:
    bad = dict.fromkeys(range(1, 64, 8), 327816)
    built = image(layout=dict.fromkeys(range(64), "-"), entries=bad)
    server = serve(built.path)
    flight = Flight(server.connect())
    flight.issue(Op("write", n * CS + 512, 4096, n + 1) for n in range(64))
    flight.drain()
    assert sorted(op.pos // CS for op, _ in flight.failed) == sorted(bad)
    assert {error for _, error in flight.failed} == {5}
    for op in flight.acked:
        assert_same(flight.client.pread(op.length, op.pos), op.data, op.pos)
    flight.client.shutdown()
    server.stop()
    assert len(server.log().splitlines()) == len(bad), server.log()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    if os.geteuid() != 0 or run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", where]).rc != 0:
        unavailable("cannot mount a tmpfs here (needs root)")
    try:
        yield where
    finally:
        run(["umount", "-l", where])


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_full_disk(
    tmp_path: Path, small_disk: Path, image: Callable[..., Built], serve: Serve, backing: bool
) -> None:
    nbd = import_nbd()
    (tmp_path / "base.raw").write_bytes(stamp(120, 0, MiB))
    options = {"backing": str(tmp_path / "base.raw"), "no_probe": True} if backing else {}
    built = image(name="small/image.qed", layout="D", size=16 * MiB, **options)
    server = serve(built.path)
    client = server.connect()
    base = raw_reader(tmp_path / "base.raw") if backing else zeros
    model = Model(16 * MiB, lambda pos, length: built.read(pos, length, base))
    check_model(model, device(client))
    refused = 0
    for n in range(1, 64):
        try:
            client.pwrite(stamp(n, n * CS + 512, CS - 1024), n * CS + 512)
            assert not refused, "a write after ENOSPC succeeded although nothing was freed"
            model.write(n * CS + 512, stamp(n, n * CS + 512, CS - 1024))
        except nbd.Error as e:
            assert e.errno == "ENOSPC", e
            refused += 1
    assert refused
    for pos in (0, 4096):  # in place writes need no space
        client.pwrite(stamp(101, pos, 4096), pos)
        model.write(pos, stamp(101, pos, 4096))
    check_model(model, device(client))
    assert "Traceback" not in server.log()
    assert server.log().count("\n") == refused
    run(["mount", "-o", "remount,size=32m", small_disk])
    for n in range(40, 64):
        client.pwrite(stamp(n, n * CS + 512, 512), n * CS + 512)  # around it: zeros, no failed write's data
        model.write(n * CS + 512, stamp(n, n * CS + 512, 512))
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    assert_sound(built.path, leaks=None)
    with QedFile(built.path) as oracle:
        check_model(model, oracle.read)


# Block status


def status(client: Any, size: int) -> list[tuple[int, int, int]]:
    """(pos, length, flags) of base:allocation over the whole device."""
    found: list[tuple[int, int, int]] = []

    def extent(context: str, offset: int, entries: list[int], error: Any) -> int:
        pos = offset
        for length, flags in zip(entries[::2], entries[1::2]):
            found.append((pos, length, flags))
            pos += length
        return 0

    pos = 0
    while pos < size:
        client.block_status(size - pos, pos, extent)
        assert found[-1][0] + found[-1][1] > pos, "no progress"
        pos = found[-1][0] + found[-1][1]
    return found


@pytest.mark.parametrize("geometry", [Geometry(4 * KiB, 2), Geometry(64 * KiB, 4)], ids=str)
def test_block_status_tells_data_from_zeros(image: Callable[..., Built], serve: Serve, geometry: Geometry) -> None:
    cs = geometry.cluster_size
    built = image(layout="DZ-DDD--ZZD", size=12 * cs - 512, cluster_size=cs, table_size=geometry.table_size)
    server = serve(built.path)
    client = server.connect(meta=True)
    nbd = import_nbd()
    seen = {}
    for pos, length, flags in status(client, built.spec.size):
        for cluster in range(pos // cs, -(-(pos + length) // cs)):
            seen.setdefault(cluster, set()).add(flags)
    for cluster in range(12):
        kind = built.kinds.get(cluster, "-")
        zero = [bool(flags & nbd.STATE_ZERO) for flags in seen[cluster]]
        assert zero == [kind != "data"], (cluster, kind, seen[cluster])
    client.shutdown()
    server.stop()


def test_block_status_never_hides_backing_data(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    (tmp_path / "base.raw").write_bytes(stamp(120, 0, 5 * CS))
    built = image(layout="DZ--", size=8 * CS, backing="base.raw", no_probe=True)
    server = serve(built.path)
    client = server.connect(meta=True)
    nbd = import_nbd()
    for pos, length, flags in status(client, built.spec.size):
        if flags & nbd.STATE_ZERO:
            assert_same(client.pread(length, pos), bytes(length), pos)
    client.shutdown()
    server.stop()
