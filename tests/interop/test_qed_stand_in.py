"""qed in the place of qemu-img: what QEMU's own tests of images ask for, and what scripts rely on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB, stamp
from support.qed_image import ImageSpec, QedFile, assert_sound, build
from support.tools import PYTHON, REPO, Result, run


def qed(*args: str, cwd: Path) -> Result:
    return run([PYTHON, "-m", "qedcore", *args], cwd=cwd, env={"PYTHONPATH": str(REPO)})


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal directories: qemu-img works in one, qed in the other."""
    paths = tmp_path / "qemu", tmp_path / "qed"
    for path in paths:
        path.mkdir()
        (path / "base.raw").write_bytes(stamp(1, 0, MiB))
        build(path / "disk.qed", ImageSpec(size=MiB, layout="D-ZDD", cluster_size=64 * KiB))
        build(path / "a:b.qed", ImageSpec(size=MiB, layout="D", backing="base.raw", no_probe=True))
    return paths


def same(both: tuple[Path, Path], *args: str) -> Result:
    """Both say the same and end with the same code; qed's result."""
    theirs, ours = qemu.qemu_img(*args, cwd=both[0]), qed(*args, cwd=both[1])
    assert (ours.rc, ours.out, ours.err) == (theirs.rc, theirs.out, theirs.err.replace("qemu-img: ", "qed: "))
    return ours


