"""qed resize, rebase, commit and compact beside qemu-img: messages, exit codes and the images that result."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB, random_ops, stamp
from support.qed_image import Geometry, QedFile, assert_sound, patch_header
from support.tools import PYTHON, REPO, Result, run

ENV = {"PYTHONPATH": str(REPO)}
GEOMETRIES = [Geometry(4 * KiB, 2), Geometry(64 * KiB, 4)]


def qed(*args: str | os.PathLike[str], cwd: Path | None = None) -> Result:
    return run([PYTHON, "-m", "qedcore", *args], cwd=cwd, env=ENV)


def qed_ok(*args: str | os.PathLike[str], cwd: Path | None = None) -> str:
    result = qed(*args, cwd=cwd)
    assert result.rc == 0, result.text
    return result.out


class Pair:
    """The same files in two directories: qemu-img works in one, qed in the other."""

    def __init__(self, tmp_path: Path, source: Path) -> None:
        self.theirs, self.ours = tmp_path / "qemu", tmp_path / "qed"
        shutil.copytree(source, self.theirs)
        shutil.copytree(source, self.ours)

    def run(self, *args: str) -> tuple[Result, Result]:
        return qemu.qemu_img(*args, cwd=self.theirs), qed(*args, cwd=self.ours)

    def same(self, *args: str, first_line: bool = False) -> Result:
        """Both say the same and end with the same code."""
        theirs, ours = self.run(*args)
        want = theirs.err.replace("qemu-img: ", "qed: ")
        got = ours.err
        if first_line:  # qemu-img then says where to find help
            want, got = want.split("\n")[0], got.split("\n")[0]
        assert (ours.rc, ours.out, got) == (theirs.rc, theirs.out, want)
        return ours

    def same_content(self, *names: str) -> None:
        for name in names:
            fmt = "qed" if name.endswith(".qed") else "raw"
            out = qemu.qemu_img_ok("compare", "-f", fmt, "-F", fmt, self.theirs / name, self.ours / name)
            assert out == "Images are identical.\n"  # and no warning about their sizes
            if fmt == "qed":
                qemu.assert_check_clean(self.ours / name)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds, as qemu-img makes them."""
    directory = tmp_path_factory.mktemp("zoo")
    (directory / "base.raw").write_bytes(stamp(9, 0, 8 * MiB))
    (directory / "other.raw").write_bytes(stamp(9, 0, 3 * MiB) + stamp(8, 3 * MiB, MiB))
    (directory / "empty.raw").write_bytes(b"")
    qemu.create(directory / "plain.qed", 3 * MiB)
    qemu.create(directory / "mid.qed", 8 * MiB, backing="base.raw")
    qemu.create(directory / "short.qed", 2 * MiB, backing="base.raw")
    qemu.create(directory / "top.qed", 8 * MiB, backing="mid.qed", backing_fmt="qed")
    qemu.qemu_io_ok(directory / "plain.qed", "write -q -P 5 100k 300k", "write -q -P 6 2M 1M")
    qemu.qemu_io_ok(directory / "mid.qed", "write -q -P 5 100k 300k", "write -q -z 1M 128k")
    qemu.qemu_io_ok(directory / "top.qed", "write -q -P 6 64k 10k", "write -q -z 2M 64k", "write -q -P 7 7M 1M")
    qemu.create(directory / "small.qed", MiB, GEOMETRIES[0])
    shutil.copy(directory / "mid.qed", directory / "compat.qed")
    patch_header(directory / "compat.qed", compat_features=1)
    for kind in ("raw", "qed"):
        qemu.qemu_img_ok("create", "-q", "-f", kind, directory / f"low.{kind}", "1M")
        qemu.create(directory / f"over-{kind}.qed", 3 * MiB, backing=f"low.{kind}", backing_fmt=kind)
        qemu.qemu_io_ok(directory / f"over-{kind}.qed", "write -q -P 3 64k 1M", "write -q -P 4 2M 100k")
    return directory


@pytest.fixture
def pair(tmp_path: Path, zoo: Path) -> Pair:
    return Pair(tmp_path, zoo)


# -- resize --------------------------------------------------------------------------------------------------------

