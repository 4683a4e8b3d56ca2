"""Committing: the base gets what the guest sees, the image is emptied, and no crash changes what its guest reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.crashes import World, check_crashes, guest
from support.patterns import KiB, assert_same, stamp
from support.qed_image import F_NEED_CHECK, Built, QedFile, assert_sound, raw_reader, read_header

import qedcore
from qedcore.engine.source import Source
from qedcore.errors import CorruptImageError, QEDError
from qedcore.maintenance.commit import commit

CS = 4 * KiB
SMALL = {"cluster_size": CS, "table_size": 1}
SIZE = 600 * CS + 512
LAYOUT = {0: "data", 1: "zero", 3: "data", 4: "-", 5: "zero", 511: "zero", 512: "data", 600: "data"}
Image = Callable[..., Built]


def committed(path: Path, depth: int = 1, keep: bool = False, **options: Any) -> list[str]:
    """Commit the image at `path` into the layer `depth` below it; what the engine said."""
    said: list[str] = []
    asked: list[str] = []

    def write_below(name: str, path: str) -> bool:
        asked.append(name)
        return len(asked) == depth

    with qedcore.open_image(path, log=said.append, write_below=write_below, **options) as image:
        base: Source | None = image
        for _ in range(depth):
            assert base is not None
            base = base.backing
        assert base is not None
        commit(image, base, keep=keep)
    return said


def make_base(tmp_path: Path, image: Image, kind: str, size: int, **spec: Any) -> Path:
    if kind == "raw":
        (tmp_path / "base").write_bytes(stamp(9, 0, size))
        return tmp_path / "base"
    layout = dict.fromkeys(range(0, size // (64 * KiB), 2), "data")
    return image("base", size=size // 512 * 512, layout=layout, tag=9, **spec).path


def device(path: Path) -> bytes:
    with path.open("rb") as file:
        return guest(path) if file.read(4) == b"QED\0" else path.read_bytes()


SIZES = [SIZE, 700 * CS, 300 * CS + 700, CS, 0]


@pytest.mark.parametrize("keep", [False, True], ids=["emptied", "kept"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["raw", "qed"])
def test_sizes(image: Image, tmp_path: Path, kind: str, size: int, keep: bool) -> None:
    """The base grows, but is never cut."""
    base = make_base(tmp_path, image, kind, size)
    base_before = device(base)
    path = image(**SMALL, size=SIZE, layout=LAYOUT, backing="base", no_probe=kind == "raw").path
    content, before = path.read_bytes(), guest(path)
    committed(path, keep=keep)
    assert_same(device(base), before + base_before[SIZE:])
    assert_same(guest(path), before)
    if kind == "qed":
        assert_sound(base)
    report = assert_sound(path)
    if keep:
        assert path.read_bytes() == content
    else:
        assert (report.tables, report.allocated, path.stat().st_size) == (0, 0, 2 * CS)


def test_base_over_a_longer_file(image: Image, tmp_path: Path) -> None:
    """The base grows over what its own backing file has past its end: zeros for the guest before and after."""
    (tmp_path / "bottom").write_bytes(stamp(8, 0, SIZE + 40 * CS))
    base = image("base", **SMALL, size=10 * CS + 512, layout="DZ", backing="bottom", no_probe=True).path
    path = image(**SMALL, size=SIZE, layout=LAYOUT, backing="base").path
    before = guest(path)
    committed(path)
    assert_same(guest(base), before)
    assert_same(guest(path), before)
    assert_sound(base)
    assert (tmp_path / "bottom").read_bytes() == stamp(8, 0, SIZE + 40 * CS)


@pytest.mark.parametrize("middle", [SIZE, 20 * CS, 620 * CS], ids=["equal", "shorter", "longer"])
@pytest.mark.parametrize("kind", ["raw", "qed"])
def test_over_a_layer_between(image: Image, tmp_path: Path, kind: str, middle: int) -> None:
    """All that hides the base goes into it, also what the layer between has, and zeros past its end."""
    base = make_base(tmp_path, image, kind, SIZE)
    image(
        "middle.qed",
        cluster_size=CS,
        table_size=2,
        size=middle,
        layout="-DZDZ",
        backing="base",
        no_probe=kind == "raw",
    )
    path = image(**SMALL, size=SIZE, layout=LAYOUT, backing="middle.qed").path
    content, before = path.read_bytes(), guest(path)
    committed(path, depth=2, keep=True)
    assert_same(device(base), before)
    assert_same(guest(path), before)
    assert path.read_bytes() == content


def test_emptied_image_starts_small(image: Image, tmp_path: Path) -> None:
    """Wherever its L1 table was, and with leaks and entries past the end."""
    (tmp_path / "base").write_bytes(bytes(SIZE))
    for spec in ({"l1_last": True}, {"reverse": True, "leaks": 7}, {"header_size": 3}):
        layout = {**LAYOUT, 1000: "data"}
        path = image(**SMALL, size=SIZE, layout=layout, backing="base", no_probe=True, **spec).path
        before = guest(path)
        committed(path)
        header = max(1, read_header(path)["header_size"])
        assert path.stat().st_size == (header + 1) * CS
        assert_sound(path)
        assert_same(guest(path), before)
        with qedcore.open_image(path) as img:
            img.pwrite(b"x" * 512, 512)
        assert_sound(path)


def test_dirty_base_is_repaired_first(image: Image, tmp_path: Path) -> None:
    """QEMU writes into it as it is: an entry left by a crash becomes an alias of a new cluster (B8)."""
    layout = {0: "data", 2: "data"}
    base = image(
        "base", **SMALL, size=SIZE, layout=layout, features=F_NEED_CHECK, entries={7: lambda built: built.end}
    ).path
    path = image(**SMALL, size=SIZE, layout={3: "data", 4: "data"}, backing="base").path
    expected = bytearray(SIZE)
    with QedFile(base) as oracle:
        for cluster in layout:
            expected[cluster * CS : (cluster + 1) * CS] = oracle.read(cluster * CS, CS)
    expected[3 * CS : 5 * CS] = guest(path)[3 * CS : 5 * CS]
    said = committed(path)
    assert any(line.startswith(f"{base}: cleared L2 entry 7") for line in said)
    assert_same(guest(base), bytes(expected))
    assert_same(guest(path), bytes(expected))
    assert_sound(base)


@pytest.mark.parametrize("which", ["base", "image.qed"])
def test_damage_is_refused(image: Image, tmp_path: Path, which: str) -> None:
    """Clusters that are shared cannot be repaired on open; nothing is written, nothing emptied."""
    damage = {"features": F_NEED_CHECK, "entries": {9: lambda built: built.offsets[0]}}
    base = image("base", **SMALL, size=SIZE, layout="DD", **(damage if which == "base" else {})).path
    path = image(**SMALL, size=SIZE, layout="DDD", backing="base", **(damage if which != "base" else {})).path
    files = base.read_bytes(), path.read_bytes()
    with pytest.raises(CorruptImageError, match=f"{which} is damaged: repair it first"):
        committed(path)
    assert (base.read_bytes(), path.read_bytes()) == files


def test_holes_of_a_raw_base_stay(image: Image, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"")
    path = image(**SMALL, size=SIZE, layout=dict.fromkeys(range(600), "zero"), backing="base", no_probe=True).path
    committed(path)
    assert raw_reader(base)(0, SIZE) == bytes(SIZE)
    assert base.stat().st_blocks == 0


# -- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [False, True], ids=["as it is", "base repaired first"])
@pytest.mark.parametrize("kind", ["raw", "qed", "qed over raw"])
def test_crash(image: Image, tmp_path: Path, kind: str, repair: bool) -> None:
    """Whatever a crash leaves, the guest of the image reads the same, and the base is sound."""
    layout = {0: "data", 1: "zero", 3: "data", 30: "-", 520: "zero", 521: "data"}
    size = 522 * CS
    files = []
    if kind == "qed over raw":
        (tmp_path / "bottom").write_bytes(stamp(8, 0, size + CS))
        files.append(tmp_path / "bottom")
        spec: dict[str, Any] = {"backing": "bottom", "no_probe": True}
        base = image("base", **SMALL, size=8 * CS + 512, layout="DDZ", tag=9, **spec).path
    else:
        base = make_base(tmp_path, image, kind, 40 * CS, cluster_size=CS, table_size=1) if kind == "raw" else None
        base = base or image("base", **SMALL, size=40 * CS + 512, layout="DDZ", tag=9).path
    path = image(**SMALL, size=size, layout=layout, backing="base", no_probe=kind == "raw", l1_last=True).path
    before = guest(path)
    world = World(path, base, *files)
    committed(path, opener=world.open)

    def repair_base() -> None:
        if kind != "raw" and repair:
            with qedcore.open_image(base, cache="unsafe"):
                pass
            assert_sound(base, leaks=None)

    assert check_crashes(world, path, [before], repair_base) > 20
    world.save()
    assert_same(guest(path), before)
    assert_same(device(base), before)


def test_interrupted_between_clusters(image: Image) -> None:
    """Ctrl-C in the middle: what was done is complete, and both images are clean."""
    base = image("base", **SMALL, size=SIZE).path
    path = image(**SMALL, size=SIZE, layout=dict.fromkeys(range(0, 600, 50), "data"), backing="base").path
    before = guest(path)

    def progress(pos: int) -> None:
        if pos > 200 * CS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with qedcore.open_image(path, write_below=lambda name, path: True) as img:
            assert img.backing is not None
            commit(img, img.backing, progress=progress)
    assert assert_sound(base).allocated == 6  # all of the first mebibyte
    assert_sound(path)
    assert_same(guest(path), before)


@pytest.mark.parametrize("kind", ["raw", "qed"])
def test_error_at_each_op(image: Image, tmp_path: Path, kind: str) -> None:
    """Nothing is lost, and a second attempt finishes."""
    base = make_base(tmp_path, image, kind, 20 * CS)
    path = image(**SMALL, size=64 * CS, layout="DZDZ", backing="base", no_probe=kind == "raw").path
    files = {file: file.read_bytes() for file in (base, path)}
    before = guest(path)
    fail_at = 0
    while True:
        for file, content in files.items():
            file.write_bytes(content)
        world = World(path, base)
        world.stop_at(fail_at, QEDError("injected"), dead=True)
        try:
            committed(path, opener=world.open)
        except QEDError:
            pass
        else:
            break
        world.save()
        assert_same(guest(path), before)
        committed(path, cache="unsafe")
        assert_same(guest(path), before)
        assert_same(device(base)[: 64 * CS], before)
        assert_sound(path)
        fail_at += 1
    assert fail_at > 8


def test_written_counts_the_data(tmp_path: Path, image: Image) -> None:
    """For a limit of the rate: zeros and holes cost nothing."""
    make_base(tmp_path, image, "raw", SIZE)
    path = image(**SMALL, size=SIZE, layout=LAYOUT, backing="base", no_probe=True).path
    lengths: list[int] = []
    with qedcore.open_image(path, write_below=lambda name, path: True) as top:
        assert top.backing is not None
        commit(top, top.backing, written=lengths.append)
    assert sum(lengths) == 3 * CS + 512
