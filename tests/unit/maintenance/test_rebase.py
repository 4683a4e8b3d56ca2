"""Rebasing: the guest reads the same, names are changed at once and always leave an image that opens."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.crashes import World, check_crashes, guest
from support.patterns import GiB, KiB, MiB, assert_same, random_ops, stamp
from support.qed_image import F_BACKING_FILE, F_NO_PROBE, Built, QedFile, assert_sound, read_header

import qedcore
from qedcore.engine.chain import close_source, open_source
from qedcore.errors import QEDError, RequestError, StorageError, UnsupportedError
from qedcore.maintenance.rebase import change_name, open_base, rebase
from qedcore.storage.file import FileStorage

CS = 4 * KiB
SMALL = {"cluster_size": CS, "table_size": 1}
SIZE = 20 * CS + 512
Image = Callable[..., Built]


def raw(path: Path, size: int, tag: int = 0, changed: dict[int, int] | None = None) -> Path:
    """A raw file stamped with `tag` (0: zeros), some clusters with other tags."""
    content = bytearray(stamp(tag, 0, size) if tag else bytes(size))
    for cluster, other in (changed or {}).items():
        n = max(0, min(CS, size - cluster * CS))
        content[cluster * CS : cluster * CS + n] = stamp(other, cluster * CS, n) if other else bytes(n)
    path.write_bytes(content)
    return path


def rebased(path: Path, name: str | None, format: str | None = "raw", **options: Any) -> None:
    with qedcore.open_image(path, **options) as image:
        opener = {"opener": options["opener"]} if "opener" in options else {}
        new = open_base(image, str(path.parent / name), format, name, **opener) if name else None
        try:
            rebase(image, name, new, format == "raw")
        finally:
            close_source(new)


class Counting(FileStorage):
    """Counts what is read, in bytes."""

    read = 0

    def pread_into(self, buf: Any, offset: int) -> None:
        Counting.read += len(buf)
        super().pread_into(buf, offset)


@pytest.mark.parametrize("to", ["none", "another"])
def test_holes_are_not_read(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """What it takes grows with the data below, not with the device."""
    size, at = 64 * GiB, 40 * GiB
    for name in ("old", "another"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
            file.seek(at)
            file.write(stamp(1 if name == "old" else 2, at, MiB))
    path = image(size=size, layout="D", backing="old", no_probe=True).path
    monkeypatch.setattr(Counting, "read", 0)

    def opener(path: str, writable: bool, mode: Any) -> Counting:
        return Counting(path, writable, mode)

    rebased(path, None if to == "none" else to, opener=opener)
    assert Counting.read < 8 * MiB
    with qedcore.open_image(path, writable=False) as img:
        assert_same(img.pread(MiB, at), stamp(1, at, MiB))
        assert img.pread(MiB, at - MiB) == bytes(MiB)


SIZES = {"equal": SIZE, "shorter": 5 * CS + 700, "longer": 40 * CS, "empty": 0, "a sector": 512, "odd": 7 * CS + 1}


@pytest.mark.parametrize(("code", "works"), [(errno.EINVAL, True), (errno.EROFS, True), (errno.EIO, False)])
def test_new_base_that_cannot_be_flushed(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, works: bool
) -> None:
    """Nor need it be on a read-only file system; an error leaves the old base."""
    path = image(**SMALL, size=SIZE, layout="D", backing="old", no_probe=True).path
    raw(tmp_path / "old", SIZE, 9)
    new = raw(tmp_path / "new", SIZE, 9)
    before = guest(path)
    sync = os.fdatasync

    def fdatasync(fd: int) -> None:
        if os.path.sameopenfile(fd, probe):
            raise OSError(code, os.strerror(code))
        sync(fd)

    with new.open("rb") as file:
        probe = file.fileno()
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        if works:
            rebased(path, "new")
        else:
            with pytest.raises(StorageError):
                rebased(path, "new")
        monkeypatch.undo()
    with QedFile(path) as oracle:
        assert oracle.backing_name == ("new" if works else "old")
    assert_same(guest(path), before)
    assert_sound(path)


@pytest.mark.parametrize("new", [*SIZES.values(), None], ids=[*SIZES, "nothing"])
@pytest.mark.parametrize("old", [*SIZES.values(), None], ids=[*SIZES, "nothing"])
def test_sizes(image: Image, tmp_path: Path, old: int | None, new: int | None) -> None:
    spec: dict[str, Any] = dict(SMALL, size=SIZE, layout={0: "data", 1: "zero", 6: "zero", 20: "-"})
    if old is not None:
        raw(tmp_path / "old", old, 9, {4: 0, 10: 0})
        spec.update(backing="old", no_probe=True)
    if new is not None:
        raw(tmp_path / "new", new, 9, {3: 8, 4: 8, 12: 0})
    path = image(**spec).path
    before = guest(path)
    rebased(path, "new" if new is not None else None)
    assert_same(guest(path), before)
    assert_sound(path)
    with QedFile(path) as oracle:
        assert oracle.backing_name == ("new" if new is not None else None)
        assert {1, 6} <= {cluster for cluster, entry in oracle.entries().items() if entry == 1}  # still zero clusters
    (tmp_path / "old").unlink(missing_ok=True)
    with qedcore.open_image(path) as img:
        assert_same(img.pread(SIZE, 0), before)


def test_copies_only_what_differs(image: Image, tmp_path: Path) -> None:
    raw(tmp_path / "old", SIZE, 9, {4: 0, 5: 0})
    raw(tmp_path / "new", SIZE, 9, {3: 8, 4: 8, 12: 0})
    path = image(**SMALL, size=SIZE, layout="D", backing="old", no_probe=True).path
    rebased(path, "new")
    with QedFile(path) as oracle:
        kinds = {cluster: entry == 1 for cluster, entry in oracle.entries().items()}
    # 4 and 5 were zeros, 3 and 12 were data
    assert kinds == {0: False, 3: False, 4: True, 5: True, 12: False}


@pytest.mark.parametrize("other_cs, table_size", [(4 * KiB, 2), (64 * KiB, 4)])
def test_onto_qed(image: Image, tmp_path: Path, rng: random.Random, other_cs: int, table_size: int) -> None:
    """Between chains of other geometries."""
    size = 3 * 512 * CS
    raw(tmp_path / "bottom", size // 2 + 700, 9)
    for name in ("old.qed", "new.qed"):
        path = image(
            name, cluster_size=other_cs, table_size=table_size, size=size - 3 * CS, backing="bottom", no_probe=True
        ).path
        with qedcore.open_image(path, cache="unsafe") as img:
            for op in random_ops(rng, size - 3 * CS, other_cs, 25):
                img.zero(op.pos, op.length) if op.kind == "zero" else img.pwrite(op.data, op.pos)
    path = image("top.qed", **SMALL, size=size, layout={0: "data", 600: "zero", 700: "data"}, backing="old.qed").path
    before = guest(path)
    rebased(path, "new.qed", "qed")
    assert_same(guest(path), before)
    assert read_header(path)["features"] == F_BACKING_FILE
    rebased(path, "old.qed", None)
    assert_same(guest(path), before)
    rebased(path, None)
    (tmp_path / "bottom").unlink()
    assert_same(guest(path), before)
    assert_sound(path)
    assert read_header(path)["features"] == 0


def test_common_file_is_not_compared(image: Image, tmp_path: Path) -> None:
    """Where both chains come to the same bytes of the same file, they are not read."""
    raw(tmp_path / "bottom", 1000 * CS, 9)
    image("new.qed", **SMALL, size=1000 * CS, layout="D", backing="bottom", no_probe=True)
    path = image("top.qed", **SMALL, size=1000 * CS, backing="bottom", no_probe=True).path
    read: list[int] = []
    world = World(path, tmp_path / "bottom", tmp_path / "new.qed")

    def opener(name: str, writable: bool, mode: Any) -> Any:
        storage = world.open(name, writable, mode)
        if name.endswith("bottom"):
            inner = storage.pread_into

            def pread_into(buf: Any, offset: int) -> None:
                read.append(len(buf))
                inner(buf, offset)

            storage.pread_into = pread_into  # type: ignore[method-assign]
        return storage

    rebased(path, "new.qed", "qed", opener=opener)
    assert sum(read) < 600 * CS  # the first slice's comparison; not the whole
    world.save()
    assert QedFile(path).entry(0) > 1


def test_same_file_in_another_format(image: Image, tmp_path: Path) -> None:
    """Its bytes and what it shows a guest are not the same."""
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", tmp_path / "b.qcow2", str(SIZE))
    path = image(cluster_size=CS, table_size=2, size=SIZE, backing="b.qcow2", no_probe=True).path
    before = guest(path)
    rebased(path, "b.qcow2", "qcow2")
    qemu.to_raw(path, tmp_path / "after.raw")
    assert_same((tmp_path / "after.raw").read_bytes(), before)


# -- names ---------------------------------------------------------------------------------------------------------

LENGTHS = (1, 447, 448, 449, 511, 1000, 1500, 2520, 4032)


@pytest.mark.parametrize("new", [None, *LENGTHS])
@pytest.mark.parametrize("old", [None, *LENGTHS])
def test_names(image: Image, old: int | None, new: int | None) -> None:
    """Any length after any other; a crash leaves the old or the new name, and the bits that belong to it."""
    spec: dict[str, Any] = dict(SMALL, layout="DZ")
    if old:
        spec.update(backing="o" * old)
    path = image(**spec).path
    content = path.read_bytes()
    world = World(path)
    name = "n" * new if new else None
    if old and new and new > 448 and 64 + old + new > CS:
        with pytest.raises(RequestError, match="no space left in the file header"):
            change_name(str(path), name, raw=True, opener=world.open)
        assert world.log == []
        return
    change_name(str(path), name, raw=True, opener=world.open)

    def state() -> tuple[str | None, int]:
        with QedFile(path) as oracle:
            assert not oracle.verify().errors
            return oracle.backing_name, oracle.header["features"]

    before = ("o" * old if old else None, F_BACKING_FILE if old else 0)
    after = (name, F_BACKING_FILE | F_NO_PROBE if new else 0)
    for label, _, files, _ in world.crash_states():
        path.write_bytes(files[str(path)])
        assert state() in (before, after), label
        with qedcore.open_image(path, writable=False, follow=False) as img:
            assert img.backing_name in ("o" * (old or 0), name, None)
    world.save()
    assert state() == after
    assert path.read_bytes()[CS:] == content[CS:]  # only the header area
    with qedcore.open_image(path, writable=False, follow=False) as img:
        assert img.backing_name == name


@pytest.mark.parametrize(
    "header_size, cluster_size, length, fits",
    [(1, CS, 4032, True), (1, CS, 4033, False), (2, CS, 4095, True), (1, 64 * KiB, 4095, True)]
    + [(1, 64 * KiB, 4096, False), (0, CS, 1, False)],
)
def test_longest_name(image: Image, header_size: int, cluster_size: int, length: int, fits: bool) -> None:
    """QEMU takes names that make the image unopenable (B7)."""
    path = image(cluster_size=cluster_size, table_size=2, header_size=header_size).path
    if fits:
        change_name(str(path), "n" * length)
    else:
        with pytest.raises(RequestError, match="no space left in the file header"):
            change_name(str(path), "n" * length)
    with qedcore.open_image(path, writable=False, follow=False) as img:
        assert img.backing_name == ("n" * length if fits else None)


def test_features_of_other_programs(image: Image, tmp_path: Path) -> None:
    """Unknown compat bits: no name may be set, but removed; unknown autoclear bits are cleared first."""
    raw(tmp_path / "new", SIZE, 9)
    path = image(**SMALL, compat_features=8, autoclear_features=2, backing="old").path
    with pytest.raises(UnsupportedError):
        change_name(str(path), "new", raw=True)
    assert read_header(path)["autoclear_features"] == 2
    change_name(str(path), None)
    header = read_header(path)
    assert (header["compat_features"], header["autoclear_features"], header["features"]) == (8, 0, 0)
    before = path.read_bytes()
    with pytest.raises(UnsupportedError):
        rebased(path, "new")
    assert path.read_bytes() == before  # not even the copies


def test_dirty_bit_is_kept_by_a_change_of_name(image: Image) -> None:
    path = image(**SMALL, features=2).path
    change_name(str(path), "elsewhere")
    assert read_header(path)["features"] == 3


def test_loops(image: Image, tmp_path: Path) -> None:
    bottom = image("bottom.qed", **SMALL, layout="D").path
    image("middle.qed", **SMALL, backing="bottom.qed")
    image("top.qed", **SMALL, backing="middle.qed")
    before = bottom.read_bytes()
    for name in ("bottom.qed", "middle.qed", "top.qed", f"{tmp_path}/../{tmp_path.name}/top.qed"):
        with pytest.raises(RequestError, match="infinite loop"):
            rebased(bottom, name, "qed")
    assert bottom.read_bytes()[64:] == before[64:]
    assert QedFile(bottom).backing_name is None
    for name in ("top.qed", "missing"):  # a change of name asks for nothing
        change_name(str(bottom), name)
        assert QedFile(bottom).backing_name == name
    change_name(str(bottom), "nbd:localhost:10809")


# -- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", ["new", None, "n" * 200 + "/" * 260 + "new"], ids=["name", "nothing", "long name"])
def test_crash(image: Image, tmp_path: Path, new: str | None) -> None:
    """The new name with all copies, or the old one: the guest reads the same."""
    if new is not None and new != "new":
        (tmp_path / new).parent.mkdir()
    raw(tmp_path / "old", SIZE, 9, {4: 0})
    files = [tmp_path / "old"]
    if new:
        files.append(raw(tmp_path / new, 12 * CS, 9, {3: 8, 4: 8, 5: 8, 7: 7}))
    path = image(**SMALL, size=SIZE, layout="DZ", backing="old", no_probe=True).path
    before = guest(path)
    world = World(path, *files)
    rebased(path, new, opener=world.open)
    assert check_crashes(world, path, [before]) > 10
    world.save()
    assert_same(guest(path), before)
    assert QedFile(path).backing_name == new


def test_interrupted_between_clusters(image: Image, tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves a clean image under its old name."""
    raw(tmp_path / "old", 1000 * CS, 9)
    raw(tmp_path / "new", 0)
    path = image(**SMALL, size=1000 * CS, layout={500: "data"}, backing="old", no_probe=True).path
    before = guest(path)

    def progress(pos: int) -> None:
        if pos > 500 * CS:
            raise KeyboardInterrupt

    new = open_source(tmp_path / "new", "raw")
    with pytest.raises(KeyboardInterrupt), qedcore.open_image(path) as img:
        rebase(img, "new", new, True, progress)
    close_source(new)
    assert assert_sound(path).allocated >= 500
    assert_same(guest(path), before)


def test_error_at_each_op(image: Image, tmp_path: Path) -> None:
    raw(tmp_path / "old", SIZE, 9, {4: 0})
    raw(tmp_path / "new", SIZE, 9, {3: 8, 4: 8})
    path = image(**SMALL, size=SIZE, layout="DZ", backing="old", no_probe=True).path
    content, before = path.read_bytes(), guest(path)
    fail_at = 0
    while True:
        path.write_bytes(content)
        world = World(path, tmp_path / "old", tmp_path / "new")
        world.stop_at(fail_at, QEDError("injected"), dead=True)
        try:
            rebased(path, "new", opener=world.open)
        except QEDError:
            pass
        else:
            break
        world.save()
        assert_same(guest(path), before)
        rebased(path, "new", cache="unsafe")
        assert_same(guest(path), before)
        assert_sound(path, leaks=None)
        fail_at += 1
    assert fail_at > 8
