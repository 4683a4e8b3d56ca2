"""`qed check` beside `qemu-img check`: same output, exit codes and JSON; and where QEMU is wrong, not the same."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import GiB, KiB, MiB
from support.qed_image import F_NEED_CHECK, Built, ImageSpec, QedFile, assert_sound, build, read_header
from support.tools import PYTHON, REPO, Result, run

from qedcore.cli.main import main

Image = Callable[..., Built]
CS = 64 * KiB


class Qed:
    """The command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: str | os.PathLike[str]) -> Result:
        self._capsys.readouterr()
        try:
            rc = main([os.fspath(arg) for arg in args])
        except SystemExit as stop:
            rc = int(str(stop.code))
        text = self._capsys.readouterr()
        return Result(rc, text.out, text.err)


@pytest.fixture
def qed(capsys: pytest.CaptureFixture[str]) -> Qed:
    return Qed(capsys)


# Images on which both find the same
SAME: dict[str, dict[str, Any]] = {
    "empty": {},
    "empty device": {"size": 0},
    "data": {"layout": "DD"},
    "mixed": {"layout": "D-ZDD---D"},
    "zero clusters only": {"layout": "ZZ"},
    "not a multiple of clusters": {"size": 5 * CS + 512, "layout": "D----D"},
    "fragmented": {"layout": "DDDDDD", "reverse": True},
    "over 100%": {"size": CS, "layout": "DDD"},
    "two tables": {"size": 4 * GiB, "layout": {0: "data", 32768: "data", 32769: "zero"}},
    "dirty": {"layout": "D", "features": F_NEED_CHECK},
    "leak": {"layout": "D", "leaks": 1},
    "leaks by entries": {"layout": "DDDD", "entries": {1: 0, 2: 0}},
    "partial cluster": {"layout": "D", "trailing": b"t" * 1000},
    "cut by less than a sector": {"layout": "D", "l1_last": True, "length": 10 * CS - 511},
    "past the end": {"layout": "D", "entries": {1: lambda b: b.end}},
    "misaligned": {"layout": "D", "entries": {1: 0x50088}},
    "in the header": {"header_size": 2, "layout": "D", "entries": {1: CS}},
    "2": {"layout": "D", "entries": {1: 2}},
    "L1 is 1": {"l1_entries": {0: 1}},
    "L1 past the end": {"layout": "D", "size": 4 * GiB, "l1_entries": {1: lambda b: b.end}},
    "duplicate": {"layout": "D", "entries": {1: lambda b: b.offsets[0]}},
    "data in the table": {"layout": "D", "entries": {1: lambda b: b.l2_offsets[0]}},
    "table twice": {"layout": "D", "size": 4 * GiB, "l1_entries": {1: lambda b: b.l2_offsets[0]}},
    "errors and leaks": {"layout": "DD", "leaks": 2, "entries": {0: 5}},
}
SAME["cut by less than a sector"]["length"] = 10 * CS - 511


@pytest.mark.parametrize("name", SAME)
def test_same_result(image: Image, qed: Qed, name: str) -> None:
    built = image(**SAME[name])
    before = built.path.read_bytes()
    theirs, ours = qemu.qemu_img("check", "-f", "qed", built.path), qed("check", "-f", "qed", built.path)
    assert (ours.rc, ours.out, ours.err) == (theirs.rc, theirs.out, "")
    assert built.path.read_bytes() == before


@pytest.mark.parametrize("name", SAME)
def test_same_json(image: Image, qed: Qed, name: str) -> None:
    built = image(**SAME[name])
    theirs = qemu.qemu_img("check", "--output=json", built.path)
    ours = qed("check", "--output=json", built.path)
    assert (ours.rc, json.loads(ours.out)) == (theirs.rc, json.loads(theirs.out))
    assert ours.out.splitlines()[1].startswith('    "')  # indented alike


# Repairs that QEMU does as well
REPAIRED = (
    "data",
    "empty",
    "dirty",
    "past the end",
    "misaligned",
    "2",
    "L1 is 1",
    "L1 past the end",
    "in the header",
)


@pytest.mark.parametrize("name", REPAIRED)
def test_same_repair(image: Image, qed: Qed, tmp_path: Path, name: str) -> None:
    built = image(**SAME[name])
    other = tmp_path / "other.qed"
    shutil.copy(built.path, other)
    theirs, ours = qemu.qemu_img("check", "-r", "all", other), qed("check", "-r", "all", built.path)
    assert (ours.rc, ours.out) == (theirs.rc, theirs.out)
    assert built.path.read_bytes() == other.read_bytes()


