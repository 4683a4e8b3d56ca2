"""Opening an image: what is refused, in which order and with which words, and what is accepted.

The rows are those of QEMU's driver (validation order of bdrv_qed_open), without its overflows.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import GiB, KiB, MiB, assert_same, stamp
from support.qed_image import (
    F_BACKING_FILE,
    F_NEED_CHECK,
    F_NO_PROBE,
    Built,
    Geometry,
    QedFile,
    assert_sound,
    patch_header,
    read_header,
)

import qedcore
from qedcore.errors import CorruptImageError, QEDError

CS = 64 * KiB


def refusal(path: Path, *, writable: bool = True) -> QEDError:
    """The error of opening path; one line, and the file is untouched."""
    before = snapshot(path)
    with pytest.raises(QEDError) as caught:
        qedcore.open_image(str(path), writable=writable)
    assert snapshot(path) == before
    text = str(caught.value)
    assert text and "\n" not in text
    assert isinstance(caught.value.errno, int) and caught.value.errno > 0
    return caught.value


def snapshot(path: Path) -> tuple[int, int, bytes]:
    """Everything about a file that an open must not change: length, mtime, contents."""
    status = path.stat()
    content = path.read_bytes() if status.st_size <= 64 * MiB else path.open("rb").read(MiB)
    return status.st_size, status.st_mtime_ns, content


def assert_guest(built: Built, *, writable: bool = False, **backing: Any) -> None:
    with qedcore.open_image(str(built.path), writable=writable) as img:
        assert img.size == built.spec.size
        for pos, length in built.ranges():
            assert_same(img.pread(length, pos), built.read(pos, length, **backing), pos)


# Refused: name -> (spec changes, words of the message, errno)
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "magic": ({"header": {"magic": 0x00444552}}, ("not in qed format", "444552"), errno.EINVAL),
    "magic of all zeros": ({"header": {"magic": 0}}, ("not in qed format",), errno.EINVAL),
    "empty file": ({"length": 0}, ("not in qed format",), errno.EINVAL),
    "3-byte file": ({"length": 3}, ("cluster size is invalid",), errno.EINVAL),
    "40-byte file": ({"length": 40}, ("table offset is invalid",), errno.EINVAL),
    "feature bit 3": ({"features": 0xC}, ("unsupported qed features", " 8"), errno.ENOTSUP),
    "feature bit 63": (
        {"features": 1 << 63},
        ("unsupported qed features", "8000000000000000"),
        errno.ENOTSUP,
    ),
    "all features": ({"features": (1 << 64) - 1}, ("fffffffffffffff8",), errno.ENOTSUP),
    **{
        f"cluster_size {cs}": (
            {"header": {"cluster_size": cs}},
            ("cluster size is invalid", str(cs), "4096", "67108864"),
            errno.EINVAL,
        )
        for cs in (0, 1, 2048, 4097, 6144, 65535, 128 * MiB, 1 << 31, 0xFFFFFFFF)
    },
    **{
        f"table_size {ts}": (
            {"header": {"table_size": ts}},
            ("table size is invalid", str(ts), "16"),
            errno.EINVAL,
        )
        for ts in (0, 3, 5, 15, 17, 32, 1 << 31, 0xFFFFFFFF)
    },
    **{
        f"image_size {name}": (
            {"header": {"image_size": size}, **changes},
            ("image size is invalid", str(size), str(limit)),
            errno.EINVAL,
        )
        for name, size, limit, changes in (
            ("1", 1, 512, {}),
            ("513", 513, 512, {}),
            ("16M - 1", 16 * MiB - 1, 512, {}),
            ("64T + 512", (64 << 40) + 512, 64 << 40, {}),
            ("4K_1 1G + 512", GiB + 512, GiB, {"cluster_size": 4096, "table_size": 1}),
            ("2**64 - 512", 2**64 - 512, 64 << 40, {}),
            ("2**64 - 1", 2**64 - 1, 512, {}),
        )
    },
    **{
        f"L1 at {name}": (
            {"header": {"l1_table_offset": offset}, **changes},
            ("table offset is invalid", f"{offset:#x}"),
            errno.EINVAL,
        )
        for name, offset, changes in (
            ("0", 0, {}),
            ("unaligned", CS + 512, {}),
            ("unaligned by 1", CS + 1, {}),
            ("the header area's last cluster", 2 * CS, {"header_size": 3}),
            ("the end, last cluster missing", 2 * CS, {}),
            ("the end", 5 * CS, {}),
            ("1 << 40", 1 << 40, {}),
            ("2**64 - 1 cluster", 2**64 - CS, {}),
            ("2**64 - 1 table", 2**64 - 4 * CS, {}),
            ("2**63", 1 << 63, {}),
        )
    },
    "L1 cut by 512 bytes": ({"length": 5 * CS - 512}, ("table offset is invalid",), errno.EINVAL),
    "header_size past the file": (
        {"header": {"header_size": 65536}},
        ("table offset is invalid",),
        errno.EINVAL,
    ),
    "header_size 2**32 - 1": (
        {"header": {"header_size": 0xFFFFFFFF}},
        ("table offset is invalid",),
        errno.EINVAL,
    ),
    "header over 4 GiB": (  # a sparse file that really is that long
        {"header_size": 65536},
        ("header size is too large", "65536", "65535"),
        errno.EINVAL,
    ),
    **{
        f"backing name at {offset:#x} of {size}": (
            {
                "features": F_BACKING_FILE,
                "header": {"backing_filename_offset": offset, "backing_filename_size": size},
            },
            ("backing filename", word),
            errno.EINVAL,
        )
        for offset, size, word in (
            (CS - 3, 4, f"{CS:#x}"),
            (CS + 1, 0, f"{CS:#x}"),
            (64, CS, f"{CS:#x}"),
            (0xFFFFFFFF, 1, f"{CS:#x}"),  # 32-bit sums would wrap to 0
            (0xFFFFFFFF, 0xFFFFFFFF, f"{CS:#x}"),
            (64, 0xFFFFFFFF, f"{CS:#x}"),
            (64, 4096, "4095"),
            (64, 10000, "4095"),
        )
    },
    "backing name and no header area": (
        {"header_size": 0, "backing": "base.raw"},
        ("backing filename",),
        errno.EINVAL,
    ),
}


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(image: Callable[..., Built], name: str, writable: bool) -> None:
    changes, words, code = REFUSED[name]
    path = image(**changes).path
    error = refusal(path, writable=writable)
    text = str(error).replace(str(path), "").lower()
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {error}"
    assert error.errno == code


# Independent defects in the order in which they must be reported.
DEFECTS: dict[str, tuple[dict[str, int], str]] = {
    "magic": ({"magic": 1}, "not in qed format"),
    "features": ({"features": 0x10 | F_BACKING_FILE}, "unsupported qed features"),
    "cluster_size": ({"cluster_size": 5000}, "cluster size is invalid"),
    "table_size": ({"table_size": 7}, "table size is invalid"),
    "image_size": ({"image_size": 513}, "image size is invalid"),
    "l1_table_offset": ({"l1_table_offset": CS + 8}, "table offset is invalid"),
    "backing offset": (
        {"features": F_BACKING_FILE, "backing_filename_offset": CS, "backing_filename_size": 5000},
        "backing filename offset is invalid",
    ),
    "backing size": (
        {"features": F_BACKING_FILE, "backing_filename_offset": 64, "backing_filename_size": 5000},
        "backing filename",
    ),
}


PAIRS = [(a, b) for i, a in enumerate(DEFECTS) for b in list(DEFECTS)[i + 1 :]]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_first_of_two_defects_is_reported(image: Callable[..., Built], first: str, second: str) -> None:
    fields, words = DEFECTS[first]
    error = refusal(image(header={**DEFECTS[second][0], **fields}).path)
    assert words in str(error).lower()


def test_header_size_is_reported_before_the_backing_name(image: Callable[..., Built]) -> None:
    built = image(
        header_size=65536,
        features=F_BACKING_FILE,
        header={"backing_filename_offset": 0xFFFFFFFF, "backing_filename_size": 0xFFFFFFFF},
    )
    assert "header size is too large" in str(refusal(built.path)).lower()


def test_backing_name_is_checked_before_autoclear_bits_are_cleared(image: Callable[..., Built]) -> None:
    built = image(
        autoclear_features=1,
        features=F_BACKING_FILE,
        header={"backing_filename_offset": CS, "backing_filename_size": 1},
    )
    refusal(built.path)  # which compares the file too


@pytest.mark.parametrize(
    ("path", "code"), [("absent.qed", errno.ENOENT), (".", errno.EISDIR)], ids=["absent", "directory"]
)
def test_unreadable_path(tmp_path: Path, path: str, code: int) -> None:
    with pytest.raises((QEDError, OSError)) as caught:
        qedcore.open_image(str(tmp_path / path))
    assert caught.value.errno == code
    assert str(tmp_path) in str(caught.value)


# Accepted oddities: each reads as the layout says.
ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "size 0": {"size": 0, "layout": ""},
    "size 512": {"size": 512, "layout": "D"},
    "size not a multiple of the cluster": {"size": 3 * CS + 1536, "layout": "D-ZD"},
    "header_size 0": {"header_size": 0},
    "header_size 2": {"header_size": 2},
    "header_size 16": {"header_size": 16, "layout": "D"},
    "header_size at its limit": {"header_size": 65535, "layout": "DZ-D"},
    "L1 last": {"l1_last": True},
    "L1 last, data descending": {"l1_last": True, "reverse": True},
    "header_size 3, L1 last": {"header_size": 3, "l1_last": True},
    "table_size 1": {"table_size": 1},
    "4K_1": {"cluster_size": 4 * KiB, "table_size": 1, "layout": {0: "data", 511: "data", 512: "data"}},
    "4K_2": {"cluster_size": 4 * KiB, "table_size": 2, "layout": {0: "zero", 1023: "data", 1024: "data"}},
    "4K_16": {"cluster_size": 4 * KiB, "table_size": 16, "layout": {4095: "data"}},
    "64K_16": {"table_size": 16},
    "1M_2": {"cluster_size": MiB, "table_size": 2},
    "64M_16": {"cluster_size": 64 * MiB, "table_size": 16, "size": 1 << 53, "layout": {0: "data", 9: "zero"}},
    "largest at the defaults": {"size": 64 << 40, "layout": {0: "data", (1 << 30) - 1: "data"}},
    "largest device": {
        "size": 2**63 - 512,
        "cluster_size": 2 * MiB,
        "table_size": 8,
        "layout": {0: "data", (1 << 42) - 1: "data"},
    },
    "all compat bits": {"compat_features": 2**64 - 1},
    "NO_PROBE alone": {"features": F_NO_PROBE},
    "backing name of 0 bytes": {"features": F_BACKING_FILE},
    "backing name of 0 bytes at the header's end": {
        "features": F_BACKING_FILE,
        "header": {"backing_filename_offset": CS},
    },
    "name without the feature bit": {
        "header": {"backing_filename_offset": 0xFFFFFFFF, "backing_filename_size": 77},
    },
    "trailing bytes": {"trailing": b"tail" * 100},
    "trailing cluster": {"trailing": bytes(CS), "leaks": 2},
    "entries past the image's end": {"size": 2 * CS, "layout": "DDDD"},
    "cut by 511 bytes": {"leaks": 1, "length": 12 * CS - 511, "layout": "DD"},
    "entry on a cluster cut by 511 bytes": {
        "leaks": 1,
        "length": 12 * CS - 511,
        "layout": "DD",
        "entries": {2: lambda b: b.end - CS},
    },
}


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(image: Callable[..., Built], name: str, writable: bool) -> None:
    changes = {"layout": "DZ-DDD--ZZD", **ACCEPTED[name]}
    built = image(**changes)
    before = snapshot(built.path)
    assert_guest(built, writable=writable)
    if not (writable and built.spec.leaks):  # which the close gives back
        assert snapshot(built.path) == before  # clean: not even a writable open has anything to write


def test_header_size_0_with_l1_on_the_header(image: Callable[..., Built]) -> None:
    """The L1 table then starts with the header's own bytes: it opens, and reading fails cleanly."""
    built = image(header_size=0, header={"l1_table_offset": 0})
    with qedcore.open_image(str(built.path), writable=False) as img:
        assert img.header.l1_table_offset == 0
        with pytest.raises(QEDError) as caught:
            img.pread(512, 0)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster_size": 2 * MiB, "table_size": 8},  # the format's maximum is 2**63 exactly
        {"cluster_size": 2 * MiB, "table_size": 16},
        {"cluster_size": 64 * MiB, "table_size": 16},
    ],
    ids=["2M_8", "2M_16", "64M_16"],
)
@pytest.mark.parametrize("size", [2**63, 2**63 + 512, 2**64 - 512], ids=hex)
def test_devices_of_2_63_bytes_are_refused(image: Callable[..., Built], changes: dict[str, int], size: int) -> None:
    error = refusal(image(header={"image_size": size}, **changes).path)
    assert str(size) in str(error) and str(2**63 - 512) in str(error) or "invalid" in str(error)


