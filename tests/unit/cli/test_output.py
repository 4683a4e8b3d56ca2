"""Standard output and error that are full, closed, or have no reader."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.patterns import KiB, MiB
from support.qed_image import F_NEED_CHECK, Built, assert_sound, read_header

ROOT = Path(__file__).resolve().parents[3]
Image = Callable[..., Built]


@dataclass(frozen=True)
class Done:
    rc: int
    out: str
    err: str


def shell(directory: Path, words: str, output: str) -> Done:
    """A command whose descriptors a shell changes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    argv = ["sh", "-c", f'"$@" {output}', "sh", sys.executable, "-m", "qedcore", *words.split()]
    done = subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


LOST = {
    ">/dev/full": "cannot write to standard output: No space left on device",
    ">&-": "standard output is closed",
    "<&- >&-": "standard output is closed",
    "<&- >&- 2>&-": "",
    ">/dev/full 2>/dev/full": "",
}


@pytest.mark.parametrize("output", LOST)
@pytest.mark.parametrize("words, code", [("info x.qed", 1), ("compare x.qed x.qed", 2), ("check x.qed", 1)])
def test_output_that_gets_lost(image: Image, tmp_path: Path, words: str, code: int, output: str) -> None:
    """It is all that the command is for."""
    image("x.qed")
    said = f"qed: {LOST[output]}\n" if LOST[output] else ""
    assert shell(tmp_path, words, output) == Done(code, "", said)


WORK: dict[str, Callable[[Path], bool]] = {
    "resize x.qed +1M": lambda place: read_header(place / "x.qed")["image_size"] == 2 * MiB,
    "create new.qed 1M": lambda place: (place / "new.qed").exists(),
    "convert -p x.qed new.raw": lambda place: (place / "new.raw").stat().st_size == MiB,
    "compact x.qed": lambda place: (place / "x.qed").stat().st_size == 11 * 64 * KiB,
    "check -r leaks x.qed": lambda place: (place / "x.qed").stat().st_size == 11 * 64 * KiB,
}


@pytest.mark.parametrize("output", [*LOST, "2>&-", "2>/dev/full"])
@pytest.mark.parametrize("words", WORK)
def test_work_whose_output_gets_lost(image: Image, tmp_path: Path, words: str, output: str) -> None:
    """What is done does not look undone, and no image gets the number of a descriptor that others print to."""
    path = image("x.qed", size=MiB, layout="DD", leaks=3).path
    done = shell(tmp_path, words, output)
    lost = LOST.get(output)
    assert (done.rc, done.err) == (0, f"qed: {lost}; what was asked for is done\n" if lost else "")
    assert WORK[words](tmp_path)
    assert_sound(path, leaks=3)


@pytest.mark.parametrize("output", ["", *LOST])
def test_errors_are_told_all_the_same(tmp_path: Path, output: str) -> None:
    done = shell(tmp_path, "info no.qed", output)
    assert (done.rc, done.out) == (1, "")
    assert done.err.startswith("qed: Could not open 'no.qed'") == ("2>" not in output)
    assert done.err.count("\n") <= 1


def test_notices_that_get_lost(image: Image, tmp_path: Path) -> None:
    """They are no reason to stop."""
    path = image("x.qed", size=MiB, layout="DD", features=F_NEED_CHECK).path
    assert shell(tmp_path, "resize x.qed +1M", "2>/dev/full") == Done(0, "Image resized.\n", "")
    assert_sound(path)


def test_reader_that_leaves_work_alone(image: Image, tmp_path: Path) -> None:
    image("x.qed", size=MiB, layout="DD")
    done = shell(tmp_path, "convert -p x.qed new.raw", "| true")
    assert done.err == ""
    assert (tmp_path / "new.raw").stat().st_size == MiB


@pytest.mark.parametrize("words", ["--help", "check --help", "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_cannot_be_written(words: str, unbuffered: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    argv = [sys.executable, "-m", "qedcore", *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == f"qed: {LOST['>/dev/full']}\n"


def test_closed_output(image: Image) -> None:
    """A reader that goes away is no traceback."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "qedcore", "info", str(image().path)]
    done = subprocess.run(argv, env=env, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
