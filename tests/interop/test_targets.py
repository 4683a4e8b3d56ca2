"""Targets of every kind, beside qemu-img: devices, files with space, exports, other formats, recorded names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB, stamp
from support.qed_image import Built, assert_sound
from support.server import Nbdkit
from support.tools import PYTHON, REPO, Result, require, run, run_ok, unavailable

SIZE = 256 * MiB
DATA = {10 * MiB // (64 * KiB): "data", 200 * MiB // (64 * KiB): "data"}
Image = Callable[..., Built]


def qed(*args: str | os.PathLike[str], cwd: Path) -> Result:
    return run([PYTHON, "-m", "qedcore", *args], cwd=cwd, env={"PYTHONPATH": str(REPO)})


def qed_ok(*args: str | os.PathLike[str], cwd: Path) -> None:
    result = qed(*args, cwd=cwd)
    assert (result.rc, result.err) == (0, ""), result.text


def allocated(path: Path) -> int:
    """Bytes that a file takes on its file system."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # what is written late counts, too
    finally:
        os.close(fd)
    return path.stat().st_blocks * 512


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(a block device, the sparse file that it is)"""
    losetup = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.geteuid() or losetup is None:
        unavailable("a loop device needs root and losetup")
    path = tmp_path / "backing-of-device"
    path.touch()
    os.truncate(path, SIZE)
    made = run([losetup, "--show", "-f", path])
    if made.rc:
        unavailable(f"no loop device: {made.err.strip()}")
    name = Path(made.out.strip())
    try:
        yield name, path
    finally:
        run_ok([losetup, "-d", name])


@pytest.fixture
def source(image: Image) -> Path:
    return image("source.qed", size=SIZE, layout=DATA).path


COMMANDS = {
    "convert": "convert -O raw source.qed {}",
    "convert -n": "convert -n -O raw source.qed {}",
    "convert -m 1": "convert -m 1 -O raw source.qed {}",
    "convert -W": "convert -W -n -O raw source.qed {}",
    "convert -t none": "convert -n -t none -O raw source.qed {}",
    "dd": "dd if=source.qed of={}",
    "salvage": "salvage -q source.qed {}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_thin_device_stays_thin(source: Path, device: tuple[Path, Path], command: str, tmp_path: Path) -> None:
    name, below = device
    with open(name, "r+b") as file:
        for pos in (0, 10 * MiB, 100 * MiB + 512, SIZE - MiB):
            os.pwrite(file.fileno(), stamp(9, pos, MiB), pos)
        os.fsync(file.fileno())
    qed_ok(*COMMANDS[command].format(name).split(), cwd=tmp_path)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", source, name)
    assert allocated(below) <= MiB


@pytest.mark.parametrize("command", ["convert -n", "convert -W"])
def test_a_file_with_space_gives_it_back(source: Path, command: str, tmp_path: Path) -> None:
    path = tmp_path / "target.raw"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    qed_ok(*COMMANDS[command].format(path).split(), cwd=tmp_path)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", source, path)
    assert allocated(path) <= MiB
    qed_ok("convert", "-n", "-S", "0", "-O", "raw", source, path, cwd=tmp_path)
    assert allocated(path) >= SIZE


def test_an_image_with_data_gives_its_space_back(image: Image, source: Path, tmp_path: Path) -> None:
    """Its clusters keep their places: that is no leak."""
    path = image("target.qed", size=SIZE, layout=dict.fromkeys(range(1000), "data")).path
    qed_ok("convert", "-n", "-O", "qed", source, path, cwd=tmp_path)
    qemu.qemu_img_ok("compare", source, path)
    assert_sound(path)
    assert allocated(path) <= 2 * MiB


@pytest.mark.parametrize("kind", ["raw", "qed"])
def test_a_commit_of_zeros_takes_no_space(image: Image, kind: str, tmp_path: Path) -> None:
    n = 32 * MiB // (64 * KiB)
    if kind == "raw":
        base = tmp_path / "base"
        base.write_bytes(stamp(1, 0, 32 * MiB))
    else:
        base = image("base", size=32 * MiB, layout=dict.fromkeys(range(n), "data")).path
    top = image("top.qed", size=32 * MiB, layout=dict.fromkeys(range(1, n), "zero"), backing="base").path
    qed_ok("commit", "-q", "-d", top, cwd=tmp_path)
    qemu.qemu_img_ok("compare", top, base)
    assert allocated(base) <= MiB


def test_an_export(source: Path, tmp_path: Path, serve: Callable[..., Nbdkit]) -> None:
    """Zeros are a command, whatever the server had there."""
    target = tmp_path / "target.raw"
    with open(target, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        file.write(stamp(9, 0, 4 * MiB))
    require("nbdkit")
    for options in ("-O raw", "-n -O raw"):
        script = f'exec {PYTHON} -m qedcore convert {options} source.qed "$uri"'
        env = {"PYTHONPATH": str(REPO)}
        done = run(["nbdkit", "-U", "-", "file", f"file={target}", "--run", script], cwd=tmp_path, env=env)
        assert done.rc == 0, done.text
        qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", source, target)
        assert allocated(target) <= MiB


# -- devices, and what else is in the way ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["raw", "qed", "qcow2", "vdi", "vpc", "parallels"])
def test_devices_as_with_qemu_img(image: Image, device: tuple[Path, Path], format: str, tmp_path: Path) -> None:
    name = device[0]
    small = image("small.qed", size=16 * MiB, layout="D-D").path
    line = ["convert", "-O", format, "small.qed", str(name)]
    expected = qemu.qemu_img(*line, cwd=tmp_path)
    found = qed(*line, cwd=tmp_path)
    assert found.rc == expected.rc, found.text
    if expected.rc:
        assert found.err == expected.err.replace("qemu-img: ", "qed: ")
    else:
        there = tmp_path / "there.raw"
        qemu.to_raw(name, there, fmt=format)
        os.truncate(there, 16 * MiB)
        qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", small, there)


def test_devices_that_are_too_small(image: Image, device: tuple[Path, Path], tmp_path: Path) -> None:
    image("large.qed", size=SIZE + MiB, layout="D")
    line = ["convert", "-O", "raw", "large.qed", str(device[0])]
    assert qed(*line, cwd=tmp_path).err == qemu.qemu_img(*line, cwd=tmp_path).err.replace("qemu-img: ", "qed: ")
    assert allocated(device[1]) == 0


@pytest.mark.parametrize(
    "command", ["convert -O {0} small.qed {1}", "create -f {0} {1} 1M", "dd -O {0} if=small.qed of={1}"]
)
@pytest.mark.parametrize("format", ["raw", "qed"])
@pytest.mark.parametrize("target", ["loop", "missing/x", "directory"])
def test_names_that_cannot_be_made(image: Image, tmp_path: Path, command: str, format: str, target: str) -> None:
    image("small.qed", size=MiB, layout="D")
    (tmp_path / "loop").symlink_to("loop2")
    (tmp_path / "loop2").symlink_to("loop")
    (tmp_path / "directory").mkdir()
    line = command.format(format, target).split()
    before = sorted(os.listdir(tmp_path))
    expected, found = qemu.qemu_img(*line, cwd=tmp_path), qed(*line, cwd=tmp_path)
    assert (found.rc, found.err) == (expected.rc, expected.err.replace("qemu-img: ", "qed: "))
    assert sorted(os.listdir(tmp_path)) == before


# -- other formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocation", ["off", "full"])
@pytest.mark.parametrize(
    "target",
    [
        "--target-image-opts {} driver=qcow2,file.filename=e.qcow2",
        "--target-image-opts {} file.filename=e.qcow2",
        '{} json:{{"driver":"qcow2","file":{{"driver":"file","filename":"e.qcow2"}}}}',
        "-O qcow2 {} e.qcow2",
    ],
)
def test_the_format_of_an_existing_target(image: Image, tmp_path: Path, target: str, preallocation: str) -> None:
    image("small.qed", size=16 * MiB, layout="D-D")
    qemu.qemu_img_ok(
        "create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", "e.qcow2", "16M", cwd=tmp_path
    )
    qed_ok("convert", "-n", *target.format("small.qed").split(), cwd=tmp_path)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "qcow2", "small.qed", "e.qcow2", cwd=tmp_path)


def test_a_format_that_nothing_tells(image: Image, tmp_path: Path) -> None:
    image("small.qed", size=MiB, layout="D")
    (tmp_path / "t").write_bytes(stamp(1, 0, MiB))
    line = ["convert", "-n", "--target-image-opts", "small.qed"]
    found = qed(*line, "file.filename=t", cwd=tmp_path)
    assert found.rc == 1 and "driver=raw" in found.err and (tmp_path / "t").read_bytes() == stamp(1, 0, MiB)
    qed_ok(*line, "driver=raw,file.filename=t", cwd=tmp_path)
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "raw", "small.qed", "t", cwd=tmp_path)


@pytest.mark.parametrize(
    "subformat",
    ["monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"],
)
@pytest.mark.parametrize("exists", [False, True])
def test_names_in_a_vmdk(image: Image, tmp_path: Path, subformat: str, exists: bool) -> None:
    """The descriptor, and the files, are what qemu-img makes under that name."""
    image("small.qed", size=4 * MiB, layout="D-D")
    names = []
    for where, program in (("one", qemu.qemu_img), ("two", qed)):
        (tmp_path / where).mkdir()
        if exists:
            (tmp_path / where / "out.vmdk").write_bytes(b"old")
        line = ["convert", "-O", "vmdk", "-o", f"subformat={subformat}", "../small.qed", "out.vmdk"]
        assert program(*line, cwd=tmp_path / where).rc == 0
        content = (tmp_path / where / "out.vmdk").read_bytes()
        extents = [line for line in content.split(b"\n") if line.startswith(b"RW ")]
        names.append((sorted(os.listdir(tmp_path / where)), extents))
    assert names[0] == names[1]
    qemu.qemu_img_ok("compare", "-f", "qed", "-F", "vmdk", "small.qed", "two/out.vmdk", cwd=tmp_path)


@pytest.mark.parametrize("given", ["-B {} -F {}", "-o backing_file={},backing_fmt={}"])
@pytest.mark.parametrize("target", ["qcow2", "qed"])
def test_only_the_top_image_is_copied(image: Image, tmp_path: Path, target: str, given: str) -> None:
    """Out of QED, or into it, image by image: also zeros that hide data, and a shorter backing file."""
    n = 4 * MiB // (64 * KiB)
    image("base.qed", size=4 * MiB, layout=dict.fromkeys(range(n), "data"))
    image("source.qed", size=6 * MiB, layout="-DZ-D", tag=2, backing="base.qed")
    for name, backing in (("base", []), ("source", ["-B", "base.qcow2", "-F", "qcow2"])):
        words = ["convert", "-O", "qcow2", *backing, f"{name}.qed", f"{name}.qcow2"]
        qemu.qemu_img_ok(*words, cwd=tmp_path)
    other = "qed" if target == "qcow2" else "qcow2"
    where = tmp_path / "sub"
    where.mkdir()
    base = f"../base.{target}"
    words = given.format(base, target).split()
    qed_ok("convert", "-O", target, *words, f"source.{other}", "sub/out", cwd=tmp_path)
    qemu.qemu_img_ok("compare", "source.qed", "sub/out", cwd=tmp_path)
    found = qemu.qemu_img_ok("info", "sub/out", cwd=tmp_path)
    assert base in found and (where / "out").stat().st_size <= MiB and os.listdir(where) == ["out"]
    rows = qemu.qemu_img_ok("map", "--output=json", "-f", target, "sub/out", cwd=tmp_path)
    assert '"start": 65536, "length": 65536, "depth": 0' in rows and '"start": 0, "length": 65536, "depth": 1' in rows


@pytest.mark.parametrize("given", ["-B {} -F qcow2", "-o backing_file={},backing_fmt=qcow2"])
def test_names_of_backing_files_count_from_the_target(image: Image, tmp_path: Path, given: str) -> None:
    """Compressed, which qemu-img does."""
    image("source.qed", size=MiB, layout="-D")
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", "base.qcow2", "1M", cwd=tmp_path)
    (tmp_path / "sub").mkdir()
    line = ["convert", "-c", "-O", "qcow2", *given.format("../base.qcow2").split(), "source.qed", "sub/out"]
    qed_ok(*line, cwd=tmp_path)
    qemu.qemu_img_ok("compare", "source.qed", "sub/out", cwd=tmp_path)
    assert os.listdir(tmp_path / "sub") == ["out"]