def test_header_fields(image: Callable[..., Built]) -> None:
    built = image(header_size=2, compat_features=5, l1_last=True, layout="D")
    with qedcore.open_image(str(built.path), writable=False) as img:
        for name, value in read_header(built.path).items():
            assert getattr(img.header, name) == value, name


def test_autoclear_bits_are_cleared_by_a_writable_open(image: Callable[..., Built]) -> None:
    built = image(layout="D", autoclear_features=2**64 - 1, compat_features=6)
    before = built.path.read_bytes()
    with qedcore.open_image(str(built.path)) as img:
        assert img.header.autoclear_features == 0
        assert built.path.read_bytes() == before[:32] + bytes(8) + before[40:]  # before any request
    assert built.path.read_bytes() == before[:32] + bytes(8) + before[40:]


READ_ONLY: dict[str, dict[str, Any]] = {
    "clean": {},
    "autoclear": {"autoclear_features": 0xFF},
    "dirty": {"features": F_NEED_CHECK},
    "dirty with bad entries": {
        "features": F_NEED_CHECK,
        "entries": {1: 0x50088, 2: lambda b: b.end},
        "leaks": 3,
    },
    "trailing": {"trailing": b"x" * 700},
    "leaks": {"leaks": 3},
    "table_size 1": {"table_size": 1},
}


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_open_never_changes_the_file(image: Callable[..., Built], name: str) -> None:
    built = image(**{"layout": "D", **READ_ONLY[name]})
    before = snapshot(built.path)
    img = qedcore.open_image(str(built.path), writable=False)
    assert_same(img.pread(CS, 0), built.read(0, CS))
    with pytest.raises(QEDError) as caught:
        img.pwrite(b"x" * 512, 0)
    assert caught.value.errno in (errno.EROFS, errno.EPERM)
    img.flush()
    img.close()
    img.close()  # harmless
    assert snapshot(built.path) == before


