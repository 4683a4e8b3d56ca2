"""Salvage: what is found without a header, without an L1 table, in a file cut short; and what is called lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB
from support.qed_image import Built, Geometry, raw_reader

from qedcore.cli.main import main
from qedcore.engine.raw import RawImage
from qedcore.errors import QEDError, StorageError
from qedcore.format.geometry import Bounds
from qedcore.format.geometry import Geometry as QedGeometry
from qedcore.maintenance.header_fit import l1_shaped
from qedcore.maintenance.salvage import FROM_BACKING, GOOD, GUESSED, LOST, ZERO, Range, Salvage
from qedcore.storage.file import FileStorage
from unit.fakes import CHANGES, FailAt, Tap

Image = Callable[..., Built]

CS = 16 * KiB
E = Geometry(CS, 2).entries  # 4096 entries: 64 MiB for each L2 table
LAYOUT = {0: "data", 1: "data", 2: "data", 5: "zero", 7: "data", E: "data", E + 1: "data", E + 2: "data"}
SPEC: dict[str, Any] = {"cluster_size": CS, "table_size": 2, "size": 2 * E * CS, "layout": LAYOUT}

Damage = Callable[[bytearray, Built], None]


def no_header(raw: bytearray, built: Built) -> None:
    raw[:64] = bytes(64)


def no_l1(raw: bytearray, built: Built) -> None:
    raw[built.l1_offset : built.l1_offset + 2 * CS] = bytes(2 * CS)


def garbage_l1(raw: bytearray, built: Built) -> None:
    raw[built.l1_offset : built.l1_offset + 2 * CS] = b"\xa5" * (2 * CS)


def garbage_header(raw: bytearray, built: Built) -> None:
    raw[:512] = b"\x5a" * 512


def no_header_no_l1(raw: bytearray, built: Built) -> None:
    no_header(raw, built)
    no_l1(raw, built)


def second_l1_entry(raw: bytearray, built: Built) -> None:
    raw[built.l1_offset + 8 : built.l1_offset + 16] = b"\xff" * 8


def rescue(image: Path, out: Path, **known: Any) -> tuple[Any, list[Range]]:
    """(what was found, ranges) after writing the raw file."""
    storage = FileStorage(image, writable=False)
    out.write_bytes(b"")
    target = FileStorage(out, writable=True)
    try:
        salvage = Salvage(storage, **known)
        found = salvage.search()
        target.truncate(found.image_size)
        return found, salvage.write(found, RawImage(target, writable=True))
    finally:
        storage.close()
        target.close()


def damaged(image: Image, damage: Damage | None, **changes: Any) -> Built:
    built = image(**{**SPEC, **changes})
    if damage is not None:
        raw = bytearray(built.path.read_bytes())
        damage(raw, built)
        built.path.write_bytes(raw)
    return built


def assert_rescued(built: Built, out: Path, size: int | None = None) -> None:
    read = raw_reader(out)
    size = built.spec.size if size is None else size
    assert out.stat().st_size == size
    for cluster in {n for mapped in LAYOUT for n in (mapped, mapped + 1)}:
        if (cluster + 1) * CS <= size:
            assert read(cluster * CS, CS) == built.read(cluster * CS, CS), cluster


# damage, what the user knows -> is the size found, is the position guessed
KNOWN = {"cluster_size": CS, "table_size": 2, "image_size": 2 * E * CS}
WHOLE: dict[str, tuple[Damage | None, dict[str, int | bool], bool, bool]] = {
    "nothing": (None, {}, True, False),
    "no header": (no_header, {}, False, False),
    "garbage for a header": (garbage_header, {}, False, False),
    "no header, size known": (no_header, {"image_size": 2 * E * CS}, True, False),
    "no L1 table": (no_l1, {"guess": True}, True, True),
    "garbage for an L1 table": (garbage_l1, {}, True, True),
    "an L1 entry": (second_l1_entry, {}, True, True),
    "neither, all known": (no_header_no_l1, KNOWN, True, True),
    "neither, table_size known": (no_header_no_l1, {"table_size": 2}, False, True),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "L1 last"])
def test_everything_is_found(image: Image, tmp_path: Path, name: str, reverse: bool) -> None:
    damage, known, whole_size, guessed = WHOLE[name]
    built = damaged(image, damage, l1_last=reverse)
    before = built.path.read_bytes()
    found, ranges = rescue(built.path, tmp_path / "out.raw", **known)
    assert (found.geometry.cluster_size, found.geometry.table_size) == (CS, 2)
    assert_rescued(built, tmp_path / "out.raw", None if whole_size else (E + 3) * CS)
    assert bool(found.guessed) is guessed
    assert {piece.why for piece in ranges if piece.state == GOOD and piece.start >= E * CS} == {
        GUESSED if guessed else ""
    }
    assert not any(piece.state == LOST for piece in ranges)
    assert sum(piece.length for piece in ranges) == found.image_size
    assert [piece.start for piece in ranges[1:]] == [piece.start + piece.length for piece in ranges[:-1]]
    assert built.path.read_bytes() == before


def test_an_l1_table_without_entries_is_believed(image: Image, tmp_path: Path) -> None:
    """The tables that lie about may be old ones."""
    built = damaged(image, no_l1)
    found, ranges = rescue(built.path, tmp_path / "out.raw")
    assert not found.guessed and ranges == [Range(0, built.spec.size, ZERO, "")]
    assert (tmp_path / "out.raw").stat().st_blocks == 0


@pytest.mark.parametrize("other", ["another table", "the L1 table"])
def test_tables_that_overlap_are_guessed(image: Image, tmp_path: Path, other: str) -> None:
    """The entry of one of them leads to another guest range's data."""
    built = damaged(
        image, None, l1_entries={1: lambda b: b.l2_offsets[0] if other == "another table" else b.l1_offset}
    )
    found, _ = rescue(built.path, tmp_path / "out.raw")
    assert found.guessed == ({0, 1} if other == "another table" else {1})
    assert raw_reader(tmp_path / "out.raw")(0, 8 * CS) == built.read(0, 8 * CS)


