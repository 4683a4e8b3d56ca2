"""Every call that a request makes fails once: nothing is lost later."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, stamp
from support.qed_image import QedFile, assert_sound

import qedcore
from qedcore.engine import allocator
from qedcore.errors import (
    StorageError,
)
from unit.engine.tapped import BASE, CS, Image, Tapped
from unit.fakes import CHANGES, Call, FailAt, open_tapped


@dataclass(frozen=True)
class Scene:
    """Where the failing request goes: what is there, and what is below."""

    layout: str
    pos: int  # bytes
    length: int  # bytes
    backing: int = 0  # bytes
    zero: bool = False
    may_trim: bool = False


KS = 4 * KiB  # cluster size of these scenes


END = 16 * KS


BACKED = END


SCENES = {
    "no table": Scene("", 3 * KS + 100, 700),
    "no cluster": Scene("D----", 3 * KS + 100, 700),
    "zero clusters": Scene("DZZZZZ", 2 * KS + 100, 2 * KS),
    "in place": Scene("DDDDD", 3 * KS + 100, 700),
    "mixed": Scene("D-ZD-Z", KS - 300, 4 * KS),
    "no table, backing": Scene("", 3 * KS + 100, 700, BACKED),
    "no cluster, backing": Scene("D----", 3 * KS + 100, 700, BACKED),
    "zero clusters, backing": Scene("DZZZZZ", 2 * KS + 100, 2 * KS, BACKED),
    "zero": Scene("D----", KS, 3 * KS, BACKED, zero=True),
    "zero, no table": Scene("", 100, 3 * KS, BACKED, zero=True),
    "zero, mixed": Scene("D-ZD-Z", KS - 300, 4 * KS, BACKED, zero=True),
    "freeing zero": Scene("DDDDDD", KS - 300, 4 * KS, may_trim=True, zero=True),
    "freeing zero, backing": Scene("D-ZDDZ", KS - 300, 5 * KS, BACKED, may_trim=True, zero=True),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN], ids=["EIO", "EAGAIN"])
@pytest.mark.parametrize("name", SCENES)
def test_every_failed_call(
    tapped: Tapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, late: bool
) -> None:
    """B2, B6: the request fails with that errno; what memory says is what the disk says; nothing is lost later."""
    scene = SCENES[name]
    monkeypatch.setattr(allocator, "GROWTH_STEP", 4 * KS)
    for n in range(1, 100):
        fault = FailAt(n, [*CHANGES, "pread"], code, late)
        fault.armed = False
        img, tap, built = tapped(fault, scene.backing, layout=scene.layout, cluster_size=KS, table_size=2)
        old = img.pread(END, 0)
        new = bytearray(old)
        data = bytes(scene.length) if scene.zero else stamp(6, scene.pos, scene.length)
        new[scene.pos : scene.pos + scene.length] = data

        def request() -> None:
            if scene.zero:
                img.zero(scene.pos, scene.length, may_trim=scene.may_trim)  # noqa: B023
            else:
                img.pwrite(data, scene.pos)  # noqa: B023

        fault.armed = True
        try:
            request()
        except StorageError as error:
            assert error.errno == code
        else:
            if fault.hit is None:
                break
            # Only the step by which the file grows may fail unseen: it grows by what is needed instead.
            assert fault.hit.name == "truncate"
            assert img.pread(END, 0) == new
        where = f"call {n}: {fault.hit}"
        got = img.pread(END, 0)
        for pos in range(0, END, 512):
            assert got[pos : pos + 512] in (old[pos : pos + 512], bytes(new[pos : pos + 512])), f"{where}, {pos:#x}"
        with QedFile(built.path) as file:
            assert file.read(0, END) == got, where
            assert not file.verify().errors, where
        # Other clusters of the same table, then the same request again.
        more = {7 * KS + 500: b"other" * 50, scene.pos + scene.length + 600: b"near" * 50}
        expected = bytearray(got)
        for pos, text in more.items():
            img.pwrite(text, pos)
            expected[pos : pos + len(text)] = text
        assert img.pread(END, 0) == expected, where
        request()
        expected[scene.pos : scene.pos + scene.length] = data
        img.flush()
        # A kill after the flush: the next open repairs if it has to, and finds everything.
        copy = tmp_path / "killed.qed"
        shutil.copy(built.path, copy)
        for path in (copy, built.path):
            if path == built.path:
                img.close()
            with qedcore.open_image(path) as again:
                assert again.pread(END, 0) == expected, where
            with QedFile(path) as file:
                assert file.read(0, END) == expected, where
            assert_sound(path, leaks=None)
    assert n > (1 if name == "in place" else 3)


def test_lost_write_of_b2(tapped: Tapped) -> None:
    """The reproduction of B2: entries that exist in memory only, later acknowledged as in-place writes."""
    fault = FailAt(1, ["pwrite"])
    img, tap, built = tapped(layout="D")
    tap.hook = lambda call: fault(call) if call.offset == built.l2_offsets[0] else None
    with pytest.raises(StorageError):
        img.pwrite(b"a" * CS, CS)
    assert img.pread(CS, CS) == bytes(CS)
    img.pwrite(b"b" * CS, CS)
    img.flush()
    img.close()
    with QedFile(built.path) as file:
        assert file.read(CS, CS) == b"b" * CS


def test_need_check_stays_after_a_failed_metadata_write(tapped: Tapped) -> None:
    """The next writable open repairs what nobody knows."""
    fault = FailAt(1, ["pwrite"], late=True)
    img, _, built = tapped(lambda call: fault(call) if call.length == 512 else None, layout="D")
    with pytest.raises(StorageError):
        img.pwrite(b"a" * CS, CS)
    img.close()
    with QedFile(built.path) as file:
        assert file.need_check
    qedcore.open_image(built.path).close()
    assert_sound(built.path)


def test_a_table_that_cannot_be_read_again_leaks_nothing(image: Image, tmp_path: Path) -> None:
    """It left the cache before new data was linked there: nothing points at that, so it is used again."""
    cluster_size, reach = 4 * KiB, 512 * 4 * KiB
    (tmp_path / "base.raw").write_bytes(stamp(BASE, 0, MiB))
    layout = {0: "data", 512: "zero", 1024: "zero"}
    spec: dict[str, Any] = {"cluster_size": cluster_size, "table_size": 1, "size": 3 * reach}
    built = image(layout=layout, backing="base.raw", no_probe=True, **spec)
    img, tap = open_tapped(built.path, l2_cache=0)  # room for two
    img.pwrite(b"first", 5 * cluster_size)
    end = img._bounds.end

    def forget() -> None:
        tap.hook = None
        for table in (1, 2):
            img.pread(1, table * reach)

    def evict(call: Call) -> None:
        if call.name == "flush":
            forget()
            tap.hook = FailAt(1, ["pread"])

    forget()
    tap.hook = evict
    with pytest.raises(StorageError, match="injected"):
        img.pwrite(b"lost", 9 * cluster_size)
    img.pwrite(b"next", 11 * cluster_size)
    assert img._bounds.end == end + cluster_size
    img.close()
    assert_sound(built.path)
