"""Backing files: chains of QEMU and ours, what is copied up, and which formats and names are allowed."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, Model, Reader, assert_same, check_model, device, random_ops, stamp
from support.qed_image import Built, Geometry, QedFile, assert_sound, patch_header, raw_reader
from support.server import Nbdkit

import qedcore
from qedcore.errors import QEDError

Serve = Callable[..., Nbdkit]
CS = 64 * KiB


def raw_file(path: Path, size: int, tag: int = 120) -> Reader:
    path.write_bytes(stamp(tag, 0, size))
    return raw_reader(path)


def read_all(path: Path, chunk: int = MiB) -> bytes:
    with qedcore.open_image(str(path), writable=False) as img:
        return b"".join(bytes(img.pread(min(chunk, img.size - p), p)) for p in range(0, img.size, chunk))


# Sizes of the backing file against an overlay of 1 MiB + 512
OVERLAY = MiB + 512
SIZES = {
    "equal": OVERLAY,
    "longer": 2 * MiB,
    "shorter": 5 * CS,
    "shorter by a sector": OVERLAY - 512,
    "ends inside a cluster": 5 * CS + 1536,
    "unaligned": 5 * CS + 700,
    "unaligned by 1": 5 * CS + 1,
    "unaligned below a cluster": 5 * CS - 1,
    "1 byte": 1,
    "513 bytes": 513,
    "empty": 0,
}


@pytest.mark.parametrize("geometry", [Geometry(4 * KiB, 2), Geometry(64 * KiB, 4), Geometry(MiB, 2)], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_qed_over_raw(tmp_path: Path, serve: Serve, rng: random.Random, geometry: Geometry, name: str) -> None:
    """Read, then written at random through the server; QEMU reads the same."""
    base = raw_file(tmp_path / "base.raw", SIZES[name])
    content = (tmp_path / "base.raw").read_bytes()
    path = tmp_path / "o.qed"
    qemu.create(path, OVERLAY, geometry, backing="base.raw")
    server = serve(path)
    client = server.connect(strict=False)
    model = Model(OVERLAY, base)
    check_model(model, device(client))
    for op in random_ops(rng, OVERLAY, geometry.cluster_size, 20, zeroes=False, max_length=100 * KiB):
        client.pwrite(op.data, op.pos)
        op.apply(model)
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(path)
    if SIZES[name] % 512 == 0:  # else QEMU rounds the size up and reads a short tail
        qemu.to_raw(path, tmp_path / "out.raw")
        check_model(model, raw_reader(tmp_path / "out.raw"))
    with QedFile(path) as oracle:
        check_model(model, oracle.read)
    assert (tmp_path / "base.raw").read_bytes() == content


def chain(tmp_path: Path, rng: random.Random) -> tuple[Path, Model]:
    """top.qed (4K_2) over middle.qed (64K_4) over base.raw, in three directories, written by QEMU."""
    for name in ("top", "middle", "base"):
        (tmp_path / name).mkdir()
    raw_file(tmp_path / "base" / "base.raw", 2 * MiB)
    qemu.create(tmp_path / "middle" / "middle.qed", 3 * MiB, backing="../base/base.raw")
    qemu.create(
        tmp_path / "top" / "top.qed",
        4 * MiB,
        Geometry(4 * KiB, 2),
        backing="../middle/middle.qed",
        backing_fmt="qed",
    )
    below = Model(3 * MiB, raw_reader(tmp_path / "base" / "base.raw"))
    ops = random_ops(rng, 3 * MiB, CS, 10, zeroes=False)
    qemu.apply(tmp_path / "middle" / "middle.qed", ops, tmp_path)
    for op in ops:
        op.apply(below)
    below_bytes = below.read(0, 3 * MiB)
    model = Model(4 * MiB, lambda pos, n: below_bytes[pos : pos + n] + bytes(n - len(below_bytes[pos : pos + n])))
    ops = random_ops(rng, 4 * MiB, 4 * KiB, 10, zeroes=False, max_length=64 * KiB)
    qemu.apply(tmp_path / "top" / "top.qed", ops, tmp_path)
    for op in ops:
        op.apply(model)
    return tmp_path / "top" / "top.qed", model


def test_qed_over_qed_over_raw(tmp_path: Path, serve: Serve, rng: random.Random) -> None:
    path, model = chain(tmp_path, rng)
    below = [(tmp_path / "middle" / "middle.qed"), (tmp_path / "base" / "base.raw")]
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in below]
    server = serve(path)
    client = server.connect()
    check_model(model, device(client))
    for op in random_ops(rng, 4 * MiB, 4 * KiB, 30):
        op.apply(model)
        client.pwrite(op.data if op.kind == "write" else bytes(op.length), op.pos)
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(path)
    qemu.to_raw(path, tmp_path / "out.raw")
    check_model(model, raw_reader(tmp_path / "out.raw"))
    assert [(p.read_bytes(), p.stat().st_mtime_ns) for p in below] == before


@pytest.mark.parametrize("depth", [2, 12, 300])
def test_deep_chain(tmp_path: Path, image: Callable[..., Built], serve: Serve, depth: int) -> None:
    raw_file(tmp_path / "0.qed", MiB)  # the base is raw in spite of its name
    model = Model(MiB, raw_reader(tmp_path / "0.qed"))
    for n in range(1, depth + 1):
        built = image(
            name=f"{n}.qed",
            size=MiB,
            layout={n % 16: "data"},
            tag=n % 127 + 1,
            backing=f"{n - 1}.qed",
            no_probe=n == 1,
        )
        model.write(n % 16 * CS, built.read(n % 16 * CS, CS))
    server = serve(tmp_path / f"{depth}.qed")
    client = server.connect()
    check_model(model, device(client))
    client.pwrite(stamp(99, CS + 512, 512), CS + 512)
    model.write(CS + 512, stamp(99, CS + 512, 512))
    client.shutdown()
    server.stop()
    if depth < 100:  # QEMU opens chains by recursion
        qemu.to_raw(tmp_path / f"{depth}.qed", tmp_path / "out.raw")
        check_model(model, raw_reader(tmp_path / "out.raw"))


def test_dirty_backing_image_is_only_read(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    base = image(name="base.qed", size=MiB, layout="D-D", features=2, leaks=2, autoclear_features=7)
    content = base.path.read_bytes()
    top = image(name="top.qed", size=MiB, layout="-", backing="base.qed")
    server = serve(top.path)
    client = server.connect()
    assert_same(client.pread(3 * CS, 0), base.read(0, 3 * CS))
    client.pwrite(stamp(9, 512, 512), 512)
    client.shutdown()
    server.stop()
    assert base.path.read_bytes() == content


# B1: a partial write to a zero cluster is filled with zeros, never with the backing file's data.
PARTIAL = [(4 * KiB, 4 * KiB), (0, 512), (CS - 512, 512), (CS - 512, 1024), (512, 2 * CS), (3 * CS - 1536, 1024)]


@pytest.mark.parametrize(("pos", "length"), PARTIAL)
@pytest.mark.parametrize("zero", [False, True], ids=["write", "zero"])
def test_partial_write_to_a_zero_cluster_over_a_backing_file(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, pos: int, length: int, zero: bool
) -> None:
    base = raw_file(tmp_path / "base.raw", MiB)
    built = image(size=MiB, layout="ZZZ-D", backing="base.raw", no_probe=True)
    model = Model(MiB, lambda p, n: built.read(p, n, base))
    server = serve(built.path)
    client = server.connect()
    check_model(model, device(client))
    if zero:
        client.zero(length, pos)
        model.zero(pos, length)
    else:
        client.pwrite(stamp(5, pos, length), pos)
        model.write(pos, stamp(5, pos, length))
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(built.path)
    qemu.to_raw(built.path, tmp_path / "out.raw")  # the file itself is right: QEMU reads zeros as well
    check_model(model, raw_reader(tmp_path / "out.raw"))


def test_zero_write_by_qemu_then_partial_write_here(tmp_path: Path) -> None:
    raw_file(tmp_path / "base.raw", MiB)
    path = tmp_path / "o.qed"
    qemu.create(path, MiB, backing="base.raw")
    qemu.qemu_io_ok(path, "write -z 0 64k")
    with QedFile(path) as oracle:
        assert oracle.entry(0) == 1
    with qedcore.open_image(str(path)) as img:
        img.pwrite(b"\3" * 4096, 4096)
    qemu.qemu_io_ok(path, "read -P 0 0 4k", "read -P 3 4k 4k", "read -P 0 8k 56k", read_only=True)


# Names


NAMES: dict[str, str] = {
    "relative": "base.raw",
    "relative with ./": "./base.raw",
    "subdirectory": "sub/base.raw",
    "parent": "../base.raw",
    "absolute": "{tmp}/base.raw",
    "spaces": "a base, of = sorts.raw",
    "file: prefix": "file:base.raw",
}


@pytest.mark.parametrize("name", NAMES)
def test_backing_names_are_relative_to_the_overlay(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, name: str
) -> None:
    (tmp_path / "dir" / "sub").mkdir(parents=True)
    stored = NAMES[name].format(tmp=tmp_path)
    target = tmp_path / "dir" / stored.removeprefix("file:")
    base = raw_file(target, MiB)
    built = image(name="dir/o.qed", size=MiB, layout="DZ-", backing=stored, no_probe=True)
    server = serve("dir/o.qed", cwd=tmp_path)
    client = server.connect()
    assert_same(client.pread(MiB, 0), built.read(0, MiB, base))
    client.shutdown()
    server.stop()


def test_backing_name_is_relative_to_the_real_overlay_behind_a_symlink(
    tmp_path: Path, image: Callable[..., Built]
) -> None:
    """Like QEMU: relative to the name by which the overlay was opened."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    image(name="a/o.qed", size=MiB, layout="DZ-", backing="base.raw", no_probe=True)
    raw_file(tmp_path / "a" / "base.raw", MiB, tag=1)
    raw_file(tmp_path / "b" / "base.raw", MiB, tag=2)
    (tmp_path / "b" / "o.qed").symlink_to("../a/o.qed")
    qemu.to_raw(tmp_path / "b" / "o.qed", tmp_path / "out.raw")
    assert_same(read_all(tmp_path / "b" / "o.qed"), (tmp_path / "out.raw").read_bytes())