def test_called_qemu_img_it_is_qemu_img(tmp_path: Path) -> None:
    """Also the default format of create, which is qed otherwise."""
    program = tmp_path / "qemu-img"
    program.write_text(
        f"#!{PYTHON}\nimport sys\nsys.path.insert(0, {str(REPO)!r})\n"
        "from qedcore.cli.main import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    made = run([program, "create", "disk", "1M"], cwd=tmp_path)
    assert (made.rc, made.out) == (0, "Formatting 'disk', fmt=raw size=1048576\n")
    assert run([program, "check", "missing"], cwd=tmp_path).err == qemu.qemu_img("check", "missing", cwd=tmp_path).err
    assert qed("create", "disk", "1M", cwd=tmp_path).out.startswith("Formatting 'disk', fmt=qed size=1048576")


@pytest.mark.parametrize("options", [[], ["--backing-chain"], ["--output=json", "--backing-chain"]])
def test_a_file_with_a_colon_in_its_name(both: tuple[Path, Path], options: list[str]) -> None:
    for name in ("file:a:b.qed", "./a:b.qed"):
        assert same(both, "info", *options, name).rc == 0


def test_commit_into_what_only_qemu_reaches(both: tuple[Path, Path]) -> None:
    base = (
        "json:{'driver': 'qed', 'file': {'driver': 'blkdebug', "
        "'inject-error': [{'event': 'write_aio', 'errno': 28, 'once': true}], "
        "'image': {'driver': 'file', 'filename': 'disk.qed'}}}"
    )
    assert same(both, "create", "-f", "qed", "-b", base, "-F", "qed", "top.qed").rc == 0
    for path in both:
        assert run(["qemu-io", "-c", "write -q 0 64k", "top.qed"], cwd=path).rc == 0
    assert same(both, "commit", "top.qed").err == "qed: Block job failed: No space left on device\n"


# -- dd --------------------------------------------------------------------------------------------------------------

DD = """
if=disk.qed of=x
-O qed if=disk.qed of=x
-f qed -O qed bs=4999 if=disk.qed of=x
-f raw -O qed bs=64k count=3 if=base.raw of=x
bs=64k skip=3 if=disk.qed of=x
bs=64k skip=1 count=4 if=disk.qed of=x
bs=1000 count=7 if=disk.qed of=x
bs=1M count=100 if=disk.qed of=x
-O qed bs=1M skip=100 if=disk.qed of=x
-U skip=0x10 if=base.raw of=x
-O qed bs=64k count=0 if=disk.qed of=x
--image-opts if=driver=qed,file.filename=disk.qed of=x
bs=0 if=disk.qed of=x
bs=3G if=disk.qed of=x
bs=1x if=disk.qed of=x
count=1x if=disk.qed of=x
skip=-1 if=disk.qed of=x
foo if=disk.qed of=x
foo=1 if=disk.qed of=x
if=disk.qed
if=missing of=x
-f qed if=base.raw of=x
if=disk.qed of=missing/x
-O qed if=disk.qed of=missing/x
-O qcow2 -f raw if=base.raw of=x
"""


@pytest.mark.parametrize("line", DD.strip().splitlines())
def test_dd(line: str, both: tuple[Path, Path]) -> None:
    words = line.split()
    if same(both, "dd", *words).rc:
        assert not (both[1] / "x").exists() and len(os.listdir(both[1])) == 3
        return
    one, two = both[0] / "x", both[1] / "x"
    if "-O qed" in line:
        assert qemu.qemu_img_ok("compare", "-f", "qed", "-F", "qed", one, two) == "Images are identical.\n"
        assert assert_sound(two).allocated <= assert_sound(one).allocated
        with QedFile(one) as theirs, QedFile(two) as ours:
            assert ours.header["image_size"] == theirs.header["image_size"]
    else:
        assert two.read_bytes() == one.read_bytes()


def test_dd_keeps_what_is_there_until_it_is_done(both: tuple[Path, Path]) -> None:
    path = both[1]
    before = (path / "disk.qed").read_bytes()
    for line in ("if=disk.qed of=./disk.qed", "-f qed if=base.raw of=disk.qed", "-O qcow2 if=disk.qed of=base.raw"):
        result = qed("dd", *line.split(), cwd=path)
        assert result.rc == 1 and result.err.count("\n") == 1
    assert (path / "disk.qed").read_bytes() == before and (path / "base.raw").read_bytes() == stamp(1, 0, MiB)


# -- bench -----------------------------------------------------------------------------------------------------------

BENCH = """
-c 10 disk.qed
-c 10 -d 2 -s 64k -S 128k -o 64k disk.qed
-q -c 100 -f raw base.raw
-w -c 20 -d 2 --pattern=17 disk.qed
-w -c 20 -d 2 --flush-interval=5 -t none disk.qed
-w -c 20 -d 4 --flush-interval=5 --no-drain disk.qed
-c 3 -f raw null-co://
-c x disk.qed
-d x disk.qed
-s 1x disk.qed
-S 3G disk.qed
--pattern 300 disk.qed
--flush-interval 3 disk.qed
-w --flush-interval 3 disk.qed
-t foo disk.qed
-i foo disk.qed
-c 1 missing
"""


@pytest.mark.parametrize("line", BENCH.strip().splitlines())
def test_bench(line: str, both: tuple[Path, Path]) -> None:
    results = qemu.qemu_img("bench", *line.split(), cwd=both[0]), qed("bench", *line.split(), cwd=both[1])
    for which in ("out", "err"):
        theirs, ours = (re.sub(r"in [0-9.]+ s", "in X s", getattr(result, which)) for result in results)
        assert ours == theirs.replace("qemu-img: ", "qed: ")
    assert results[1].rc == results[0].rc
    for name in ("disk.qed", "base.raw"):
        out = qemu.qemu_img_ok("compare", both[0] / name, both[1] / name)
        assert out == "Images are identical.\n"
    qemu.assert_check_clean(both[1] / "disk.qed")


def test_bench_of_nothing(both: tuple[Path, Path]) -> None:
    """QEMU 10 refuses it."""
    result = qed("bench", "-c", "0", "disk.qed", cwd=both[1])
    start = "Sending 0 read requests, 4096 bytes each, 64 in parallel (starting at offset 0, step size 4096)\n"
    assert (result.rc, result.err) == (0, "")
    assert re.fullmatch(re.escape(start) + r"Run completed in 0\.[0-9]+ seconds\.\n", result.out)


def test_bench_past_the_end(both: tuple[Path, Path]) -> None:
    result = qed("bench", "-w", "-c", "3", "-o", "5M", "-f", "raw", "base.raw", cwd=both[1])
    assert result.rc == 1 and result.err.startswith("qed: Failed request: Input/output error")
    assert (both[1] / "base.raw").stat().st_size == MiB