RESIZE_REFUSED = (
    "65T|1000|+100|2M|-1M|2M -q|abc|100%|-5M|0|-3M|16E|--shrink 1000|--shrink -4M|--preallocation=full 3M|"
    "--preallocation=full 6M|--preallocation=falloc 6M|--preallocation=metadata 6M|--preallocation=bogus 6M"
)


@pytest.mark.parametrize("args", RESIZE_REFUSED.split("|"))
def test_resize_refused(pair: Pair, args: str) -> None:
    *options, size = args.split()
    if size == "-q":
        options, size = ["-q"], options[0]
    before = (pair.ours / "plain.qed").read_bytes()
    assert pair.same("resize", *options, "plain.qed", size).rc == 1
    assert (pair.ours / "plain.qed").read_bytes() == before


def test_resize_takes_the_last_word_for_the_size(pair: Pair) -> None:
    """As QEMU 7.2 does; QEMU 10 takes it for an option."""
    theirs, ours = pair.run("resize", "plain.qed", "--foo")
    assert ours.rc == theirs.rc == 1
    assert ours.err.startswith("qed: Parameter 'size' expects a non-negative number below 2^64\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("", "Not enough arguments"),
        ("plain.qed", "Not enough arguments"),
        ("plain.qed 4M 5M", "Expecting image file name and size"),
        ("-f qed +1M", "Expecting image file name and size"),
    ],
)
def test_resize_usage(pair: Pair, args: str, said: str) -> None:
    """As QEMU 7.2 says it; QEMU 10 tells other cases apart."""
    theirs, ours = pair.run("resize", *args.split())
    assert ours.rc == theirs.rc == 1
    assert ours.err.splitlines()[0] == f"qed: {said}"


def test_resize_missing(pair: Pair) -> None:
    assert pair.same("resize", "missing.qed", "4M").rc == 1


@pytest.mark.parametrize("args", ["+1M", "64T", "+0", "3M", "5M -q", "4M --preallocation=off", "3.5M"])
def test_grow(pair: Pair, args: str) -> None:
    size, *options = args.split()
    assert pair.same("resize", *options, "plain.qed", size).rc == 0
    pair.same_content("plain.qed")
    qemu.qemu_io_ok(pair.ours / "plain.qed", "read -q -P 6 2M 1M", "read -q -P 5 100k 300k")


@pytest.mark.parametrize("size", ["2M", "-1M", "512", "1.5M", "200k", "2100k"])
def test_shrink(pair: Pair, size: str) -> None:
    """QEMU cannot; the result is clean for it, and growing again shows zeros."""
    path = pair.ours / "plain.qed"
    raw = path.with_suffix(".raw")
    qemu.to_raw(path, raw)
    assert qed_ok("resize", "--shrink", path, size) == "Image resized.\n"
    qemu.assert_check_clean(path)
    with QedFile(path) as image:
        os.truncate(raw, image.size)
    os.truncate(raw, 6 * MiB)
    qemu.qemu_img_ok("resize", path, "6M")
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", path, raw)
    qed_ok("resize", path, "--", "7M")


def test_grow_over_a_longer_backing_file(pair: Pair) -> None:
    """QEMU: 'Block driver does not support requested flags'."""
    assert qed_ok("resize", pair.ours / "short.qed", "+1M") == "Image resized.\n"
    qemu.assert_check_clean(pair.ours / "short.qed")
    qemu.qemu_io_ok(pair.ours / "short.qed", "read -q -P 0 2M 1M")
    qemu.qemu_img_ok("resize", "--shrink", "-f", "raw", pair.ours / "base.raw", "2M")
    qemu.qemu_img_ok("resize", "-f", "raw", pair.ours / "base.raw", "3M")
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", pair.ours / "short.qed", pair.ours / "base.raw")


def test_resize_raw_is_left_to_qemu_img(pair: Pair) -> None:
    assert pair.same("resize", "-f", "raw", "base.raw", "9M").rc == 0
    assert (pair.ours / "base.raw").stat().st_size == 9 * MiB


# -- rebase --------------------------------------------------------------------------------------------------------