# Formats


def test_raw_backing_that_looks_like_qed_is_not_probed(
    tmp_path: Path, image: Callable[..., Built], serve: Serve
) -> None:
    """A guest can write a QED header into a raw image, naming any file of the host."""
    secret = raw_file(tmp_path / "secret", MiB, tag=66)
    fake = image(name="base.raw", size=MiB, layout="D", backing="secret", no_probe=True)
    built = image(name="o.qed", size=MiB, layout="--D", backing="base.raw", no_probe=True)
    server = serve(built.path)
    client = server.connect()
    assert_same(client.pread(MiB, 0), built.read(0, MiB, raw_reader(fake.path)))
    client.pwrite(stamp(3, 512, 512), 512)  # copies up the raw bytes
    assert_same(client.pread(512, 0), fake.path.read_bytes()[:512])
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(built.path)
    assert secret(0, 8) not in built.path.read_bytes()


def test_unnamed_format_is_probed(tmp_path: Path, image: Callable[..., Built]) -> None:
    base = image(name="base", size=MiB, layout="DZD")
    built = image(name="o.qed", size=MiB, layout="-", backing="base")
    assert_same(read_all(built.path), base.read(0, MiB))
    assert built.spec.no_probe is False


OTHERS = {
    "qcow2": ["create", "-q", "-f", "qcow2"],
    "vmdk": ["create", "-q", "-f", "vmdk"],
    "vdi": ["create", "-q", "-f", "vdi"],
    "vhdx": ["create", "-q", "-f", "vhdx"],
    "parallels": ["create", "-q", "-f", "parallels"],
}


