"""Clients that others wrote: what each does is what it does on a raw file, or through qemu-nbd."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, Model, assert_same, random_ops, stamp
from support.qed_image import Built, raw_reader
from support.server import Nbdkit, QemuNbd, import_nbd, wait_for
from support.tools import require, run, run_ok

import qedcore

Serve = Callable[..., Nbdkit]
Image = Callable[..., Built]
CS = 64 * KiB
SIZE = 24 * MiB + 512
# Data that starts and ends in clusters and beside them, and zeros between them; (bytes, bytes)
ISLANDS = [(512, 3 * MiB), (4 * MiB, CS), (5 * MiB - 512, 1024), (8 * MiB, 5 * MiB), (SIZE - 512, 512)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A sparse raw file; one MiB of its data is zeros that are stored."""
    path = tmp_path / "in.raw"
    with path.open("wb") as f:
        f.truncate(SIZE)
        for i, (pos, length) in enumerate(ISLANDS):
            f.seek(pos)
            f.write(stamp(i + 1, pos, length))
        f.seek(10 * MiB)
        f.write(bytes(MiB))
    return path


def new_image(path: Path, size: int = SIZE, used: bool = False) -> Path:
    """An empty image; with `used` one that holds something else nearly everywhere."""
    qedcore.create(str(path), size)
    if used:
        with qedcore.open_image(str(path)) as img:
            for pos in (*range(0, 6 * MiB, MiB), *range(9 * MiB, size, MiB)):
                img.pwrite(stamp(99, pos, min(MiB, size - pos)), pos)
    return path


def same_file(got: Path, want: Path) -> None:
    assert_same(got.read_bytes(), want.read_bytes())


def agrees(path: Path, want: Path) -> None:
    """QEMU finds the image clean, and reads in it what is in the raw file."""
    qemu.assert_check_clean(path)
    out = path.with_suffix(".as-qemu-reads-it")
    qemu.to_raw(path, out)
    same_file(out, want)


# nbdinfo


def nbdinfo(uri: str) -> dict[str, Any]:
    (export,) = json.loads(run_ok(["nbdinfo", "--json", uri]))["exports"]
    return {key: value for key, value in export.items() if key not in ("uri", "export-name")}


def allocation(uri: str) -> list[tuple[int, int, int]]:
    """(pos, bytes, type) of nbdinfo --map, which may split a run."""
    found: list[tuple[int, int, int]] = []
    for run_ in json.loads(run_ok(["nbdinfo", "--map", "--json", uri])):
        if found and found[-1][2] == run_["type"]:
            pos, length, kind = found.pop()
            found.append((pos, length + run_["length"], kind))
        else:
            found.append((run_["offset"], run_["length"], run_["type"]))
    return found