def test_read_only_open_of_a_file_without_write_permission(image: Callable[..., Built]) -> None:
    built = image(layout="D", features=F_NEED_CHECK)
    built.path.chmod(0o444)
    assert_guest(built)


DIRTY: dict[str, dict[str, Any]] = {
    "sound": {"layout": "DZ-D"},
    "entries beyond the file": {"layout": "DZ-D", "entries": {1: lambda b: b.end, 2: 1 << 50}},
    "table beyond the file": {"size": 6 * GiB, "layout": "D", "l1_entries": {2: lambda b: b.end}},
    "tail": {"layout": "DD", "leaks": 5, "trailing": b"junk"},
    "L1 last, tail": {"layout": "DD", "l1_last": True, "leaks": 2},
}


@pytest.mark.parametrize("name", DIRTY)
def test_dirty_image_is_repaired_by_a_writable_open(image: Callable[..., Built], name: str) -> None:
    built = image(features=F_NEED_CHECK, **DIRTY[name])
    for cluster in built.spec.entries:
        built.kinds.pop(cluster, None)  # dropped entries read as unallocated
    assert_guest(built, writable=True)
    assert_sound(built.path)
    assert_guest(built)


def test_damage_that_no_crash_explains_is_left_alone(image: Callable[..., Built]) -> None:
    """It may still be salvaged: its entries are not cleared, and clusters that nothing refers to are not used."""
    entries = {1: 0x50088, 2: 2, 4: lambda b: b.end}
    built = image(features=F_NEED_CHECK, layout="DZ-D", entries=entries, leaks=2)
    leaked = built.path.read_bytes()[built.end - 2 * CS :]
    notices: list[str] = []
    with qedcore.open_image(built.path, log=notices.append) as img:
        for cluster in (1, 2):
            with pytest.raises(CorruptImageError):
                img.pread(1, cluster * CS)
        assert img.pread(CS, 4 * CS) == bytes(CS)
        img.pwrite(b"n" * 4 * CS, 9 * CS)
    assert any("cannot repair: L2 entry 1 " in line for line in notices)
    with QedFile(built.path) as file:
        assert {n: file.entries()[n] for n in (1, 2)} == {1: 0x50088, 2: 2} and 4 not in file.entries()
        assert not file.need_check
    assert built.path.read_bytes()[built.end - 2 * CS : built.end] == leaked