def test_ranges(image: Image, tmp_path: Path) -> None:
    built = damaged(image, None, entries={9: 12345})
    _, ranges = rescue(built.path, tmp_path / "out.raw")
    assert ranges == [
        Range(0, 3 * CS, GOOD, ""),
        Range(3 * CS, 4 * CS, ZERO, ""),
        Range(7 * CS, CS, GOOD, ""),
        Range(8 * CS, CS, ZERO, ""),
        Range(9 * CS, CS, LOST, "entry 0x3039"),
        Range(10 * CS, (E - 10) * CS, ZERO, ""),
        Range(E * CS, 3 * CS, GOOD, ""),
        Range((E + 3) * CS, (E - 3) * CS, ZERO, ""),
    ]


def test_file_cut_short(image: Image, tmp_path: Path) -> None:
    """Tables are before their data here, so a cut costs data only; the last cluster is there in part."""
    built = damaged(image, None, reverse=False)
    at = built.l2_offsets[1]
    raw = built.path.read_bytes()
    # the data of the second table, which is before it in the file, to the end of it
    moved = built.end
    entries = b"".join((moved + n * CS).to_bytes(8, "little") for n in range(3))
    data = b"".join(raw[built.offsets[E + n] : built.offsets[E + n] + CS] for n in range(3))
    cut = moved + CS + 1000
    built.path.write_bytes((raw[:at] + entries + raw[at + 24 :] + data)[:cut])
    _, ranges = rescue(built.path, tmp_path / "out.raw")
    lost = [piece for piece in ranges if piece.state == LOST]
    assert [(piece.start, piece.start + piece.length) for piece in lost][0][0] == (E + 1) * CS + 1000
    assert sum(piece.length for piece in lost) == 2 * CS - 1000
    read = raw_reader(tmp_path / "out.raw")
    assert read(E * CS, CS + 1000) == built.read(E * CS, CS + 1000)
    assert read((E + 1) * CS + 1000, CS) == bytes(CS)


def test_lost_table(image: Image, tmp_path: Path) -> None:
    built = damaged(image, None)
    with built.path.open("r+b") as f:
        f.truncate(built.l2_offsets[1] + 100)
    _, ranges = rescue(built.path, tmp_path / "out.raw")
    assert ranges[-1] == Range(E * CS, E * CS, LOST, "no table")
    assert raw_reader(tmp_path / "out.raw")(0, 8 * CS) == built.read(0, 8 * CS)


def test_backing_is_told(image: Image, tmp_path: Path) -> None:
    built = damaged(image, None, backing="gone.raw", no_probe=True)
    _, ranges = rescue(built.path, tmp_path / "out.raw")
    zero = [piece for piece in ranges if piece.state == ZERO]
    assert {piece.why for piece in zero} == {"", "the backing file's data belongs here"}
    assert [piece.start for piece in zero if not piece.why] == [5 * CS]  # the zero cluster


def test_sparse(image: Image, tmp_path: Path) -> None:
    damaged(image, None)
    rescue(tmp_path / "image.qed", tmp_path / "out.raw")
    info = (tmp_path / "out.raw").stat()
    assert info.st_blocks * 512 < info.st_size // 4


