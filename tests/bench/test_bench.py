"""The benchmark works, and its arithmetic is right.  Nothing here depends on how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import os
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from support.qed_image import QedFile, assert_sound
from support.tools import require, unavailable

from bench import bench, clients, ratios, report, results
from bench.images import ENTRIES, Images, Sizes
from bench.results import Results
from bench.rows import (
    CLUSTER,
    FILLED_SIZE,
    FILLS,
    FLOOR,
    OURS,
    PLAIN,
    QEMU,
    QEMU_IO_URING,
    QEMU_THREADS,
    RAW,
    ROWS,
    SIZES,
    SPOTS,
    GiB,
    Measured,
    MiB,
    Row,
    Sample,
    fill_zones,
    scale_rows,
    spot_zones,
)
from bench.servers import BenchError

TINY = ["--rounds=1", "--seconds=0.05", "--long-seconds=0.2", "--image-size=2M", "--backing-size=64M"]
TINY += ["--empty-size=1G", "--huge-size=64M"]


@pytest.fixture
def tools() -> None:
    require("fio", "nbdkit", "qemu-img", "qemu-nbd", "nbdcopy", "nbdinfo")
    try:
        bench.require_tools([OURS, QEMU])
    except BenchError as e:
        unavailable(str(e))


def sample(contender: str, round_: int, requests: int = 0, **fields: Any) -> Sample:
    """Of one second."""
    return Sample(
        **{"seconds": 1, "row": "r", "contender": contender, "round": round_, "requests": requests, **fields}
    )


# -- ratios


def test_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    # The machine becomes four times as fast: medians of each contender alone would say 200 / 400.
    samples = [sample(OURS, n, ours) for n, ours in enumerate((100, 200, 900))]
    samples += [sample(QEMU, n, theirs) for n, theirs in enumerate((50, 400, 450))]
    assert ratios.to_qemu(samples, "r") == 2
    assert ratios.to_qemu(samples, "another") is None
    assert ratios.to_raw(samples, "r") is None


def test_ratio_of_seconds_favours_the_shorter() -> None:
    samples = [sample(OURS, 0, seconds=2.0), sample(QEMU, 0, seconds=6.0), sample(RAW, 0, seconds=1.0)]
    assert ratios.to_qemu(samples, "r") == 3
    assert ratios.to_raw(samples, "r") == 0.5


def test_requests_are_counted_by_the_time_they_took() -> None:
    samples = [sample(OURS, 0, 100, seconds=2.0), sample(QEMU, 0, 100, seconds=0.5)]
    assert ratios.to_qemu(samples, "r") == 0.25


def test_best_is_chosen_in_each_round() -> None:
    samples = [sample(OURS, n, 600) for n in range(3)]
    samples += [sample(QEMU, n, theirs) for n, theirs in enumerate((100, 200, 300))]
    samples += [sample(QEMU_IO_URING, n, theirs) for n, theirs in enumerate((300, 100, 100))]
    samples += [sample(RAW, n, 6000) for n in range(3)]
    assert ratios.to_best(samples, "r") == 2  # 2, 3, 2
    assert ratios.to_qemu(samples, "r") == 3  # 6, 3, 2


def test_best_leaves_out_rounds_that_lack_a_rival() -> None:
    samples = [sample(OURS, n, 600) for n in range(2)]
    samples += [sample(QEMU, 0, 100), sample(QEMU, 1, 100), sample(QEMU_IO_URING, 1, 300)]
    assert ratios.to_best(samples, "r") == 2  # round 0 would say 6
    assert ratios.to_best([s for s in samples if s.contender != QEMU_IO_URING], "r") is None
    samples += [sample(QEMU_THREADS, 1, 600)]
    assert ratios.to_best(samples, "r") == 1


def test_rounds_of_different_results_are_not_mixed() -> None:
    samples = [sample(OURS, 0, 100, run=0), sample(QEMU, 0, 50, run=0)]
    samples += [sample(OURS, 0, 900, run=1), sample(QEMU, 1, 10, run=1)]
    assert ratios.to_qemu(samples, "r") == 2


def test_several_runs_in_a_round_count_as_their_median() -> None:
    samples = [sample(OURS, 0, n) for n in (100, 110, 9000)] + [sample(QEMU, 0, n) for n in (1, 55, 60)]
    assert ratios.to_qemu(samples, "r") == 2


def test_ratio_of_memory_favours_the_smaller() -> None:
    samples = [sample(OURS, 0, 1, rss=20), sample(QEMU, 0, 1, rss=40), sample(QEMU_IO_URING, 0, 1, rss=10)]
    assert ratios.to_qemu(samples, "r", ratios.frugality) == 2
    assert ratios.to_best(samples, "r", ratios.frugality) == 0.5
    rows = [Row("r", "read"), Row("s", "seek"), Row("c", "check", work="check")]
    samples += [dataclasses.replace(s, row="s", rss=30) for s in samples]
    samples += [dataclasses.replace(s, row="c", rss=s.rss if s.contender == OURS else 1) for s in samples[:3]]
    assert report.worst_memory(Results(rows, samples), ratios.to_qemu) == 1


# -- tables


@pytest.mark.parametrize(
    "factor, text",
    [(None, ""), (0.066, "0.07"), (0.949, "0.95"), (0.994, "0.99"), (0.996, "1.0"), (1.25, "1.2"), (9.96, "10")],
)
def test_two_digits(factor: float | None, text: str) -> None:
    assert report.short(factor) == text


def made_up(**environment: str) -> Results:
    samples = [
        sample(OURS, 0, 300, rss=MiB),
        sample(QEMU, 0, 100, rss=2 * MiB),
        sample(QEMU_IO_URING, 0, 150, rss=MiB),
    ]
    samples += [sample(RAW, 0, 400, rss=MiB), sample(FLOOR, 0, 900, rss=MiB), sample(PLAIN, 0, 330, rss=MiB)]
    keys = ("date", "qemu", "nbdkit", "kernel", "cpus", "memory", "file system")
    return Results([Row("r", "a row")], samples, environment={key: key.upper() for key in keys})


def test_readme_gets_the_table_in_place(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):
        report.replace_part(readme, report.readme_part(made_up(), "chart.svg"))
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->\n") and text.endswith("(chart.svg)\n<!-- /bench -->\nafter\n")
    assert "\n|---|---|---|---|---|---|\n| a row | 3.0 | 2.0 | 0.75 | 0.91 | 0.33 |\n" in text
    assert "\n| peak memory of the server, the worst of these | 2.0 | 1.0 | 1.0 | 1.0 | 1.0 |\n" in text
    assert "old" not in text


def test_readme_without_the_marks_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for text in ("no marks", "<!-- bench --> only", "<!-- /bench --> <!-- bench -->"):
        readme.write_text(text)
        with pytest.raises(BenchError, match="must mark"):
            report.replace_part(readme, "new")
        assert readme.read_text() == text


def test_the_projects_readme_has_the_marks() -> None:
    assert bench.README.read_text().count(report.BEGIN) == bench.README.read_text().count(report.END) == 1


def test_several_results_become_one(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        made_up().save(path)
    found = results.load(paths)
    assert found.rows == made_up().rows
    assert [s.run for s in found.samples] == [0] * 6 + [1] * 6
    assert [dataclasses.replace(s, run=0) for s in found.samples] == made_up().samples * 2


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 2, "rows": []}'])
def test_other_files_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="x.json"):
        results.load([path])


# -- what is measured


def test_names_are_unique() -> None:
    names = [row.name for row in (*ROWS, *scale_rows())]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "size, zones",
    [(size, spot_zones(size)) for size in SIZES]
    + [(FILLED_SIZE, fill_zones(fill, free)) for fill in FILLS for free in (False, True)],
)
def test_zones_cover_the_image_and_all_requests(size: int, zones: tuple[tuple[int, int], ...]) -> None:
    assert sum(length for _, length in zones) == size
    assert sum(percent for percent, _ in zones) == 100
    assert len(zones) <= 256  # as many as fio takes


def images(tmp_path: Path, huge: int) -> Images:
    return Images(tmp_path, Sizes(full=2 * MiB, backing=MiB, empty=GiB, huge=huge))


def test_tables_of_shared_images(tmp_path: Path, tools: None) -> None:
    made = images(tmp_path, 4 * GiB)  # two tables
    clusters = 4 * GiB // CLUSTER
    report = assert_sound(made.shared("mapped"))
    assert report.allocated == clusters and report.tables == 2
    report = assert_sound(made.shared("half"))
    assert 0.45 < report.allocated / clusters < 0.55
    report = assert_sound(made.shared("sparse"))
    assert report.allocated == clusters // 100
    with QedFile(made.shared("sparse")) as image:
        assert all(image.read(cluster * CLUSTER, 512).strip(b"\0") for cluster in image.entries())


# The larger ones are made by the same code, and take long to look at.
ZONED = [row for row in scale_rows() if row.zones and row.size <= 256 * GiB and row.fill <= 25]


@pytest.mark.parametrize("row", ZONED, ids=[row.name for row in ZONED])
def test_requests_go_where_the_image_has_what_they_need(tmp_path: Path, tools: None, row: Row) -> None:
    with images(tmp_path, GiB).for_run(row, "qed") as path:
        assert_sound(path)
        with QedFile(path) as image:
            there = image.entries().keys()
            tables = image.l1.keys()
    assert not path.exists()
    meant: set[int] = set()  # clusters that requests go to
    at = 0
    for percent, length in row.zones:
        if percent:
            meant.update(range(at // CLUSTER, (at + length) // CLUSTER))
        at += length
    assert tables >= {cluster // ENTRIES for cluster in meant}
    if not row.writes:
        assert there == meant
    elif row.image == "vacant":
        assert len(there) == len(tables)
    else:
        assert not there & meant and len(there) == SPOTS * (ENTRIES * row.fill // 100)


def test_every_table_of_a_thin_image_has_one_cluster(tmp_path: Path, tools: None) -> None:
    with images(tmp_path, GiB).for_run(Row("x", "x", image="thin", size=64 * GiB), "qed") as path:
        report = assert_sound(path)
    assert report.tables == report.allocated == 32


# -- runs


ALL = ["randread-16", "seqread", "overwrite", "randalloc", "backing", "fsync", "copy-out", "copy-in", "convert"]
ALL += ["copy-sparse", "check", "map", "open"]


def run(tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    images = tmp_path / "images"
    images.mkdir()
    assert bench.main([*TINY, "--dir", str(images), "--json", str(out), *more]) == 0
    assert not list(images.iterdir())
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("<!-- bench --><!-- /bench -->")
    return path


def test_table(tmp_path: Path, tools: None, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--rows", ",".join(ALL), "--only", f"{OURS},{QEMU}")
    assert not found["left_out"]
    assert {row["name"] for row in found["rows"]} == set(ALL)
    took_part = {(s["row"], s["contender"]) for s in found["samples"]}
    assert took_part == {(row, contender) for row in ALL for contender in (OURS, QEMU)}
    for s in found["samples"]:
        assert s["seconds"] > 0 and s["rss"] > MiB, s
    assert found["environment"]["qemu"] and found["settings"]["seconds"] == 0.05
    assert "peak" not in capsys.readouterr().out
    assert bench.main(["--report", str(tmp_path / "out.json"), *places(readme)]) == 0
    assert len([line for line in readme.read_text().splitlines() if line.startswith("| ")]) == len(ALL) + 2


def test_io_uring(tmp_path: Path, tools: None) -> None:
    """Measured, or left out where it is forbidden."""
    found = run(tmp_path, "--rows", "randread-16", "--only", f"{OURS},{QEMU_IO_URING}")
    assert {s["contender"] for s in found["samples"]} | set(found["left_out"]) == {OURS, QEMU_IO_URING}


def test_what_nbdkit_can_do_alone(tmp_path: Path, tools: None) -> None:
    rows = ["randread-16", "overwrite", "copy-sparse", "map", "open"]
    found = run(tmp_path, "--rows", ",".join(rows), "--only", f"{OURS},{FLOOR}")
    assert not found["left_out"]
    assert {(s["row"], s["contender"]) for s in found["samples"]} == {(r, c) for r in rows for c in (OURS, FLOOR)}


def places(readme: Path) -> list[str]:
    return ["--readme", str(readme), "--chart", str(readme.with_name("chart.svg"))]


def test_scale(tmp_path: Path, tools: None, readme: Path) -> None:
    names = ["size-read@16GiB", "size-read-all@16GiB", "size-write@1GiB", "fill-write@1%", "connections@4"]
    names += ["start@64TiB", "long-read", "long-write"]
    # Long enough for several slices on a busy machine, too: each is a 40th, and needs a request that ends in it.
    found = run(tmp_path, "--scale", "--long-seconds=1", "--rows", ",".join(names), "--only", OURS)
    assert not found["left_out"]
    assert {s["row"] for s in found["samples"]} == set(names)
    assert all(len(s.get("slices", ())) > 3 for s in found["samples"] if s["row"].startswith("long"))
    pytest.importorskip("matplotlib")
    assert bench.main(["--report", str(tmp_path / "out.json"), *places(readme)]) == 0
    assert "(chart.svg)" in readme.read_text()


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import chart

    found = made_up()
    found.rows += [dataclasses.replace(row, curve="long-read", slices=True) for row in [Row("long", "long")]]
    found.samples += [sample(OURS, 0, 9, row="long", slices=(1000.0, 2000.0))]
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        chart.draw(found, path)
    text = paths[0].read_text()
    assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg")
    for word in ("a row", "3.0", "2.0", "0.75", "this plugin", "seconds"):
        assert f">{word}<" in text, word
    assert text == paths[1].read_text()


# -- what goes wrong


def test_interrupt_leaves_nothing_behind(tmp_path: Path, tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Path] = []

    def interrupt(self: clients.Client, server: Any) -> Measured:
        met.extend((self.tmp, self.target.parent, Path(f"/proc/{server.pid}")))
        assert all(path.exists() for path in met)
        raise KeyboardInterrupt

    monkeypatch.setattr(clients.Client, "measure", interrupt)
    assert bench.main([*TINY, "--dir", str(tmp_path), "--rows", "randread-1", "--only", OURS]) == 130
    assert len(met) == 3 and not any(path.exists() for path in met)


@pytest.mark.parametrize("failures", [2, 99])
def test_contender_that_fails(tmp_path: Path, tools: None, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    original = clients.Client.measure
    left = failures

    def measure(self: clients.Client, server: Any) -> Measured:
        nonlocal left
        if self.contender == QEMU and left:
            left -= 1
            raise BenchError("made up")
        return original(self, server)

    monkeypatch.setattr(clients.Client, "measure", measure)
    found = run(tmp_path, "--rows", "randread-1", "--only", f"{OURS},{QEMU}", "--rounds=2")
    assert [s["contender"] for s in found["samples"]].count(OURS) == 2
    assert len(found["failures"]) == 2 and "made up" in found["failures"][0]
    if failures == 2:  # tried again
        assert [s["contender"] for s in found["samples"]].count(QEMU) == 2 and not found["left_out"]
    else:  # left out
        assert len(found["samples"]) == 2 and list(found["left_out"]) == [f"randread-1, {QEMU}"]


def client(tmp_path: Path, name: str) -> clients.Client:
    (row,) = [row for row in ROWS if row.name == name]
    return clients.Client(row, OURS, images(tmp_path, GiB), tmp_path, tmp_path / "target", bench.PLUGIN, 0.1, 0)


@pytest.mark.parametrize(
    "row, requests, size, wrong",
    [
        ("randalloc", 1000, 0, "allocated 1"),  # hardly anything was new
        ("randalloc", 0, 0, "allocated 1"),  # more than was written
        ("seqalloc", 1, 256 * 1024, "1, not 4"),
        ("overwrite", 1, 4096, "1, not 0"),
        ("fsync", 64, 0, "0 flushes in 64 writes"),
    ],
)
def test_wrong_work_is_noticed(tmp_path: Path, tools: None, row: str, requests: int, size: int, wrong: str) -> None:
    c = client(tmp_path, row)
    made = Images(tmp_path, Sizes(huge=GiB))
    path = tmp_path / "one.qed"
    with made.for_run(Row("x", "x", image="thin", size=GiB), "qed") as image:
        os.link(image, path)
    with pytest.raises(BenchError, match=wrong):
        c.prove_image(path, Measured(1, requests, size), before=0)


def test_wrong_copy_is_noticed(tmp_path: Path, tools: None) -> None:
    c = client(tmp_path, "copy-in")
    path = tmp_path / "copy.raw"
    path.write_bytes(c.images.shared("full", "raw").read_bytes())
    c.prove_image(path, Measured(1), before=0)
    with open(path, "r+b") as f:
        f.seek(MiB)
        f.write(b"X")
    with pytest.raises(BenchError, match="mismatch"):
        c.prove_image(path, Measured(1), before=0)