def test_clean_bit_is_not_trusted_to_hide_the_tail(image: Callable[..., Built]) -> None:
    """New clusters go behind whatever the file holds, never onto referenced ones."""
    built = image(layout="DD", l1_last=True, leaks=1, trailing=b"x" * 1000)
    with qedcore.open_image(str(built.path)) as img:
        # the first new cluster replaces the trailing bytes, and this write leaves its head to be filled
        img.pwrite(stamp(9, 9 * CS + 4096, 4096), 9 * CS + 4096)
        img.pwrite(stamp(9, 5 * CS, 4096), 5 * CS)
    with QedFile(built.path) as oracle:
        assert_same(oracle.read(0, 2 * CS), built.read(0, 2 * CS))
        assert_same(oracle.read(5 * CS, CS), stamp(9, 5 * CS, 4096) + bytes(CS - 4096), 5 * CS)
        want = bytes(4096) + stamp(9, 9 * CS + 4096, 4096) + bytes(CS - 8192)
        assert_same(oracle.read(9 * CS, CS), want, 9 * CS)  # none of the trailing bytes shows
    assert_sound(built.path, leaks=None)


def test_duplicate_references_do_not_fail_the_open(image: Callable[..., Built]) -> None:
    built = image(layout="DD", features=F_NEED_CHECK, entries={2: lambda b: b.offsets[0]})
    with qedcore.open_image(str(built.path)) as img:
        assert_same(img.pread(2 * CS, 0), built.read(0, 2 * CS))


