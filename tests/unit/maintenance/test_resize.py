"""Growing and shrinking: what the guest sees, what the file keeps, and crashes at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.crashes import World, check_crashes, guest
from support.patterns import KiB, assert_same, stamp
from support.qed_image import Built, Geometry, QedFile, assert_sound

import qedcore
from qedcore.errors import CorruptImageError, ImageFormatError, QEDError, UnsupportedError
from qedcore.maintenance import compact
from qedcore.maintenance.resize import resize

CS = 4 * KiB
SPAN = 512 * CS  # of one L2 table at 4 KiB / 1
SMALL = {"cluster_size": CS, "table_size": 1}
Image = Callable[..., Built]


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "WINDOW", 8 * CS)


def resized(path: Path, size: int, **options: Any) -> None:
    with qedcore.open_image(path, **options) as image:
        resize(image, size)
        assert image.size == size
        assert len(image.pread(size, 0)) == size


def expect(path: Path, before: bytes, size: int) -> None:
    """The old content up to the new size, then zeros; a clean image without leaks."""
    assert_same(guest(path), before[:size] + bytes(max(0, size - len(before))))
    assert_sound(path)


SIZES = (512, CS - 512, CS, CS + 512, 3 * CS, 7 * CS + 1024, SPAN - CS, SPAN, SPAN + 512, 2 * SPAN + 5 * CS)


@pytest.mark.parametrize("backing", [None, 5 * CS + 700, 2 * SPAN + 3 * CS], ids=["alone", "short", "long"])
@pytest.mark.parametrize("old", SIZES)
def test_every_size(image: Image, tmp_path: Path, old: int, backing: int | None) -> None:
    """From each size to each other, there and back: what was cut off never shows again (I1)."""
    last = (old - 1) // CS
    kinds = {0: "data", 2: "zero", last: "data", last - 1: "data", 520: "data", 1030: "zero"}
    spec: dict[str, Any] = dict(SMALL, size=old, layout={i: kind for i, kind in kinds.items() if 0 <= i <= last})
    if backing is not None:
        (tmp_path / "base").write_bytes(stamp(9, 0, backing))
        spec.update(backing="base", no_probe=True)
    path = image(**spec).path
    content = path.read_bytes()
    before = guest(path)
    for new in SIZES:
        path.write_bytes(content)
        resized(path, new, cache="unsafe")
        expect(path, before, new)
        resized(path, old, cache="unsafe")
        expect(path, before[:new], old)


@pytest.mark.parametrize("geometry", [Geometry(CS, 16), Geometry(64 * KiB, 4), Geometry(1024 * KiB, 2)], ids=str)
def test_geometries(image: Image, tmp_path: Path, geometry: Geometry) -> None:
    cs = geometry.cluster_size
    (tmp_path / "base").write_bytes(stamp(9, 0, 8 * cs))
    spec = {"cluster_size": cs, "table_size": geometry.table_size, "backing": "base", "no_probe": True}
    path = image(size=5 * cs + 512, layout="-DZD D", **spec).path
    before = guest(path)
    resized(path, 7 * cs)
    expect(path, before, 7 * cs)
    resized(path, 3 * cs + 1024)
    expect(path, before, 3 * cs + 1024)


def test_unallocated_partial_cluster_over_a_longer_backing_file(image: Image, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(stamp(9, 0, 10 * CS))
    path = image(**SMALL, size=2 * CS + 512, backing="base", no_probe=True).path
    before = guest(path)
    resized(path, 4 * CS)
    expect(path, before, 4 * CS)
    report = assert_sound(path)
    assert (report.allocated, report.zero) == (1, 1)  # no more than needed


def test_old_entries_past_the_end_stay_hidden(image: Image) -> None:
    """As QEMU leaves them, and crashes between the steps of a shrink (notes 5.4)."""
    layout = dict.fromkeys((0, 3, 4, 5, 511, 600, 2000), "data")
    path = image(**SMALL, size=4 * CS - 1024, layout=layout).path
    before = guest(path)
    resized(path, 2100 * CS)
    expect(path, before, 2100 * CS)
    assert assert_sound(path).allocated == 2


def test_grow_to_the_limit(image: Image) -> None:
    path = image(**SMALL, size=CS, layout="D").path
    resized_to = 512 * 512 * CS
    with qedcore.open_image(path) as img:
        resize(img, resized_to)
        img.pwrite(stamp(1, resized_to - 512, 512), resized_to - 512)
        with pytest.raises(ImageFormatError):
            resize(img, resized_to + 512)
    assert_sound(path)


@pytest.mark.parametrize("size", [1, 511, 513, 512 * 512 * CS + 512])
def test_refused_sizes(image: Image, size: int) -> None:
    path = image(**SMALL, layout="D").path
    before = path.read_bytes()
    with qedcore.open_image(path) as img, pytest.raises(ImageFormatError, match="size is invalid"):
        resize(img, size)
    assert path.read_bytes() == before
    path = image(cluster_size=1024 * KiB, table_size=16).path
    with qedcore.open_image(path) as img, pytest.raises((ImageFormatError, UnsupportedError)):
        resize(img, 2**63)


def test_shrink_gives_space_back(image: Image) -> None:
    """The file ends after what is left, also when its clusters and tables lie in the way."""
    path = image(**SMALL, size=2 * SPAN, layout=dict.fromkeys(range(0, 1024, 9), "data"), reverse=True, leaks=3).path
    before = guest(path)
    resized(path, 100 * CS)
    expect(path, before, 100 * CS)
    assert path.stat().st_size == CS * (1 + 1 + 1 + 12)


def test_shrink_zeroes_the_rest_of_the_last_cluster(image: Image) -> None:
    """For another program, which will grow the image without a look at it."""
    path = image(**SMALL, size=9 * CS, layout="DDDD").path
    resized(path, 2 * CS + 1024)
    with QedFile(path) as oracle:
        offset = oracle.entry(2)
    assert path.read_bytes()[offset + 1024 : offset + CS] == bytes(CS - 1024)


def test_shrink_to_nothing(image: Image) -> None:
    path = image(**SMALL, layout="DDZ").path
    resized(path, 0)
    assert path.stat().st_size == 2 * CS
    resized(path, 8 * CS)
    expect(path, b"", 8 * CS)


def test_shrink_of_a_damaged_image(image: Image) -> None:
    path = image(**SMALL, layout="DD", entries={2: lambda built: built.offsets[0]}).path
    with pytest.raises(CorruptImageError), qedcore.open_image(path) as img:
        resize(img, CS)
    with QedFile(path) as oracle:
        assert oracle.size == 16 << 20


def test_growth_of_a_damaged_image(image: Image) -> None:
    """With leftovers of a shrink past its end: nothing is changed before it is refused."""
    path = image(**{**SMALL, "size": 4 * CS}, layout={0: "data", 5: "data"}, entries={1: lambda b: b.offsets[0]}).path
    before = path.read_bytes()
    with pytest.raises(CorruptImageError), qedcore.open_image(path) as img:
        resize(img, 16 << 20)
    header, after = 64, path.read_bytes()
    assert after[header:] == before[header:]


CRASHES: dict[str, tuple[dict[str, Any], int]] = {
    "grow": ({"size": 3 * CS + 512, "layout": "DD D"}, 9 * CS),
    "grow, stale entries": (
        {"size": 3 * CS + 512, "layout": {0: "data", 3: "data", 5: "data", 600: "data"}},
        SPAN + CS,
    ),
    "grow, partial cluster unallocated": ({"size": 3 * CS + 512, "layout": "D--"}, 6 * CS),
    "grow into another table": ({"size": 510 * CS, "layout": "D"}, SPAN + 3 * CS),
    "shrink": ({"size": 9 * CS, "layout": "DDDDDDDDD", "reverse": True}, 4 * CS + 512),
    "shrink by tables": ({"size": 3 * SPAN, "layout": dict.fromkeys((1, 2, 600, 700, 1100), "data")}, SPAN + 512),
    "shrink, L1 last": ({"size": 3 * SPAN, "layout": dict.fromkeys((0, 600, 1100), "data"), "l1_last": True}, SPAN),
    "shrink, larger tables": (
        {"size": 1200 * CS, "table_size": 4, "layout": dict.fromkeys((1, 2, 600, 1100), "data"), "reverse": True},
        601 * CS,
    ),
}


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
@pytest.mark.parametrize("spec, size", CRASHES.values(), ids=CRASHES)
def test_crash(image: Image, tmp_path: Path, spec: dict[str, Any], size: int, backing: bool) -> None:
    files = []
    if backing:
        (tmp_path / "base").write_bytes(stamp(9, 0, SPAN + 40 * CS))
        files = [tmp_path / "base"]
        spec = dict(spec, backing="base", no_probe=True)
    path = image(**{**SMALL, **spec}).path
    old = guest(path)
    new = old[:size] + bytes(max(0, size - len(old)))
    world = World(path, *files)
    resized(path, size, opener=world.open)
    assert check_crashes(world, path, [old, new]) > 2
    world.save()
    expect(path, old, size)


@pytest.mark.parametrize("spec, size", CRASHES.values(), ids=CRASHES)
def test_error_at_each_op(image: Image, spec: dict[str, Any], size: int) -> None:
    """The image is the old or the new one, and a second attempt makes it the new one."""
    path = image(**{**SMALL, **spec}).path
    content, old = path.read_bytes(), guest(path)
    new = old[:size] + bytes(max(0, size - len(old)))
    fail_at = 0
    while True:
        path.write_bytes(content)
        world = World(path)
        world.stop_at(fail_at, QEDError("injected"))
        try:
            resized(path, size, opener=world.open)
        except QEDError:
            pass
        else:
            break
        world.save()
        assert guest(path) in (old, new)
        resized(path, size, cache="unsafe")
        assert_same(guest(path), new)
        assert_sound(path, leaks=0 if size < len(old) else None)
        fail_at += 1
    assert fail_at > 5