REBASE_REFUSED = (
    "mid.qed|-b other.raw mid.qed|-u -b other.raw mid.qed|-b missing -F raw mid.qed|-b other.raw -F qed mid.qed|"
    "-b other.raw -F bogus mid.qed|-u -b other.raw -F bogus mid.qed|-t foo -b other.raw -F raw mid.qed|"
    "-T foo -b other.raw -F raw mid.qed|-b x -F raw missing.qed|-b x -F raw|-b x -F raw mid.qed top.qed|"
    "-u -b LONG -F raw small.qed"
)


@pytest.mark.parametrize("args", REBASE_REFUSED.split("|"))
def test_rebase_refused(pair: Pair, args: str) -> None:
    before = (pair.ours / "mid.qed").read_bytes()
    words = [word.replace("LONG", "n" * 4033) for word in args.split()]
    assert pair.same("rebase", *words, first_line=True).rc == 1
    assert (pair.ours / "mid.qed").read_bytes() == before


def test_rebase_unknown_compat_features(pair: Pair) -> None:
    assert pair.same("rebase", "-u", "-b", "other.raw", "-F", "raw", "compat.qed").rc == 1
    assert pair.same("rebase", "-b", "other.raw", "-F", "raw", "compat.qed").rc == 1
    assert pair.same("rebase", "-u", "-b", "", "compat.qed").rc == 0
    with QedFile(pair.ours / "compat.qed") as image:
        assert image.backing_name is None and image.header["compat_features"] == 1


UNSAFE = (
    "-u -b other.raw -F raw",
    "-u -b elsewhere -F raw",
    "-u -b other.raw -F qcow2",
    "-u",
    "-u -b ''",
    "-u -p -q",
)


@pytest.mark.parametrize("args", UNSAFE)
def test_rebase_unsafe(pair: Pair, args: str) -> None:
    words = [word.replace("''", "") for word in args.split()]
    assert pair.same("rebase", *words, "mid.qed").rc == 0
    with QedFile(pair.theirs / "mid.qed") as theirs, QedFile(pair.ours / "mid.qed") as ours:
        assert ours.backing_name == theirs.backing_name
        assert ours.header["features"] == theirs.header["features"]
    infos = []
    for directory in (pair.theirs, pair.ours):
        found = qemu.info(directory / "mid.qed")
        for key in ("actual-size", "filename", "full-backing-filename"):
            found.pop(key, None)
        infos.append(found)
    assert infos[0] == infos[1]
    content = [(d / "mid.qed").read_bytes()[64 * KiB :] for d in (pair.theirs, pair.ours)]
    assert content[0] == content[1]


SAFE = (
    "-b other.raw -F raw mid.qed",
    "-b empty.raw -F raw mid.qed",
    "-b plain.qed -F qed mid.qed",
    "-b base.raw -F raw top.qed",
    "-b plain.qed -F qed top.qed",
    "-b other.raw -F raw plain.qed",
    "-b other.raw -F raw short.qed",
    "-b '' short.qed",
    "-b '' top.qed",
    "-p -b other.raw -F raw mid.qed",
    "-p -q -b '' mid.qed",
    "-t none -T writeback -b other.raw -F raw mid.qed",
)


@pytest.mark.parametrize("args", SAFE)
def test_rebase_safe(pair: Pair, args: str) -> None:
    """The guest's content stays, as with QEMU; QEMU reads it."""
    words = [word.replace("''", "") for word in args.split()]
    path = pair.ours / words[-1]
    raw = pair.ours / "before.raw"
    qemu.to_raw(path, raw)
    theirs, ours = pair.run("rebase", *words)
    assert (ours.rc, ours.err) == (theirs.rc, theirs.err) == (0, "")
    # Both end at 100 percent; in between, qemu-img counts in its own steps.
    assert ours.out.strip().endswith("(100.00/100%)") is theirs.out.strip().endswith("(100.00/100%)")
    pair.same_content(words[-1])
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", path, raw)
    with QedFile(pair.theirs / words[-1]) as one, QedFile(path) as other:
        assert other.backing_name == one.backing_name
        assert other.header["features"] == one.header["features"]