def make_base(path: Path, size: int = MiB) -> Callable[[int, int], bytes]:
    content = stamp(77, 0, size)
    path.write_bytes(content)
    return lambda pos, length: content[pos : pos + length] + bytes(max(0, min(length, pos + length - size)))


@pytest.mark.parametrize("size", [1, 255, 4095])
@pytest.mark.parametrize("where", [64, 512, 40000])
def test_backing_name_lengths(image: Callable[..., Built], tmp_path: Path, size: int, where: int) -> None:
    base = make_base(tmp_path / "b")
    if size > 255:
        name = "/" * (size - len(str(tmp_path / "b"))) + str(tmp_path / "b")
    else:
        name = "./" * ((size - 1) // 2) + "b"
    assert len(name) == size
    built = image(size=MiB, layout="DZ-", backing=name, backing_at=where, no_probe=True)
    assert_guest(built, backing=base)


def test_backing_name_up_to_the_header_area_end(image: Callable[..., Built], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    built = image(size=MiB, layout="DZ-", backing="base", backing_at=CS - 4, no_probe=True)
    assert_guest(built, backing=base)


def test_backing_name_inside_the_header(image: Callable[..., Built], tmp_path: Path) -> None:
    """The magic is a name too: 'QED' and a NUL, which ends it."""
    base = make_base(tmp_path / "QED")
    built = image(
        size=MiB,
        layout="DZ-",
        features=F_BACKING_FILE | F_NO_PROBE,
        header={"backing_filename_offset": 0, "backing_filename_size": 64},
    )
    assert_guest(built, backing=base)


def test_backing_name_ends_at_a_nul(image: Callable[..., Built], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.raw")
    built = image(size=MiB, layout="DZ-", backing=b"base.raw\0/etc/passwd", no_probe=True)
    assert_guest(built, backing=base)


def test_backing_name_that_is_not_utf8(image: Callable[..., Built], tmp_path: Path) -> None:
    name = b"b\xff\xfe.raw"
    base = make_base(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    built = image(size=MiB, layout="DZ-", backing=name, no_probe=True)
    assert_guest(built, backing=base)


def test_absent_backing_file_is_named(image: Callable[..., Built]) -> None:
    error = refusal(image(backing="no-such-base.raw", no_probe=True).path)
    assert "no-such-base.raw" in str(error)
    assert error.errno == errno.ENOENT


def test_stale_name_of_a_removed_backing_file_is_ignored(image: Callable[..., Built]) -> None:
    built = image(size=MiB, layout="D-", backing="gone.raw")
    patch_header(built.path, features=0, backing_filename_size=0)
    assert_guest(built)


@pytest.mark.parametrize(
    "geometry",
    [Geometry(4 * KiB, 1), Geometry(64 * KiB, 1), Geometry(64 * KiB, 4), Geometry(4 * MiB, 16)],
    ids=str,
)
@pytest.mark.parametrize("size", [0, 512, 10 * MiB, GiB])
def test_created_image_opens(tmp_path: Path, geometry: Geometry, size: int) -> None:
    path = tmp_path / "new.qed"
    qedcore.create(str(path), size, cluster_size=geometry.cluster_size, table_size=geometry.table_size)
    assert_sound(path)
    with qedcore.open_image(str(path)) as img:
        assert img.size == size
        if size:
            img.pwrite(stamp(1, size - 512, 512), size - 512)
    with QedFile(path) as oracle:
        if size:
            assert_same(oracle.read(size - 512, 512), stamp(1, size - 512, 512), size - 512)
    assert_sound(path)


CREATE_REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "cluster_size 2K": (MiB, {"cluster_size": 2048}, "2048"),
    "cluster_size 6K": (MiB, {"cluster_size": 6144}, "6144"),
    "cluster_size 128M": (MiB, {"cluster_size": 128 * MiB}, str(128 * MiB)),
    "table_size 0": (MiB, {"table_size": 0}, "0"),
    "table_size 3": (MiB, {"table_size": 3}, "3"),
    "table_size 32": (MiB, {"table_size": 32}, "32"),
    "size over the maximum": ((64 << 40) + 512, {}, str(64 << 40)),
    "size of 2**63": (2**63, {"cluster_size": 64 * MiB}, str(2**63)),
    "negative size": (-512, {}, "-512"),
    "name longer than the header": (MiB, {"cluster_size": 4096, "backing_file": "n" * 4050}, "4050"),
    "name of 4096 bytes": (MiB, {"backing_file": "n" * 4096}, "4096"),
}


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
@pytest.mark.parametrize("name", CREATE_REFUSED)
def test_create_refuses_and_keeps_the_old_file(tmp_path: Path, name: str, existing: bool) -> None:
    size, options, word = CREATE_REFUSED[name]
    path = tmp_path / "new.qed"
    if existing:
        path.write_bytes(b"precious")
    with pytest.raises(QEDError) as caught:
        qedcore.create(str(path), size, **options)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    if existing:
        assert path.read_bytes() == b"precious"
    else:
        assert not path.exists()
