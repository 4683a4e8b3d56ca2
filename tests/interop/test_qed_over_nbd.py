"""`qed` on an image in an export of nbdkit: the same as on the file, but for what a file alone can have."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.patterns import KiB, MiB
from support.qed_image import F_NEED_CHECK, Built, QedFile, assert_sound
from support.server import import_nbd
from support.tools import PYTHON, REPO, Result, require, run

Image = Callable[..., Built]
SPEC = {"cluster_size": 4 * KiB, "table_size": 2, "size": 8 * MiB, "layout": "DD-Z" * 100}
ENV = {"PYTHONPATH": str(REPO)}


@pytest.fixture(autouse=True)
def programs() -> None:
    require("nbdkit")
    import_nbd()


def local(line: str, path: Path) -> Result:
    words = [word.replace("IMAGE", str(path)) for word in line.split()]
    return run([PYTHON, "-m", "qedcore", *words], cwd=path.parent, env=ENV)


def remote(line: str, path: Path, name: str = "$uri") -> Result:
    command = shlex.join([PYTHON, "-m", "qedcore", *line.split()]).replace("IMAGE", f'"{name}"')
    return run(["nbdkit", "-U", "-", "file", path, "--run", command], cwd=path.parent, env=ENV)


def plain(result: Result, path: Path) -> tuple[int, str, str]:
    """Without what must be different."""
    text = re.sub(r'nbd\+unix:[^\s"\']*|' + re.escape(str(path)), "IMAGE", result.out)
    text = re.sub(r'disk size: .*\n|,\n *"actual-size": \d+|"actual-size": \d+,\n *', "", text)
    return result.rc, text, result.err


@pytest.mark.parametrize(
    "line",
    [
        "info IMAGE",
        "info --backing-chain --output=json -v IMAGE",
        "check IMAGE",
        "check --output=json -f qed IMAGE",
        "check -r all IMAGE",
        "map IMAGE",
        "map --output=json IMAGE",
        "dump --header --l1 --l2 0 IMAGE",
        "compare -s IMAGE same.qed",
        "measure -O qed IMAGE",
        "measure -O qcow2 IMAGE",
        "snapshot -l IMAGE",
        "convert -O raw IMAGE out",
        "convert -O qed IMAGE out",
        "convert -O qcow2 IMAGE out",
        "salvage IMAGE out",
    ],
)
def test_as_a_file(line: str, image: Image, tmp_path: Path) -> None:
    built = image(**SPEC)
    (tmp_path / "same.qed").write_bytes(built.path.read_bytes())
    expected, content = plain(local(line, built.path), built.path), b""
    if line.endswith("out"):
        content = (tmp_path / "out").read_bytes()
        (tmp_path / "out").unlink()
    assert expected[0] == 0
    assert plain(remote(line, built.path), built.path) == expected
    if line.endswith("out"):
        assert (tmp_path / "out").read_bytes() == content


def test_names(image: Image) -> None:
    """All that QEMU has for it."""
    built = image(**SPEC)
    assert remote("check IMAGE", built.path, "nbd:unix:$unixsocket").rc == 0
    options = "driver=qed,file.driver=nbd,file.path=$unixsocket"
    assert remote("check --image-opts IMAGE", built.path, options).rc == 0


def test_changes(image: Image, tmp_path: Path) -> None:
    """The image stays in its export, whose size is fixed."""
    built = image(**SPEC, entries={501: 0x123}, features=F_NEED_CHECK, trailing=bytes(4 * MiB))
    assert remote("check IMAGE", built.path).rc == 2
    assert remote("check -q -r all IMAGE", built.path).rc == 0
    for line in ("resize -q IMAGE 9M", "resize -q --shrink IMAGE 1M", "check -q -r leaks IMAGE"):
        assert remote(line, built.path).rc == 0, line
    assert_sound(built.path, leaks=None)
    with QedFile(built.path) as file:
        assert file.size == MiB and file.length == built.end + 4 * MiB
        assert file.read(0, MiB) == built.read(0, MiB)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rebase -u -b x -F raw IMAGE", "not a local file"),
        ("convert -O qed same.qed IMAGE", "Cannot resize NBD nodes"),
        ("check nbd+unix:///?socket=missing", "No such file or directory"),
        ("create IMAGE 1M", "an image is made in a file"),
        ("create -f qed IMAGE 1M", "an image is made in a file"),
    ],
)
def test_refusals_are_one_line(line: str, said: str, image: Image, tmp_path: Path) -> None:
    built = image(**SPEC)
    before = built.path.read_bytes()
    (tmp_path / "same.qed").write_bytes(before)
    found = remote(line, built.path)
    assert found.rc == 1 and found.out == ""
    assert found.err.count("\n") == 1 and found.err.startswith("qed: ") and said in found.err
    assert built.path.read_bytes() == before


def test_bench_of_a_raw_export_is_left_to_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is one: asked by this program, a fast server looked four times slower than it is."""
    stub = tmp_path / "qemu-img"
    stub.write_text('#!/bin/sh\necho "stub $*"\n')
    stub.chmod(0o755)
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    monkeypatch.setitem(ENV, "QED_QEMU_IMG", str(stub))
    found = remote("bench -f raw -c 10 IMAGE", disk)
    assert (found.rc, found.err) == (0, "") and found.out.startswith("stub bench -f raw -c 10 nbd+unix:")
    assert local("create -q -f qed new.qed 1M", disk).rc == 0
    ours = remote("bench -f qed -c 10 IMAGE", tmp_path / "new.qed")
    assert ours.rc == 0 and ours.out.startswith("Sending 10 read requests")
    stub.unlink()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nbdkit").symlink_to(str(shutil.which("nbdkit")))
    monkeypatch.setitem(ENV, "PATH", str(tmp_path / "bin"))
    alone = remote("bench -f raw -c 10 IMAGE", disk)
    assert alone.rc == 0 and alone.out.startswith("Sending 10 read requests")