CAN = ("cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "zero")


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_nbdinfo(tmp_path: Path, image: Image, serve: Serve, backing: bool) -> None:
    require("nbdinfo")
    (tmp_path / "base.raw").write_bytes(stamp(5, 0, 5 * CS) + bytes(2 * CS) + stamp(5, 7 * CS, CS))
    built = image(size=MiB + 512, layout="DZ-D-D----D-Z", backing="base.raw" if backing else None, no_probe=backing)
    server = serve(built.path)
    ours, our_map = nbdinfo(server.uri), allocation(server.uri)
    assert {name for name in CAN if run(["nbdinfo", "--can", name, server.uri]).rc == 0} == set(CAN)
    assert run(["nbdinfo", "--is", "read-only", server.uri]).rc == 2
    assert run_ok(["nbdinfo", "--size", server.uri]).strip() == str(MiB + 512)
    (listed,) = json.loads(run_ok(["nbdinfo", "--list", "--json", server.uri]))["exports"]
    assert listed["export-name"] == "" and listed["can_trim"] and listed["export-size"] == MiB + 512
    server.stop()
    with QemuNbd(built.path) as reference:
        theirs, their_map = nbdinfo(reference.uri), allocation(reference.uri)
    assert our_map == their_map
    assert ours.pop("description").startswith("QED image, ")
    assert ours.pop("block_size_minimum") == 1 and ours.pop("block_size_preferred") == CS
    for key in ("description", "block_size_minimum", "block_size_preferred"):
        theirs.pop(key, None)
    assert ours == theirs
    read_only = serve(built.path, read_only=True)
    assert {name for name in CAN if run(["nbdinfo", "--can", name, read_only.uri]).rc == 0} == {
        "cache", "df", "flush", "multi-conn"
    }  # fmt: skip
    assert allocation(read_only.uri) == their_map


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_holes_of_backing_files(tmp_path: Path, image: Image, serve: Serve, format: str) -> None:
    """A sparse file under the image is mapped as QEMU maps it, which knows its holes, too."""
    require("nbdinfo")
    base = tmp_path / "base"
    with base.open("wb") as f:
        f.truncate(40 * MiB + 512)
        for pos in (0, 3 * MiB, 3 * MiB + 2 * CS, 20 * MiB):
            f.seek(pos)
            f.write(stamp(5, pos, CS))
    if format == "qcow2":
        base.rename(tmp_path / "raw")
        qemu.qemu_img_ok("convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", base)
    built = image(size=64 * MiB, layout="DZ-D-D----D-Z", backing="base", no_probe=format == "raw")
    options = {} if format == "raw" else {"backing-format": "qcow2", "backing": "any"}
    server = serve(built.path, **options)
    ours = allocation(server.uri)
    client = server.connect(meta=True)
    found: list[list[int]] = []
    client.block_status(MiB, 3 * MiB + 1000, lambda context, pos, entries, error: found.append(entries) or 0)
    assert sum(found[0][::2]) >= MiB and found[0][:4] == [CS - 1000, 0, CS, 3]
    client.shutdown()
    server.stop()
    with QemuNbd(built.path) as reference:
        assert ours == allocation(reference.uri)


# nbdcopy

COPY = {
    "default": [],
    "allocated": ["--allocated"],
    "no extents": ["--no-extents"],
    "synchronous": ["--synchronous", "--flush"],
    "four connections": ["--connections=4", "--requests=64", "--request-size=65536", "--flush"],
    "fine": ["--sparse=512", "--request-size=4096"],
    "not sparse": ["--sparse=0"],
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("name", COPY)
def test_nbdcopy_into(tmp_path: Path, raw: Path, serve: Serve, name: str, used: bool) -> None:
    require("nbdcopy")
    path = new_image(tmp_path / "image.qed", used=used)
    server = serve(path)
    run_ok(["nbdcopy", *COPY[name], raw, server.uri])
    server.stop()
    agrees(path, raw)


def test_nbdcopy_into_an_image_of_zeros(tmp_path: Path, raw: Path, serve: Serve) -> None:
    """Nothing is asked about it and no zeros are written: it is as small as QEMU makes it."""
    require("nbdcopy")
    path = new_image(tmp_path / "image.qed")
    server = serve(path)
    run_ok(["nbdcopy", "--destination-is-zero", raw, server.uri])
    server.stop()
    agrees(path, raw)
    qemu.qemu_img_ok("convert", "-f", "raw", "-O", "qed", raw, tmp_path / "qemu.qed")
    assert os.path.getsize(path) <= os.path.getsize(tmp_path / "qemu.qed")


@pytest.mark.parametrize("name", ["default", "allocated", "no extents", "four connections"])
def test_nbdcopy_out(tmp_path: Path, image: Image, serve: Serve, name: str) -> None:
    require("nbdcopy")
    (tmp_path / "base.raw").write_bytes(stamp(5, 0, 90 * CS))
    built = image(size=9 * MiB, layout="DZ-D" * 30, backing="base.raw", no_probe=True)
    server = serve(built.path, read_only=True)
    run_ok(["nbdcopy", *COPY[name], server.uri, tmp_path / "out.raw"])
    server.stop()
    qemu.to_raw(built.path, tmp_path / "qemu.raw")
    same_file(tmp_path / "out.raw", tmp_path / "qemu.raw")


@pytest.mark.parametrize("fill", ["nbdcopy", "qemu-img"])
def test_between_two_servers(tmp_path: Path, raw: Path, serve: Serve, fill: str) -> None:
    """From one image into another of other geometry that has data, without a file between."""
    require("nbdcopy")
    source = new_image(tmp_path / "source.qed")
    qemu.qemu_img_ok("convert", "-n", "-f", "raw", "-O", "qed", raw, source)
    target = tmp_path / "target.qed"
    qedcore.create(str(target), SIZE, cluster_size=4 * KiB, table_size=2)
    with qedcore.open_image(str(target)) as img:
        img.pwrite(stamp(99, 0, 12 * MiB), 0)
    first, second = serve(source, read_only=True), serve(target)
    if fill == "nbdcopy":
        run_ok(["nbdcopy", first.uri, second.uri])
    else:
        qemu.qemu_img_ok("convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", first.uri, second.uri)
    second.stop()
    first.stop()
    agrees(target, raw)
    agrees(source, raw)


# qemu-img convert

CONVERT = {
    "default": [],
    "16 coroutines": ["-m", "16"],
    "out of order": ["-m", "16", "-W"],
    "all zeros stored": ["-S", "0"],
    "large zeros only": ["-S", "256k"],
    "direct": ["-t", "none", "-T", "none"],
}


@pytest.mark.parametrize("name", CONVERT)
def test_qcow2_in_and_out(tmp_path: Path, raw: Path, serve: Serve, name: str) -> None:
    """qcow2 > served image that was used before > qcow2: each is what was there first."""
    qemu.qemu_img_ok("convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "in.qcow2")
    path = new_image(tmp_path / "image.qed", used=True)
    server = serve(path)
    options = CONVERT[name]
    qemu.qemu_img_ok("convert", "-n", "-f", "qcow2", "-O", "raw", *options, tmp_path / "in.qcow2", server.uri)
    qemu.qemu_img_ok("convert", "-f", "raw", "-O", "qcow2", *options, server.uri, tmp_path / "out.qcow2")
    qemu.qemu_img_ok("compare", "-f", "raw", "-F", "qcow2", server.uri, tmp_path / "in.qcow2")
    server.stop()
    agrees(path, raw)
    qemu.qemu_img_ok("check", "-f", "qcow2", tmp_path / "out.qcow2")
    qemu.qemu_img_ok("compare", "-f", "qcow2", "-F", "raw", tmp_path / "out.qcow2", raw)


# fio

FIO = """
[global]
ioengine=nbd
uri={uri}
size={size}
verify=crc32c
iodepth=16
randseed={seed}

[write-a]
rw=randwrite
bsrange=512-192k
bs_unaligned=0
fsync=32
verify_backlog=64

[write-b]
rw=randrw
offset={size}
bs=4k
fsync=64

[trim-a]
rw=randtrimwrite
offset={trim_a}
bs=64k
serialize_overlap=1
trim_percentage=50
trim_backlog=32
trim_verify_zero=1
verify_backlog=64

[trim-b]
rw=randtrimwrite
offset={trim_b}
bs=32k
serialize_overlap=1
fsync=64
"""
FIO_JOBS = 4


def run_fio(tmp_path: Path, uri: str, size: int, seed: int) -> subprocess.Popen[bytes]:
    """Start the four jobs, each on a connection and `size` bytes of its own."""
    job = tmp_path / "job.fio"
    job.write_text(FIO.format(uri=uri, size=size, seed=seed, trim_a=2 * size, trim_b=3 * size))
    argv = ["fio", f"--output={tmp_path / 'fio.json'}", "--output-format=json", str(job)]
    with open(tmp_path / "fio.log", "wb") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=tmp_path)


def fio_result(tmp_path: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    """All was verified, and there was something of each kind."""
    rc = process.wait(seconds)
    text = (tmp_path / "fio.json").read_text()
    assert rc == 0, f"{text}\n{(tmp_path / 'fio.log').read_text()}"
    jobs = json.loads(text[text.index("{") :])["jobs"]  # a note may come before
    assert len(jobs) == FIO_JOBS and not any(job["error"] for job in jobs)
    for kind in ("read", "write", "trim", "sync"):
        assert sum(job[kind]["total_ios"] for job in jobs), kind


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_fio_verifies(
    tmp_path: Path, image: Image, serve: Serve, rng: random.Random, backing: bool, size: int = 6 * MiB
) -> None:
    """Writes, trims and flushes of fio on four connections, and zeroing by qemu-io on a fifth."""
    require("fio", "qemu-io", "nbdcopy")
    total = (FIO_JOBS + 1) * size
    if backing:
        (tmp_path / "base.raw").write_bytes(stamp(7, 0, total))
    built = image(size=total, layout="DZ-D" * 20, backing="base.raw" if backing else None, no_probe=backing)
    base = stamp(7, 0, total) if backing else bytes(total)
    model = Model(total, lambda pos, n: built.read(pos, n, lambda p, m: base[p : p + m]))
    server = serve(built.path)
    fio = run_fio(tmp_path, server.uri, size, rng.randrange(1 << 30))
    commands = []
    try:
        for op in random_ops(rng, size, CS, 150):
            pos, pattern = FIO_JOBS * size + op.pos, op.tag if op.kind == "write" else 0
            model.write(pos, bytes([pattern]) * op.length)
            commands.append(f"write -q {f'-P {pattern}' if pattern else rng.choice(('-z', '-zu'))} {pos} {op.length}")
            if rng.random() < 0.1:
                commands.append("flush")
        qemu.qemu_io_ok(server.uri, *commands, fmt="raw")
        fio_result(tmp_path, fio, 120)
    finally:
        fio.kill()
        fio.wait()
    run_ok(["nbdcopy", server.uri, tmp_path / "served.raw"])
    server.stop()
    agrees(built.path, tmp_path / "served.raw")
    read = raw_reader(tmp_path / "served.raw")
    assert_same(read(FIO_JOBS * size, size), model.read(FIO_JOBS * size, size), FIO_JOBS * size)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("turn", range(4))
def test_fio_verifies_for_long(tmp_path: Path, image: Image, serve: Serve, rng: random.Random, turn: int) -> None:
    test_fio_verifies(tmp_path, image, serve, rng, turn % 2 == 1, 96 * MiB)


def test_what_fio_wrote_is_there_for_qemu(tmp_path: Path, serve: Serve, rng: random.Random) -> None:
    """fio verifies its own writes once more, in the raw file that QEMU makes of the image."""
    require("fio")
    path = new_image(tmp_path / "image.qed", 16 * MiB)
    server = serve(path)
    job = ["fio", f"--output={tmp_path / 'fio.log'}", f"--randseed={rng.getrandbits(30)}"]
    job += ["--name=j", "--rw=randwrite", "--bs=4k", "--size=16m", "--verify=crc32c"]
    run_ok([*job, "--ioengine=nbd", f"--uri={server.uri}", "--iodepth=32", "--do_verify=0"], cwd=tmp_path)
    server.stop()
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "out.raw")
    run_ok([*job, "--ioengine=psync", f"--filename={tmp_path / 'out.raw'}", "--verify_only"], cwd=tmp_path)


# A file system, through nbdfuse


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """fuse(uri) mounts a server, and returns the file that is its disk; unmounted at the end."""
    require("nbdfuse", "fusermount3")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    directory, pid = tmp_path / "mnt", tmp_path / "nbdfuse.pid"
    directory.mkdir()
    mounts: list[subprocess.Popen[bytes]] = []

    def mount(uri: str) -> Path:
        mounts.append(subprocess.Popen(["nbdfuse", "-P", pid, directory / "disk", uri], stdin=subprocess.DEVNULL))
        wait_for(lambda: pid.exists() or mounts[-1].poll() is not None, "nbdfuse has mounted")
        assert mounts[-1].poll() is None, "nbdfuse has failed"
        return directory / "disk"

    yield mount
    if mounts and mounts[-1].poll() is None:
        run(["fusermount3", "-u", directory])
        mounts[-1].wait(20)


def unmount(disk: Path) -> None:
    run_ok(["fusermount3", "-u", disk.parent])


def debugfs(disk: Path, *commands: str) -> str:
    result = run(["debugfs", "-w", "-f", "-", disk], stdin="\n".join(commands) + "\n")
    assert result.rc == 0, result.text
    return result.out


def test_file_system_with_discard(tmp_path: Path, serve: Serve, fuse: Callable[[str], Path]) -> None:
    """Made, filled, partly emptied, discarded and filled again: the files are right and the image is small."""
    require("mke2fs", "debugfs", "e2fsck", "fusermount3")
    files = {}
    for i in range(12):
        files[f"f{i}"] = tmp_path / f"f{i}"
        files[f"f{i}"].write_bytes(stamp(i + 1, 0, 2 * MiB + i * 4099))
    path = new_image(tmp_path / "image.qed", 64 * MiB)
    server = serve(path)
    disk = fuse(server.uri)
    run_ok(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "discard", disk])
    debugfs(disk, *(f"write {source} {name}" for name, source in files.items()))
    allocated = path.stat().st_blocks * 512
    gone = [f"f{i}" for i in range(12) if i % 3]
    debugfs(disk, *(f"rm {name}" for name in gone))
    discarded = run(["e2fsck", "-fy", "-E", "discard", disk])
    assert discarded.rc in (0, 1), discarded.text
    import_nbd()
    client = server.connect()
    client.flush()
    client.shutdown()
    assert path.stat().st_blocks * 512 < allocated - 12 * MiB
    for name in gone[:3]:
        debugfs(disk, f"write {files[name]} {name}")
    unmount(disk)
    server.stop()
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "out.raw")
    run_ok(["e2fsck", "-fn", tmp_path / "out.raw"])
    kept = set(files) - set(gone[3:])
    listed = debugfs(tmp_path / "out.raw", "ls -p /")
    assert {name for name in files if f"/{name}/" in listed} == kept
    for name in sorted(kept):
        debugfs(tmp_path / "out.raw", f"dump {name} {tmp_path / 'back'}")
        same_file(tmp_path / "back", files[name])


