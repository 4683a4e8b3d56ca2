"""The `qed` command, as a program: create and info next to qemu-img's, errors in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.patterns import GiB, KiB, MiB
from support.qed_image import F_NEED_CHECK, Built, assert_sound, read_header
from support.qemu import qemu_img, qemu_img_ok

from qedcore import open_image
from qedcore.cli.main import COMMANDS, main, parse
from qedcore.engine.image import QEDImage
from qedcore.errors import StorageError

ROOT = Path(__file__).resolve().parents[3]
Image = Callable[..., Built]


@dataclass(frozen=True)
class Done:
    rc: int
    out: str
    err: str


def qed(*args: str | Path, cwd: Path | None = None) -> Done:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "qedcore", *map(str, args)]
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def qed_ok(*args: str | Path, cwd: Path | None = None) -> str:
    done = qed(*args, cwd=cwd)
    assert (done.rc, done.err) == (0, "")
    return done.out


CREATED: dict[str, tuple[str, ...]] = {
    "plain": ("x.qed", "1G"),
    "size 0": ("x.qed", "0"),
    "rounded": ("x.qed", "1000"),
    "fraction": ("x.qed", "1.5M"),
    "options": ("-o", "cluster_size=4k,table_size=2", "x.qed", "1G"),
    "options twice": ("-o", "cluster_size=1M", "-o", "table_size=16", "x.qed", "1T"),
    "raw backing": ("-o", "backing_file=base.raw,backing_fmt=raw", "x.qed", "1G"),
    "QED backing": ("-o", "backing_file=base.qed,backing_fmt=qed", "x.qed", "3M"),
    "comma in the name": ("-o", "backing_file=a,,b.raw,backing_fmt=raw", "x.qed", "1G"),
}


@pytest.fixture
def bases(image: Image, tmp_path: Path) -> Path:
    """A directory with what can be under an image; ours and theirs are created in two below it."""
    for who in ("ours", "theirs"):
        (tmp_path / who).mkdir()
        for name in ("base.raw", "a,b.raw"):
            (tmp_path / who / name).write_bytes(bytes(MiB))
        image(f"{who}/base.qed", layout="D")
    return tmp_path


@pytest.mark.parametrize("name", CREATED)
def test_create_as_qemu_img(bases: Path, name: str) -> None:
    """The same bytes and the same line."""
    args = CREATED[name]
    out = qed_ok("create", *args, cwd=bases / "ours")
    theirs = qemu_img_ok("create", "-f", "qed", *args, cwd=bases / "theirs")
    header = read_header(bases / "ours" / "x.qed")
    assert header == read_header(bases / "theirs" / "x.qed")
    with open(bases / "ours" / "x.qed", "rb") as a, open(bases / "theirs" / "x.qed", "rb") as b:
        assert a.read(4096) == b.read(4096)
    assert out == theirs


FAILING: dict[str, tuple[str, ...]] = {
    "no size": ("create", "x.qed"),
    "bad size": ("create", "x.qed", "1x"),
    "negative size": ("create", "x.qed", "--", "-1"),
    "too large": ("create", "x.qed", "65T"),
    "8 EiB": ("create", "-o", "cluster_size=64M", "x.qed", "8E"),
    "unknown option": ("create", "-o", "encryption=on", "x.qed", "1M"),
    "option without value": ("create", "-o", "table_size", "x.qed", "1M"),
    "bad cluster_size": ("create", "-o", "cluster_size=5000", "x.qed", "1M"),
    "bad number": ("create", "-o", "cluster_size=abc", "x.qed", "1M"),
    "bad table_size": ("create", "-o", "table_size=3", "x.qed", "1M"),
    "directory": ("create", ".", "1M"),
    "missing directory": ("create", "gone/x.qed", "1M"),
    "info of nothing": ("info", "gone.qed"),
    "info of a raw file as QED": ("info", "-f", "qed", "base.raw"),
    "info of a directory": ("info", "."),
}


@pytest.mark.parametrize("name", FAILING)
def test_errors(bases: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in (bases / "ours").iterdir()}
    done = qed(*FAILING[name], cwd=bases / "ours")
    assert done.rc == 1
    assert done.out == "" or done.out.startswith("Formatting ")  # which qemu-img prints first, too
    assert done.err.startswith("qed: ") and "Traceback" not in done.err
    assert {path: path.read_bytes() for path in (bases / "ours").iterdir()} == before


@pytest.mark.parametrize("args", [(), ("frobnicate",), ("info",), ("info", "--output=xml", "x"), ("create",),
                                  ("create", "-q9", "x", "1M"), ("--frobnicate",)])  # fmt: skip
def test_usage_errors(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = qed(*args, cwd=tmp_path)
    assert done.rc in (1, 2)
    assert done.out == "" and done.err.splitlines()[-1].startswith("qed") and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [("--help",), ("create", "--help"), ("info", "--help")])
def test_help(args: tuple[str, ...]) -> None:
    assert "usage: qed" in qed_ok(*args)


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    done = qed("--debug", "info", tmp_path / "gone.qed")
    assert done.rc != 0 and "Traceback" in done.err


# Images for info: name -> spec
DESCRIBED: dict[str, dict[str, object]] = {
    "plain": {"layout": "D", "size": GiB},
    "empty": {"size": 0},
    "geometry": {"cluster_size": 4 * KiB, "table_size": 2, "size": 3 * MiB + 512},
    "raw backing": {"backing": "base.raw", "no_probe": True},
    "QED backing": {"backing": "base.qed"},
    "absolute backing": {"backing": "/dev/null", "no_probe": True},
    "missing backing": {"backing": "gone.raw", "no_probe": True},
    "largest": {"cluster_size": MiB, "table_size": 16, "size": 1 << 62},
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_info_as_qemu_img(image: Image, tmp_path: Path, name: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MiB))
    image("base.qed")
    image("x.qed", **DESCRIBED[name])
    ours = json.loads(qed_ok("info", "--output=json", "x.qed", cwd=tmp_path))
    theirs = json.loads(qemu_img_ok("info", "--output=json", "-f", "qed", "x.qed", cwd=tmp_path))
    shared = set(theirs) - {"format-specific", "children"}
    assert shared <= set(ours)
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    human = qed_ok("info", "x.qed", cwd=tmp_path).splitlines()
    result = qemu_img("info", "-f", "qed", "x.qed", cwd=tmp_path)
    assert result.rc == 0
    missing = [line for line in result.out.splitlines() if line and line not in human]
    assert not missing


@pytest.mark.parametrize("dirty", [False, True])
def test_info_tells_the_truth_about_the_flag(image: Image, dirty: bool) -> None:
    """B5: qemu-img always says that the image is clean.  Nothing is repaired by looking."""
    built = image(layout="D", features=F_NEED_CHECK if dirty else 0, leaks=1)
    before = built.path.read_bytes()
    assert json.loads(qed_ok("info", "--output=json", built.path))["dirty-flag"] is dirty
    assert ("dirty" in qed_ok("info", built.path)) is dirty
    assert built.path.read_bytes() == before
    assert_sound(built.path, leaks=1, need_check=dirty)


def test_table_size_of_1(tmp_path: Path) -> None:
    """B3: made, and warned about."""
    done = qed("create", "-o", "table_size=1", "x.qed", "1M", cwd=tmp_path)
    assert done.rc == 0 and "QEMU cannot open" in done.err
    assert qemu_img("info", "-f", "qed", tmp_path / "x.qed").rc == 1
    assert read_header(tmp_path / "x.qed")["table_size"] == 1
    qed_ok("info", tmp_path / "x.qed")


def test_error_that_leaves_an_image_dirty(
    image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = image(size=MiB, layout="DD").path

    def fail(image: QEDImage, **options: object) -> bool:
        with image.maintenance():
            raise StorageError("injected", code=errno.EIO)

    monkeypatch.setattr("qedcore.cli.commands.compact.compact", fail)
    assert main(["compact", str(path)]) == 1
    told = f"qed: {path} was not closed cleanly: it will be checked when it is next written to\n"
    assert capsys.readouterr().err.endswith(f"qed: injected\n{told}")


def test_error_about_an_image_that_others_use(image: Image) -> None:
    """What they have left open for now is theirs to tell of."""
    path = image(size=MiB, layout="DD").path
    with open_image(path) as img:
        img.pwrite(b"x", 10 * 64 * KiB)
        done = qed("resize", path, "+1M")
    assert done.rc == 1 and "lock" in done.err and "closed cleanly" not in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Nothing is left, and the old target is untouched."""
    with open(tmp_path / "source.raw", "wb") as file:
        file.write(b"x" * (4 << 20))
    (tmp_path / "target").write_bytes(b"old")
    # One byte per second; the progress says that the copy has begun
    argv = ["convert", "-p", "-r", "1", "-O", "qed", "source.raw", "target"]
    child = subprocess.Popen(
        [sys.executable, "-m", "qedcore", *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None and child.stdout.read(15) == b"    (0.00/100%)"
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err == (b"qed: interrupted\n" if number == signal.SIGINT else b"")
    assert (tmp_path / "target").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["source.raw", "target"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: qed {command} ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(re.search(rf"^  {command} ", text, re.MULTILINE) for command in COMMANDS)


def test_options_and_names_in_any_order() -> None:
    args = parse(["convert", "a", "-O", "qed", "b", "-p", "c"])
    assert (args.files, args.target_format, args.progress) == (["a", "b", "c"], "qed", True)
    assert parse(["--debug", "info", "a"]).debug and parse(["info", "a", "--debug"]).debug
    assert not parse(["info", "a"]).debug
