"""The test suite's own builder and verifier agree with qemu-img; otherwise nothing that uses them means much."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB, Model, check_model, random_ops
from support.qed_image import QEMU_GEOMETRIES, Built, Geometry, ImageSpec, QedFile, build, raw_reader

LAYOUTS = {
    "mixed": {"layout": "DZ-DDD--ZZD"},
    "two tables": {"layout": {0: "data", 511: "zero", 1023: "data", 1024: "data", 2047: "-"}},
    "reverse, L1 last": {"layout": "DDDZ-D", "reverse": True, "l1_last": True},
    "header_size 0": {"layout": "D-DZ", "header_size": 0},
    "header_size 3": {"layout": "D-DZ", "header_size": 3},
    "header_size 3, L1 last": {"layout": "DD", "header_size": 3, "l1_last": True},
    "no table": {"layout": ""},
}


@pytest.mark.parametrize("geometry", QEMU_GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_built_image_is_what_qemu_reads(tmp_path: Path, geometry: Geometry, name: str) -> None:
    cs, ts = geometry.cluster_size, geometry.table_size
    size = 2 * geometry.l2_span if geometry.l2_span <= 16 * MiB else 12 * cs
    layout = LAYOUTS[name]["layout"]
    if isinstance(layout, dict):
        layout = {c: kind for c, kind in layout.items() if c * cs < size}
    spec = ImageSpec(size=size, cluster_size=cs, table_size=ts, **{**LAYOUTS[name], "layout": layout})
    built = build(tmp_path / "a.qed", spec)
    qemu.assert_check_clean(built.path)
    qemu.to_raw(built.path, tmp_path / "a.raw")
    with QedFile(built.path) as oracle:
        for pos, length in built.ranges():
            want = built.read(pos, length)
            assert oracle.read(pos, length) == want
            assert raw_reader(tmp_path / "a.raw")(pos, length) == want


@pytest.mark.parametrize("geometry", [Geometry(4 * KiB, 2), Geometry(64 * KiB, 4)], ids=str)
def test_oracle_reads_what_qemu_wrote(tmp_path: Path, rng: random.Random, geometry: Geometry) -> None:
    path = tmp_path / "q.qed"
    qemu.create(path, 8 * MiB, geometry)
    model = Model(8 * MiB)
    ops = random_ops(rng, 8 * MiB, geometry.cluster_size, 30)
    qemu.apply(path, ops, tmp_path)
    for op in ops:
        op.apply(model)
    qemu.assert_check_clean(path)
    with QedFile(path) as oracle:
        check_model(model, oracle.read)


BROKEN = {  # spec changes -> errors and leaks of qemu-img check
    "misaligned": ({"entries": {1: 0x50088}}, 1, 0),
    "beyond the file": ({"entries": {1: lambda b: b.end}}, 1, 0),
    "in the header": ({"header_size": 2, "entries": {1: 64 * KiB}}, 1, 0),
    "duplicate": ({"entries": {1: lambda b: b.offsets[0]}}, 1, 0),
    "points to the table": ({"entries": {1: lambda b: b.l2_offsets[0]}}, 1, 0),
    "leak": ({"leaks": 1}, 0, 1),
    "leak by an entry": ({"layout": "DDD", "entries": {2: 0}}, 0, 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verifier_finds_what_qemu_img_check_finds(image: Callable[..., Built], name: str) -> None:
    changes, errors, leaks = BROKEN[name]
    built = image(**{"layout": "D", **changes})
    with QedFile(built.path) as oracle:
        report = oracle.verify()
    assert (len(report.errors), len(report.leaks)) == (errors, leaks), report
    rc = qemu.qemu_img("check", "-f", "qed", built.path).rc
    assert rc == (2 if errors else 3), rc