# Backing files of other formats


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_chain_over_another_format_is_flattened(
    tmp_path: Path, raw: Path, image: Image, serve: Serve, fmt: str
) -> None:
    """As QEMU flattens it; one process reads what is under the image, however many requests there are."""
    import_nbd()
    require("nbdcopy", "qemu-nbd")
    qemu.qemu_img_ok("convert", "-f", "raw", "-O", fmt, raw, tmp_path / "base")
    if fmt == "qcow2":
        qemu.qemu_img_ok("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "over", cwd=tmp_path)
        qemu.qemu_io_ok(tmp_path / "over", "write -q -P 9 3000k 300k", "write -q -z 8M 1M", fmt="qcow2")
    image("middle.qed", size=SIZE + MiB, layout="-D--Z", backing="over" if fmt == "qcow2" else "base")
    top = image("top.qed", size=SIZE + MiB, layout="--D---Z", tag=2, backing="middle.qed")
    server = serve(top.path, read_only=True, **{"backing-format": fmt})
    before = children(server.pid)
    run_ok(["nbdcopy", "--connections=4", "--requests=64", "--request-size=65536", server.uri, tmp_path / "out.raw"])
    assert len(before) == 1 and children(server.pid) == before
    server.stop()
    qemu.to_raw(top.path, tmp_path / "qemu.raw")
    same_file(tmp_path / "out.raw", tmp_path / "qemu.raw")


def children(pid: int) -> list[str]:
    """The processes that a server has started, by any of its threads."""
    return sorted(
        child
        for task in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    )
