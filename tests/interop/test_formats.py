"""Images of QEMU read here and images of ours read by QEMU, at several geometries."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.patterns import (
    GiB,
    KiB,
    MiB,
    Model,
    Op,
    assert_same,
    check_model,
    device,
    random_ops,
    stamp,
)
from support.qed_image import (
    GEOMETRIES,
    QEMU_GEOMETRIES,
    Built,
    Geometry,
    QedFile,
    assert_sound,
    raw_reader,
    read_header,
)
from support.server import Nbdkit
from support.tools import PYTHON, REPO, require, run, run_ok

import qedcore

Serve = Callable[..., Nbdkit]


def device_size(geometry: Geometry) -> int:
    """Two L2 tables and a bit where that is small, else a few clusters; never a cluster multiple."""
    if geometry.l2_span <= 16 * MiB:
        return 2 * geometry.l2_span + 3 * geometry.cluster_size + 1536
    return max(16 * MiB, 8 * geometry.cluster_size) + 1536


def workload(rng: random.Random, geometry: Geometry, size: int, count: int = 40) -> tuple[list[Op], Model]:
    ops = random_ops(rng, size, geometry.cluster_size, count)
    model = Model(size)
    for op in ops:
        op.apply(model)
    return ops, model


@pytest.mark.parametrize("geometry", QEMU_GEOMETRIES, ids=str)
def test_qemu_writes_we_read(tmp_path: Path, serve: Serve, rng: random.Random, geometry: Geometry) -> None:
    path, size = tmp_path / "q.qed", device_size(geometry)
    qemu.create(path, size, geometry)
    ops, model = workload(rng, geometry, size)
    qemu.apply(path, ops, tmp_path)
    content = path.read_bytes()
    with qedcore.open_image(str(path), writable=False) as img:
        check_model(model, device(img))
    server = serve(path, read_only=True)
    client = server.connect()
    check_model(model, device(client))
    client.shutdown()
    qemu.to_raw(server.uri, tmp_path / "nbd.raw", fmt="raw")
    server.stop()
    check_model(model, raw_reader(tmp_path / "nbd.raw"))
    assert path.read_bytes() == content


@pytest.mark.parametrize("geometry", QEMU_GEOMETRIES, ids=str)
def test_we_write_qemu_reads(tmp_path: Path, serve: Serve, rng: random.Random, geometry: Geometry) -> None:
    path, size = tmp_path / "o.qed", device_size(geometry)
    qedcore.create(str(path), size, cluster_size=geometry.cluster_size, table_size=geometry.table_size)
    qemu.assert_check_clean(path)
    server = serve(path)
    client = server.connect()
    ops, model = workload(rng, geometry, size)
    for op in ops:
        if op.kind == "zero":
            client.zero(op.length, op.pos)
        else:
            client.pwrite(op.data, op.pos)
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "o.raw")
    check_model(model, raw_reader(tmp_path / "o.raw"))
    for op in ops[-3:]:
        (tmp_path / "want").write_bytes(model.read(op.pos, op.length))
        dump = qemu.qemu_io_ok(path, f"read -v {op.pos} 512", read_only=True)
        words = b"".join(
            bytes.fromhex(line.split(":")[1].split("  ")[1].replace(" ", ""))
            for line in dump.splitlines()
            if line[:8].strip() and line[8:9] == ":"
        )
        assert_same(words, model.read(op.pos, 512), op.pos)


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if not g.qemu_opens], ids=str)
def test_geometries_that_qemu_cannot_open(
    tmp_path: Path, serve: Serve, rng: random.Random, geometry: Geometry
) -> None:
    path, size = tmp_path / "o.qed", device_size(geometry)
    qedcore.create(str(path), size, cluster_size=geometry.cluster_size, table_size=geometry.table_size)
    server = serve(path)
    client = server.connect()
    ops, model = workload(rng, geometry, size, 12)
    for op in ops:
        client.pwrite(op.data if op.kind == "write" else bytes(op.length), op.pos)
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    assert_sound(path)
    with QedFile(path) as oracle:
        check_model(model, oracle.read)


@pytest.mark.parametrize("geometry", [Geometry(4 * KiB, 2), Geometry(64 * KiB, 4)], ids=str)
def test_taking_turns(tmp_path: Path, rng: random.Random, geometry: Geometry) -> None:
    """Each goes on with what the other left, into the same tables and clusters."""
    path, size = tmp_path / "t.qed", device_size(geometry)
    qemu.create(path, size, geometry)
    model = Model(size)
    for turn in range(4):
        ops = random_ops(rng, size, geometry.cluster_size, 15)
        if turn % 2:
            qemu.apply(path, ops, tmp_path)
        else:
            with qedcore.open_image(str(path)) as img:
                for op in ops:
                    img.pwrite(op.data if op.kind == "write" else bytes(op.length), op.pos)
        for op in ops:
            op.apply(model)
        qemu.assert_check_clean(path)
        with qedcore.open_image(str(path), writable=False) as img:
            check_model(model, device(img))
    qemu.to_raw(path, tmp_path / "t.raw")
    check_model(model, raw_reader(tmp_path / "t.raw"))


CRAFTED = {
    "header_size 0": {"header_size": 0},
    "header_size 3": {"header_size": 3},
    "header_size 3, L1 last": {"header_size": 3, "l1_last": True},
    "L1 last, data descending": {"l1_last": True, "reverse": True},
    "all compat bits": {"compat_features": 2**64 - 1},
    "leaks": {"leaks": 3},
}


@pytest.mark.parametrize("geometry", [Geometry(4 * KiB, 2), Geometry(64 * KiB, 4)], ids=str)
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_images_written_here(
    tmp_path: Path,
    image: Callable[..., Built],
    serve: Serve,
    rng: random.Random,
    geometry: Geometry,
    name: str,
) -> None:
    cs = geometry.cluster_size
    built = image(
        size=64 * cs,
        cluster_size=cs,
        table_size=geometry.table_size,
        layout="DZ-DDD--ZZD",
        **CRAFTED[name],
    )
    server = serve(built.path)
    client = server.connect()
    model = Model(built.spec.size, built.read)
    for op in random_ops(rng, built.spec.size, cs, 20):
        op.apply(model)
        if op.kind == "zero":
            client.zero(op.length, op.pos)
        else:
            client.pwrite(op.data, op.pos)
    client.shutdown()
    server.stop()
    header = read_header(built.path)
    assert header["header_size"] == built.spec.header_size
    assert header["compat_features"] == built.spec.compat_features
    if name == "leaks":
        assert_sound(built.path, leaks=3)
    else:
        qemu.assert_check_clean(built.path)
    qemu.to_raw(built.path, tmp_path / "out.raw")
    check_model(model, raw_reader(tmp_path / "out.raw"))


def test_create_and_info_agree_with_qemu_img(tmp_path: Path) -> None:
    """The command: same header as qemu-img create writes, and info that says what is in it."""
    for i, (options, size) in enumerate(
        (
            ([], "1G"),
            (["-o", "cluster_size=4096,table_size=2"], "64M"),
            (["-o", "cluster_size=1M,table_size=16"], "10G"),
        )
    ):
        ours, theirs = tmp_path / f"o{i}.qed", tmp_path / f"q{i}.qed"
        run_ok([PYTHON, "-m", "qedcore", "create", *options, ours, size], cwd=REPO)
        qemu.qemu_img_ok("create", "-q", "-f", "qed", *options, theirs, size)
        assert read_header(ours) == read_header(theirs)
        qemu.assert_check_clean(ours)
        text = run_ok([PYTHON, "-m", "qedcore", "info", theirs], cwd=REPO)
        for name in ("cluster_size", "table_size", "image_size"):
            assert str(read_header(theirs)[name]) in text.replace(",", ""), (name, text)


def test_info_of_what_does_not_open(image: Callable[..., Built], tmp_path: Path) -> None:
    """It is one line, and where the image is damaged another one that tells what to do."""
    image(name="broken.qed", header={"table_size": 3})
    for target, words, advice in (
        (
            "broken.qed",
            "table size is invalid",
            ["'qed check -r all' repairs what it can; 'qed salvage' rescues what"],
        ),
        ("absent.qed", "absent.qed", []),
    ):
        result = run([PYTHON, "-m", "qedcore", "info", tmp_path / target], cwd=REPO)
        assert (result.rc, result.out) == (1, "")
        lines = result.err.splitlines()
        assert words in lines[0] and lines[1:] == [f"qed: {line} is left" for line in advice]


# Copies in both directions


def sparse_raw(path: Path, size: int, islands: list[tuple[int, int]]) -> Model:
    """A sparse raw file of `size` bytes with stamped (pos, length) islands."""
    model = Model(size)
    with path.open("wb") as f:
        f.truncate(size)
        for i, (pos, length) in enumerate(islands):
            f.seek(pos)
            f.write(stamp(i + 1, pos, length))
            model.write(pos, stamp(i + 1, pos, length))
    return model


ISLANDS = [
    (0, 4096),
    (64 * KiB - 512, 1024),
    (2 * GiB - 128 * KiB, 256 * KiB),  # over an L2 end of the default geometry
    (4 * GiB - 64 * KiB, 128 * KiB),  # over 2**32
    (4 * GiB + 5 * MiB + 512, 3 * MiB),
    (5 * GiB - 4096, 4096),
]


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
@pytest.mark.parametrize(
    ("size", "islands"),
    [(20 * MiB + 512, [(512, 3 * MiB), (10 * MiB, 5 * MiB), (20 * MiB, 512)]), (5 * GiB, ISLANDS)],
    ids=["20M", "5G sparse"],
)
def test_copies_in_and_out(
    tmp_path: Path, serve: Serve, tool: str, size: int, islands: list[tuple[int, int]]
) -> None:
    require("nbdcopy")
    model = sparse_raw(tmp_path / "in.raw", size, islands)
    path = tmp_path / "image.qed"
    qedcore.create(str(path), size)
    server = serve(path)
    copy(tool, tmp_path / "in.raw", server.uri)
    copy(tool, server.uri, tmp_path / "out.raw")
    server.stop()
    check_model(model, raw_reader(tmp_path / "out.raw"))
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "qemu.raw")
    check_model(model, raw_reader(tmp_path / "qemu.raw"))
    qemu.qemu_img_ok("compare", "-f", "raw", "-F", "qed", tmp_path / "in.raw", path)
    if size >= 4 * GiB:
        copied = path.stat().st_blocks * 512
        assert copied < 64 * MiB, f"{copied} bytes on disk: the copy is not sparse"


def copy(tool: str, source: Path | str, target: Path | str) -> None:
    """nbdcopy and qemu-img, told that a new image reads as zeros."""
    if tool == "nbdcopy":
        args = ["nbdcopy"]
        if isinstance(target, str):
            args.append("--destination-is-zero")
        else:
            target.touch()
        run_ok([*args, source, target])
        return
    args = ["convert", "-f", "raw", "-O", "raw"]
    if isinstance(target, str):
        args += ["-n", "--target-is-zero"]
    qemu.qemu_img_ok(*args, source, target)


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
def test_copy_over_old_data_without_hints(tmp_path: Path, serve: Serve, tool: str) -> None:
    """Zeros of the source must overwrite what the image held."""
    size = 6 * MiB
    model = sparse_raw(tmp_path / "in.raw", size, [(MiB, 64 * KiB), (5 * MiB + 512, 1024)])
    path = tmp_path / "image.qed"
    qedcore.create(str(path), size, cluster_size=4096, table_size=2)
    with qedcore.open_image(str(path)) as img:
        img.pwrite(stamp(99, 0, 3 * MiB), 0)
    server = serve(path)
    if tool == "nbdcopy":
        run_ok(["nbdcopy", tmp_path / "in.raw", server.uri])
    else:
        qemu.qemu_img_ok("convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "in.raw", server.uri)
    server.stop()
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "out.raw")
    check_model(model, raw_reader(tmp_path / "out.raw"))


def test_real_file_system_survives_the_trip(tmp_path: Path, serve: Serve) -> None:
    require("mkfs.ext4", "e2fsck", "nbdcopy")
    source, path = tmp_path / "fs.raw", tmp_path / "fs.qed"
    content = tmp_path / "content"
    content.mkdir()
    (content / "file").write_bytes(stamp(1, 0, 300 * KiB))
    run_ok(["truncate", "-s", "32M", source])
    run_ok(["mkfs.ext4", "-q", "-F", "-d", content, source])
    qedcore.create(str(path), 32 * MiB)
    server = serve(path)
    run_ok(["nbdcopy", source, server.uri])
    server.stop()
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes() == source.read_bytes()
    run_ok(["e2fsck", "-fn", tmp_path / "back.raw"])


def test_qemu_io_over_nbd(image: Callable[..., Built], serve: Serve, rng: random.Random, tmp_path: Path) -> None:
    """qemu-io as the client: random writes and zero writes, checked by QEMU on the file itself."""
    built = image(size=8 * MiB, layout="DZ-D")
    server = serve(built.path)
    model = Model(8 * MiB, built.read)
    commands = []
    for op in random_ops(rng, 8 * MiB, 64 * KiB, 30):
        pattern = op.tag if op.kind == "write" else 0
        model.write(op.pos, bytes([pattern]) * op.length)
        commands.append(f"write -q {'-z' if not pattern else f'-P {pattern}'} {op.pos} {op.length}")
    qemu.qemu_io_ok(server.uri, *commands, fmt="raw")
    server.stop()
    qemu.assert_check_clean(built.path)
    qemu.to_raw(built.path, tmp_path / "out.raw")
    check_model(model, raw_reader(tmp_path / "out.raw"))


def test_dirty_image_of_ours_is_repaired_by_qemu(tmp_path: Path) -> None:
    """A process that dies leaves NEED_CHECK; QEMU opens, checks and reads what was written."""
    path = tmp_path / "d.qed"
    qedcore.create(str(path), 8 * MiB)
    script = (
        "import os, sys, qedcore\n"
        "img = qedcore.open_image(sys.argv[1])\n"
        "img.pwrite(b'd' * 100000, 1000448)\n"
        "img.flush()\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([PYTHON, "-c", script, path], cwd=REPO, timeout=60, check=False)
    assert done.returncode == 0
    assert read_header(path)["features"] & 2
    qemu.qemu_io_ok(path, f"read -P {ord('d')} 1000448 100000", "read -P 0 0 1000448", "write -P 1 0 512")
    assert_sound(path, leaks=None)
    with qedcore.open_image(str(path)) as img:
        assert img.pread(100000, 1000448) == b"d" * 100000