@pytest.mark.parametrize("fmt", OTHERS)
def test_other_formats_are_refused_with_advice(tmp_path: Path, image: Callable[..., Built], fmt: str) -> None:
    base = tmp_path / f"base.{fmt}"
    qemu.qemu_img_ok(*OTHERS[fmt], base, "1M")
    built = image(name="o.qed", size=MiB, layout="D", backing=base.name)
    with pytest.raises(QEDError) as caught:
        qedcore.open_image(str(built.path))
    text = str(caught.value)
    assert "\n" not in text
    assert base.name in text and fmt in text.lower(), text
    assert f"backing-format={fmt} if it is one" in text, text  # what to do
    patch_header(built.path, features=5)  # declared raw: the same file is fine
    assert_same(read_all(built.path)[CS:], base.read_bytes()[CS:MiB].ljust(MiB - CS, b"\0"))


@pytest.mark.parametrize(
    "name", ["nbd://localhost/x", "http://localhost/x", 'json:{"driver":"raw"}', "ssh://h/x", "fat:rw:/"]
)
def test_protocol_names_are_refused(image: Callable[..., Built], name: str) -> None:
    built = image(size=MiB, layout="D", backing=name, no_probe=True)
    with pytest.raises(QEDError) as caught:
        qedcore.open_image(str(built.path))
    assert "\n" not in str(caught.value)
    assert name.split(":")[0] in str(caught.value)