def test_rebase_keeps_zero_clusters(pair: Pair) -> None:
    qed_ok("rebase", "-b", "other.raw", "-F", "raw", pair.ours / "mid.qed")
    qemu.qemu_io_ok(pair.ours / "mid.qed", "read -q -P 0 1M 128k")
    with QedFile(pair.ours / "mid.qed") as image:
        assert image.entry(16) == image.entry(17) == 1


def test_rebase_refuses_loops(pair: Pair) -> None:
    result = qed("rebase", "-b", "top.qed", "-F", "qed", "mid.qed", cwd=pair.ours)
    assert (result.rc, result.err) == (1, "qed: Backing file 'top.qed' creates an infinite loop.\n")
    qemu.qemu_img_ok("info", "--backing-chain", pair.ours / "top.qed")


def test_unsafe_rebase_makes_loops_and_undoes_them(pair: Pair) -> None:
    """Files may be about to be renamed; every other command says what is wrong until they are."""
    before = (pair.ours / "mid.qed").read_bytes()
    for name in ("top.qed", "mid.qed"):
        assert pair.same("rebase", "-u", "-b", name, "-F", "qed", "mid.qed").rc == 0
        assert pair.same("info", "--backing-chain", "mid.qed").rc == 1
        assert "loop" in qed("map", "mid.qed", cwd=pair.ours).err
    assert pair.same("rebase", "-u", "-b", "base.raw", "-F", "raw", "mid.qed").rc == 0
    assert (pair.ours / "mid.qed").read_bytes() == before


def test_rebase_writes_a_lone_cluster_of_zeros(tmp_path: Path) -> None:
    """As QEMU does, which writes all zeros; qed makes zero clusters of more than one in a row."""
    for where in ("theirs", "ours"):
        (tmp_path / where).mkdir()
        for name, clusters in (("old.raw", (1, 1, 0, 1)), ("new.raw", (0, 2, 2, 1))):
            (tmp_path / where / name).write_bytes(b"".join(bytes([c]) * 64 * KiB for c in clusters))
        qemu.create(tmp_path / where / "top.qed", 256 * KiB, backing="old.raw")
    line = ["rebase", "-b", "new.raw", "-F", "raw", "top.qed"]
    qemu.qemu_img_ok(*line, cwd=tmp_path / "theirs")
    qed_ok(*line, cwd=tmp_path / "ours")
    show = ["map", "--output=json", "top.qed"]
    assert qemu.qemu_img_ok(*show, cwd=tmp_path / "ours") == qemu.qemu_img_ok(*show, cwd=tmp_path / "theirs")


# -- commit --------------------------------------------------------------------------------------------------------

COMMIT_REFUSED = (
    "plain.qed|-b nope top.qed|-b top.qed top.qed|-b '' top.qed||missing.qed|top.qed mid.qed|-f raw top.qed|"
    "-t foo top.qed"
)


@pytest.mark.parametrize("args", COMMIT_REFUSED.split("|"))
def test_commit_refused(pair: Pair, args: str) -> None:
    words = [word.replace("''", "") for word in args.split()]
    before = [(pair.ours / name).read_bytes() for name in ("base.raw", "mid.qed", "top.qed")]
    assert pair.same("commit", *words, first_line=True).rc == 1
    assert [(pair.ours / name).read_bytes() for name in ("base.raw", "mid.qed", "top.qed")] == before


def test_commit_rate(pair: Pair) -> None:
    assert pair.same("commit", "-r", "1G", "-q", "top.qed").rc == 0
    assert pair.same("commit", "-r", "foo", "top.qed").rc == 1


COMMITS: dict[str, tuple[str, Sequence[str]]] = {
    "into the image below": ("top.qed", ["mid.qed", "base.raw"]),
    "into a raw file": ("mid.qed", ["base.raw"]),
    "kept": ("-d top.qed", ["mid.qed", "base.raw"]),
    "quietly": ("-q top.qed", ["mid.qed"]),
    "into the lowest": ("-b base.raw top.qed", ["base.raw"]),
    "by another name": ("-b ./base.raw top.qed", ["base.raw"]),
    "short": ("short.qed", ["base.raw"]),
    "by name": ("-b mid.qed top.qed", ["mid.qed"]),
    "cache": ("-t none top.qed", ["mid.qed"]),
}