@pytest.mark.parametrize("content", [b"", b"x", bytes(MiB), b"\xff" * MiB, b"QED\0" + b"\xff" * 70000])
def test_nothing_to_find(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(QEDError, match="nothing in the file"):
        rescue(tmp_path / "a", tmp_path / "out.raw")


@pytest.mark.parametrize("backing", [None, "gone.raw"])
def test_an_empty_image(image: Image, tmp_path: Path, backing: str | None) -> None:
    """Whole, without a single table: all of it is zeros, or the backing file's.  Anything else is not known."""
    built = image(size=5 * MiB, backing=backing)
    found, ranges = rescue(built.path, tmp_path / "out.raw")
    assert ranges == [Range(0, 5 * MiB, ZERO, FROM_BACKING if backing else "")] and not found.guessed
    assert any("empty" in note for note in found.notes)
    assert (tmp_path / "out.raw").read_bytes() == bytes(5 * MiB)
    command = ["salvage", "-q", "--size", "5M", str(built.path), str(tmp_path / "out.raw")]
    assert main(command) == 0 and main([*command[:3], "6M", *command[4:]]) == 1
    built = image(size=5 * MiB, backing=backing, leaks=1)  # whose leak is not a reason to doubt that
    assert rescue(built.path, tmp_path / "out.raw")[1] == ranges
    for lost in ({"l1_entries": {0: 1 << 40}}, {"header": {"table_size": 3}}):
        built = image(size=5 * MiB, backing=backing, **lost)
        with pytest.raises(QEDError, match="nothing in the file"):
            rescue(built.path, tmp_path / "out.raw")


def test_noise(tmp_path: Path, rng: random.Random) -> None:
    """Random bytes do not look like tables, in any geometry."""
    (tmp_path / "a").write_bytes(bytes(rng.getrandbits(8) for _ in range(MiB)))
    for cluster_size in (0, 4 * KiB, 64 * KiB):
        with pytest.raises(QEDError, match="nothing in the file"):
            rescue(tmp_path / "a", tmp_path / "out.raw", cluster_size=cluster_size)


@pytest.mark.parametrize("known", [{"cluster_size": 5000}, {"table_size": 3}, {"image_size": 1000}])
def test_impossible_knowledge(image: Image, tmp_path: Path, known: dict[str, int]) -> None:
    with pytest.raises(QEDError, match=str(next(iter(known.values())))):
        rescue(damaged(image, None).path, tmp_path / "out.raw", **known)


def test_size_that_the_geometry_cannot_have(image: Image, tmp_path: Path) -> None:
    with pytest.raises(QEDError, match=f"image size {1 << 62} is more than .* {4096 * 512 * 512}$"):
        rescue(damaged(image, None).path, tmp_path / "out.raw", cluster_size=4096, table_size=1, image_size=1 << 62)


def test_failing_target(image: Image, tmp_path: Path) -> None:
    built = damaged(image, None)
    (tmp_path / "out.raw").write_bytes(b"")
    for n in range(1, 5):
        target = Tap(FileStorage(tmp_path / "out.raw", True), FailAt(n, CHANGES))
        salvage = Salvage(FileStorage(built.path, False))
        with pytest.raises(StorageError):
            target.truncate((found := salvage.search()).image_size)
            salvage.write(found, RawImage(target, writable=True))


# -- the command -----------------------------------------------------------------------------------------------------


def test_command(image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = damaged(image, no_header)
    out = tmp_path / "out.raw"
    assert main(["salvage", str(built.path), str(out), "--size", str(built.spec.size)]) == 0
    assert_rescued(built, out)
    text = capsys.readouterr().out
    assert f"cluster_size {CS}, table_size 2, size {built.spec.size}" in text
    assert f"{0:<#16x}{3 * CS:<#16x}good" in text
    assert main(["salvage", "--output=json", "--cluster-size", "16k", str(built.path), str(out)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ranges"][0] == {"start": 0, "length": 3 * CS, "state": "good"}
    assert facts["good-bytes"] == 7 * CS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.qed", "out.raw"]


def test_command_incomplete(image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = damaged(image, no_l1)
    assert main(["salvage", "-q", "--guess", str(built.path), str(tmp_path / "out.raw")]) == 2
    assert capsys.readouterr().out == ""


def test_command_keeps_the_target_when_it_fails(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.raw"
    out.write_bytes(b"precious")
    (tmp_path / "bad").write_bytes(b"no image")
    built = damaged(image, None)
    assert main(["salvage", str(tmp_path / "bad"), str(out)]) == 1
    assert main(["salvage", str(built.path), str(built.path)]) == 1
    assert out.read_bytes() == b"precious"
    assert "nothing in the file" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "image.qed", "out.raw"]


class Counting(FileStorage):
    """Counts the bytes that are read."""

    read = 0

    def pread_into(self, buf: Any, offset: int) -> None:
        self.read += len(buf)
        super().pread_into(buf, offset)


def test_holes_in_large_clusters_are_not_read(image: Image) -> None:
    """A possible L1 table of 1 GiB has a few entries, and a search looks at many such places."""
    geometry = QedGeometry(64 * MiB, 16)
    built = image(cluster_size=64 * MiB, table_size=16, layout={0: "data", 3: "data"})
    storage = Counting(built.path, writable=False)
    try:
        found = list(l1_shaped(storage, geometry, Bounds(geometry, 1, storage.size())))
        assert built.l1_offset in found
        assert storage.read < 64 * MiB
    finally:
        storage.close()