# Loops, and files that are no files


def loop(tmp_path: Path, image: Callable[..., Built], links: dict[str, str]) -> Path:
    paths = [image(name=name, size=MiB, layout="-", backing=target).path for name, target in links.items()]
    return paths[0]


LOOPS: dict[str, dict[str, str]] = {
    "itself": {"a.qed": "a.qed"},
    "itself by another name": {"a.qed": "./sub/../a.qed"},
    "two": {"a.qed": "b.qed", "b.qed": "a.qed"},
    "three, entered outside": {"x.qed": "a.qed", "a.qed": "b.qed", "b.qed": "c.qed", "c.qed": "a.qed"},
    "hard link": {"a.qed": "link.qed"},
    "symlink": {"a.qed": "symlink.qed"},
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_detected(tmp_path: Path, image: Callable[..., Built], name: str) -> None:
    (tmp_path / "sub").mkdir()
    path = loop(tmp_path, image, LOOPS[name])
    if name == "hard link":
        os.link(path, tmp_path / "link.qed")
    if name == "symlink":
        (tmp_path / "symlink.qed").symlink_to("a.qed")
    before = path.read_bytes()
    for writable in (False, True):
        with pytest.raises(QEDError) as caught:
            qedcore.open_image(str(path), writable=writable)
        assert "form a loop" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("target", "code"), [("dir", (errno.EISDIR, errno.EINVAL)), ("fifo", None), ("/dev/zero", None)]
)
def test_backing_that_is_no_regular_file(
    tmp_path: Path, image: Callable[..., Built], target: str, code: tuple[int, ...] | None
) -> None:
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    built = image(name="o.qed", size=MiB, layout="D", backing=target, no_probe=True)
    with pytest.raises(QEDError) as caught:  # a FIFO must not block the open either
        qedcore.open_image(str(built.path))
    assert target in str(caught.value)
    if code:
        assert caught.value.errno in code


def test_broken_backing_image_is_named(tmp_path: Path, image: Callable[..., Built]) -> None:
    image(name="base.qed", size=MiB, header={"table_size": 3})
    built = image(name="o.qed", size=MiB, layout="D", backing="base.qed")
    with pytest.raises(QEDError) as caught:
        qedcore.open_image(str(built.path))
    assert "base.qed" in str(caught.value) and "table size is invalid" in str(caught.value)


def test_corrupt_entry_of_a_backing_image_fails_its_requests_only(
    tmp_path: Path, image: Callable[..., Built], serve: Serve
) -> None:
    from support.server import import_nbd

    nbd: Any = import_nbd()
    base = image(name="base.qed", size=MiB, layout="D-D", entries={1: 0x50088})
    built = image(name="o.qed", size=MiB, layout="-", backing="base.qed")
    server = serve(built.path)
    client = server.connect()
    for request in (lambda: client.pread(512, CS), lambda: client.pwrite(b"x" * 512, CS)):
        with pytest.raises(nbd.Error) as caught:
            request()
        assert caught.value.errno == "EIO"
    assert_same(client.pread(CS, 0), base.read(0, CS))
    client.pwrite(stamp(3, CS, CS), CS)  # a whole cluster needs nothing from below
    assert_same(client.pread(CS, CS), stamp(3, CS, CS), CS)
    client.shutdown()
    server.stop()
    assert len(server.log().splitlines()) == 2, server.log()
    assert_sound(built.path, leaks=None)