@pytest.mark.parametrize("args, changed", COMMITS.values(), ids=COMMITS)
def test_commit(pair: Pair, args: str, changed: Sequence[str]) -> None:
    """The same words, the same base as with QEMU; the image itself is emptied, as QEMU's manual says (B13)."""
    *options, name = args.split()
    path = pair.ours / name
    raw, content = pair.ours / "before.raw", path.read_bytes()
    qemu.to_raw(path, raw)
    theirs, ours = pair.run("commit", *options, name)
    assert (ours.rc, ours.out, ours.err) == (theirs.rc, theirs.out, theirs.err)
    pair.same_content(*changed)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", path, raw)
    if "-d" in options or "-b" in options:
        assert path.read_bytes() == content
    else:
        assert assert_sound(path).allocated == 0
        assert path.stat().st_size == 5 * 64 * KiB
        qemu.assert_check_clean(path)


@pytest.mark.parametrize("kind", ["raw", "qed"])
def test_commit_grows_the_base(pair: Pair, kind: str) -> None:
    assert pair.same("commit", f"over-{kind}.qed").rc == 0
    pair.same_content(f"low.{kind}", f"over-{kind}.qed")


def test_commit_progress(pair: Pair) -> None:
    out = qed_ok("commit", "-p", pair.ours / "top.qed")
    assert "(0.00/100%)" in out and "(100.00/100%)" in out and out.endswith("Image committed.\n")
    assert qed_ok("commit", "-p", "-q", pair.ours / "top.qed") == ""


def test_commit_says_what_it_repairs(pair: Pair) -> None:
    """QEMU writes into a base that a crash left dirty without looking (B8)."""
    with QedFile(pair.ours / "mid.qed") as image:
        features = image.header["features"]
    patch_header(pair.ours / "mid.qed", features=features | 2)
    result = qed("commit", "top.qed", cwd=pair.ours)
    assert (result.rc, result.out) == (0, "Image committed.\n")
    assert "mid.qed: was not closed cleanly" in result.err
    qemu.assert_check_clean(pair.ours / "mid.qed")


def test_commit_into_another_format(tmp_path: Path) -> None:
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", tmp_path / "b.qcow2", "1M")
    qemu.create(tmp_path / "top.qed", MiB, backing="b.qcow2", backing_fmt="qcow2")
    result = qed("commit", "top.qed", cwd=tmp_path)
    assert result.rc == 1 and result.err.count("\n") == 1 and "qcow2" in result.err


# -- compact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
@pytest.mark.parametrize("geometry", [*GEOMETRIES, Geometry(MiB, 2)], ids=str)
def test_compact(tmp_path: Path, rng: random.Random, geometry: Geometry, backing: bool) -> None:
    """QEMU's leaks and disorder are gone, its reading is the same."""
    path, size = tmp_path / "image.qed", 24 * MiB
    if backing:
        (tmp_path / "base.raw").write_bytes(stamp(9, 0, 20 * MiB))
    qemu.create(path, size, geometry, backing="base.raw" if backing else None)
    qemu.apply(path, random_ops(rng, size, geometry.cluster_size, 30), tmp_path)
    with path.open("ab") as file:
        file.write(b"leak" * geometry.cluster_size)
    qemu.to_raw(path, tmp_path / "before.raw")
    length = path.stat().st_size
    out = qed_ok("compact", path)
    assert out == f"Image compacted: {length} bytes before, {path.stat().st_size} now.\n"
    qemu.assert_check_clean(path)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", path, tmp_path / "before.raw")
    with QedFile(path) as image:
        data = [entry for _, entry in sorted(image.entries().items()) if entry > 1]
    assert data == sorted(data)
    assert qed_ok("compact", "-q", "--zeros", path) == ""
    qemu.assert_check_clean(path)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", path, tmp_path / "before.raw")


def test_compact_damaged(pair: Pair) -> None:
    path = pair.ours / "plain.qed"
    with QedFile(path) as image:
        table, entry = image.l1[0], image.entry(2)
    with path.open("r+b") as file:
        file.seek(table + 8 * 40)
        file.write(entry.to_bytes(8, "little"))
    result = qed("compact", path)
    assert result.rc == 1 and result.err.count("\n") == 1 and "repair it first" in result.err