def test_leaks_are_given_back(image: Image, qed: Qed) -> None:
    """QEMU leaves them, whatever it is told."""
    built = image(layout="DDDD", leaks=2, entries={1: 0})
    assert qemu.qemu_img("check", "-r", "leaks", built.path).rc == 3
    result = qed("check", "-r", "leaks", built.path)
    assert result.rc == 0
    assert result.out.startswith(
        "The following inconsistencies were found and repaired:\n\n    3 leaked clusters\n    0 corruptions\n\n"
        "Double checking the fixed image now...\nNo errors were found on the image.\n"
    )
    assert built.path.stat().st_size == built.end - 3 * CS
    assert qemu.qemu_img("check", built.path).rc == 0
    with QedFile(built.path) as file:
        assert file.read(2 * CS, 2 * CS) == built.read(2 * CS, 2 * CS)


def test_duplicates_are_copied(image: Image, qed: Qed) -> None:
    built = image(
        size=4 * GiB, layout="DD", entries={5: lambda b: b.offsets[0]}, l1_entries={1: lambda b: b.l2_offsets[0]}
    )
    assert qemu.qemu_img("check", "-r", "all", built.path).rc == 2
    result = qed("check", "-r", "all", "--output=json", built.path)
    facts = json.loads(result.out)
    assert (result.rc, facts["corruptions-fixed"]) == (0, 5)
    assert "corruptions" not in facts and "leaks-fixed" not in facts
    assert qemu.qemu_img("check", built.path).rc == 0
    qemu.qemu_io_ok(built.path, "read 5*64k 64k".replace("5*64k", str(5 * CS)))
    with QedFile(built.path) as file:
        for pos in (5 * CS, 2 * GiB, 2 * GiB + 5 * CS):
            assert file.read(pos, CS) == built.read(0, CS)


def test_leaks_option_drops_no_entries(image: Image, qed: Qed) -> None:
    """B11."""
    built = image(layout="D", leaks=1, entries={1: lambda b: b.end})
    before = built.path.read_bytes()
    result = qed("check", "-r", "leaks", built.path)
    assert result.rc == 2
    assert "1 errors were found" in result.out and "repaired" not in result.out
    assert "left alone" in result.err
    assert built.path.read_bytes() == before


def test_need_check_survives_what_is_not_repaired(image: Image, qed: Qed) -> None:
    """B5: and a plain check never touches it."""
    built = image(layout="D", features=F_NEED_CHECK, entries={1: lambda b: b.end})
    for args, rc, flag in ((["-r", "leaks"], 2, 2), ([], 2, 2), (["-r", "all"], 0, 0)):
        assert qed("check", *args, built.path).rc == rc
        assert read_header(built.path)["features"] == flag
    assert_sound(built.path)


def test_no_leaks_are_invented(tmp_path: Path, qed: Qed) -> None:
    """B4d: QEMU reports one for each cluster_size - 1 clusters."""
    entries = 2048
    tables, clusters, first = 4, 4 * 2048, 4 * KiB * (1 + 4 + 4 * 4)
    built = build(tmp_path / "a.qed", ImageSpec(cluster_size=4 * KiB, table_size=4, size=32 * MiB))
    with built.path.open("r+b") as f:
        f.truncate(first + clusters * 4 * KiB)
        f.seek(built.l1_offset)
        f.write(struct.pack(f"<{tables}Q", *(4 * KiB * (5 + 4 * n) for n in range(tables))))
        f.seek(built.l1_offset + 4 * 4 * KiB)
        f.write(struct.pack(f"<{clusters}Q", *(first + n * 4 * KiB for n in range(clusters))))
    assert tables * entries == clusters
    assert qemu.qemu_img("check", built.path).rc == 3
    result = qed("check", built.path)
    assert (result.rc, result.err) == (0, "")
    assert result.out == (
        "No errors were found on the image.\n"
        "8192/8192 = 100.00% allocated, 0.00% fragmented, 0.00% compressed clusters\n"
    )


def test_no_duplicate_is_missed(image: Image, qed: Qed) -> None:
    """B12: QEMU misses one where a table straddles a multiple of cluster_size - 1."""
    built = image(
        cluster_size=4 * KiB,
        table_size=4,
        size=64 * MiB,
        layout="D",
        leaks=4100,
        l1_entries={1: 4093 * 4 * KiB},
        entries={1: 4096 * 4 * KiB},
    )
    assert "errors" not in qemu.qemu_img("check", built.path).out
    assert "1 errors were found" in qed("check", built.path).out


OPTIONS: dict[str, tuple[list[str], int]] = {
    "-r foo": (["-r", "foo", "a.qed"], 1),
    "--output=xml": (["--output=xml", "a.qed"], 1),
    "no file": ([], 1),
    "two files": (["a.qed", "a.qed"], 1),
    "missing": (["missing.qed"], 1),
    "missing, with its format": (["-f", "qed", "missing.qed"], 1),
    "raw": (["-f", "raw", "a.raw"], 63),
    "raw, probed": (["a.raw"], 63),
    "not QED": (["-f", "qed", "a.raw"], 1),
    "cache": (["-T", "bogus", "a.qed"], 1),
    "repair of a shared image": (["-U", "-r", "all", "a.qed"], 1),
    "quiet": (["-q", "a.qed"], 0),
    "quiet json": (["-q", "--output=json", "a.qed"], 0),
    "damaged header": (["-f", "qed", "broken.qed"], 1),
    "unsupported": (["-f", "qed", "future.qed"], 1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_options(image: Image, qed: Qed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    image("a.qed", layout="D")
    image("broken.qed", header={"cluster_size": 77})
    image("future.qed", features=8)
    (tmp_path / "a.raw").write_bytes(bytes(MiB))
    monkeypatch.chdir(tmp_path)
    args, rc = OPTIONS[name]
    theirs, ours = qemu.qemu_img("check", *args, cwd=tmp_path), qed("check", *args)
    assert (theirs.rc, ours.rc) == (rc, rc), (theirs, ours)
    want = theirs.err.replace("qemu-img: ", "qed: ").replace("\nTry 'qemu-img --help' for more information", "")
    assert ours.err == want
    assert ours.out == theirs.out


def test_dry_run(image: Image, qed: Qed) -> None:
    built = image(layout="DD", entries={2: 5, 3: lambda b: b.offsets[0]}, leaks=2)
    before = built.path.read_bytes()
    result = qed("check", "-r", "all", "--dry-run", built.path)
    assert result.rc == 2
    assert "points to 0x5: not a valid offset: cleared" in result.out
    assert "copied" in result.out and "leaked clusters" in result.out
    facts = json.loads(qed("check", "-r", "all", "--dry-run", "--output=json", built.path).out)
    assert len(facts["repairs"]) == 3 and facts["corruptions"] == 2
    assert built.path.read_bytes() == before
    assert qed("check", "--dry-run", built.path).rc == 1


def test_dry_run_with_tables_behind_leaks(image: Image, qed: Qed) -> None:
    """The file that it imagines is too short for them, because it moves nothing."""
    built = image(layout="DD", l1_last=True, litter=lambda behind: [b"", b"", b"", b"", b""])
    before = built.path.read_bytes()
    result = qed("check", "-r", "leaks", "--dry-run", built.path)
    assert (result.rc, result.err) == (3, "")
    assert built.path.read_bytes() == before


def test_verbose(image: Image, qed: Qed) -> None:
    built = image(layout="DD", entries={2: 5})
    result = qed("check", "-v", built.path)
    at = built.l2_offsets[0] + 16
    assert result.err == f"qed: L2 entry 2 at {at:#x} (guest position 0x20000) points to 0x5: not a valid offset\n"


def test_progress(image: Image, qed: Qed) -> None:
    result = qed("check", "-p", image(layout="DD").path)
    assert "(100.00/100%)" in result.out


def test_no_space_for_copies(image: Image) -> None:
    """A repair that cannot be completed fails, says why, and has changed nothing."""
    built = image(layout="DD", entries={2: lambda b: b.offsets[0]}, features=F_NEED_CHECK)
    before = built.path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({built.end}, {built.end}))\n"
        "from qedcore.cli.main import main\n"
        f"sys.exit(main(['check', '-r', 'all', {str(built.path)!r}]))\n"
    )
    result = run([PYTHON, "-c", script], cwd=REPO)
    assert result.rc == 1
    assert "Check failed: File too large" in result.err and "Traceback" not in result.err
    assert built.path.read_bytes() == before
