"""Ctrl-C at a system call that strace chooses: while modules are loaded, and in the middle of changes to an image."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, ImageSpec, QedFile, assert_sound, build
from support.server import wait_for
from support.tools import PYTHON, REPO, TIMEOUT, Result, require, run, run_ok, unavailable

from qedcore.storage.file import FileStorage
from qedcore.storage.file_lock import LockedError, Use

QED = [PYTHON, "-m", "qedcore"]
CHANGES = "pwrite64,pwritev,ftruncate,fallocate,fdatasync,fsync,?rename,?renameat,?renameat2"
CS = 4 * KiB
SMALL = {"cluster_size": CS, "table_size": 2}
_POINTS = 16  # of a run at which it is interrupted, at most

Command = list[str]


class Tracer:
    """Runs commands in `cwd` under strace."""

    def __init__(self, log: Path) -> None:
        require("strace")
        self._log = log
        if run(["strace", "-o", log, "true"]).rc != 0:
            unavailable("strace may not trace here")

    def calls(self, command: Command, names: str, cwd: Path) -> list[str]:
        """The command's system calls of these names, in order: PROCESS NAME(ARGUMENTS ..."""
        result = self._run(command, [f"trace={names}"], cwd)
        assert result.rc == 0, result.text
        return [line for line in self._log.read_text().splitlines() if re.match(r"\d+ +\w+\(", line)]

    def interrupt(self, command: Command, calls: Sequence[str], cwd: Path, name: str = "SIGINT") -> Result:
        """Run it once more, with a signal during the last of these calls: what it did up to then."""
        call = re.compile(r"(\d+) +(\w+)\(")
        names = [match.groups() for match in map(call.match, calls) if match]
        # strace counts per process, or thread, and per name.
        inject = f"inject={names[-1][1]}:signal={name}:when={names.count(names[-1])}"
        return self._run(command, [f"trace={names[-1][1]}", inject], cwd)

    def _run(self, command: Command, expressions: Sequence[str], cwd: Path) -> Result:
        options = [word for expression in expressions for word in ("-e", expression)]
        env = {"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}  # the same calls each time
        # pytest itself may run where they are ignored.
        strace = ["env", "--default-signal=INT,HUP", "strace", "-f", "-qq", "-o", str(self._log), *options]
        return run([*strace, *command], cwd=cwd, env=env)


@pytest.fixture
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    return Tracer(tmp_path_factory.mktemp("strace") / "log")


# -- start-up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["module", "script", "entry point"])
def test_while_modules_are_loaded(way: str, tmp_path: Path, image: Callable[..., Built], tracer: Tracer) -> None:
    """It ends with nothing to say, by the signal itself: a shell makes that 130, too."""
    image()
    program = tmp_path / "qed"
    if way == "script":
        run_ok(["make", "-s", "-C", str(REPO), "install", f"PREFIX={tmp_path}", f"PLUGINDIR={tmp_path}"])
        program = tmp_path / "bin" / "qed"
    else:
        # as pip makes it
        target = re.search(r'^qed = "([\w.]+):(\w+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
        assert target
        program.write_text(f"import sys\nfrom {target[1]} import {target[2]}\nsys.exit({target[2]}())\n")
    words = QED if way == "module" else [PYTHON, str(program)]
    command = [*words, "info", "image.qed"]
    calls = tracer.calls(command, "openat", tmp_path)
    # Before, it is not up to us; after, the command runs, and loads more once it has looked at the image.
    first = max(i for i, call in enumerate(calls) if "/__main__." in call)
    looked = min(i for i, call in enumerate(calls) if '"image.qed"' in call)
    last = max(i for i, call in enumerate(calls[:looked]) if "/qedcore/" in call)
    assert last - first > 10
    for when in {first + 1, *range(first + 2, last, 5), last}:
        done = tracer.interrupt(command, calls[: when + 1], tmp_path)
        assert done.rc in (-signal.SIGINT, 128 + signal.SIGINT), (when, done.text)
        assert done.text == "", calls[when]


# -- changes to images -----------------------------------------------------------------------------------------------


def content(path: Path) -> bytes:
    """What the guest reads, and zeros for clusters whose entries are wrong."""
    found = bytearray()
    with QedFile(path) as file:
        while len(found) < file.size:
            n = min(CS, file.size - len(found))
            try:
                found += file.read(len(found), n)
            except OSError:
                found += bytes(n)
    return bytes(found)


@dataclass(frozen=True)
class Change:
    prepare: Callable[[Path], None]
    command: str
    # (what content("image.qed") was, and what it is): asserts that nothing is lost, at any point of the command
    verify: Callable[[bytes, bytes], None] = assert_same


def _full(path: Path) -> None:
    build(path / "image.qed", ImageSpec(**SMALL, size=8 * MiB, layout="D" * (8 * MiB // CS)))


def _untidy(path: Path) -> None:
    build(path / "image.qed", ImageSpec(**SMALL, size=8 * MiB, layout="D-DZ" * 256, reverse=True, leaks=50))


def _damaged(path: Path) -> None:
    entries = {200: lambda built: built.offsets[7], 201: lambda built: built.offsets[8] + 1, 202: 1 << 50}
    build(path / "image.qed", ImageSpec(**SMALL, size=8 * MiB, layout="D" * 128, entries=entries, leaks=50))


def _overlay(path: Path) -> None:
    build(path / "base.qed", ImageSpec(**SMALL, size=4 * MiB, layout="DD--" * 128))
    build(path / "image.qed", ImageSpec(**SMALL, size=4 * MiB, layout="D-Z-D" * 128, backing="base.qed", tag=2))
    (path / "new.raw").write_bytes(stamp(3, 0, 4 * MiB))


def _same_start(before: bytes, after: bytes) -> None:
    assert len(after) in (len(before), 3 * MiB + 512)
    assert_same(after, before[: len(after)])


def _same_good_part(before: bytes, after: bytes) -> None:
    good = 201 * CS
    assert_same(after[:good], before[:good])


CHANGED = {
    "shrink": Change(_full, f"resize -q --shrink image.qed {3 * MiB + 512}", _same_start),
    "compact": Change(_untidy, "compact -q image.qed"),
    "repair": Change(_damaged, "check -q -r all image.qed", _same_good_part),
    "leaks": Change(_untidy, "check -q -r leaks image.qed"),
    "commit": Change(_overlay, "commit -q image.qed"),
    "rebase": Change(_overlay, "rebase -q -b new.raw -F raw image.qed"),
    "flatten": Change(_overlay, "rebase -q -b  image.qed"),
}


def _points(n: int) -> list[int]:
    """Some of 1 ... n, among them the first and the last."""
    return sorted({1 + (n - 1) * i // (_POINTS - 1) for i in range(_POINTS)})


@pytest.mark.parametrize("name", CHANGED)
def test_an_image_that_is_changed_stays_whole(name: str, tmp_path: Path, tracer: Tracer) -> None:
    """It says so, and the next run completes what was interrupted."""
    change = CHANGED[name]
    command = [*QED, *change.command.split(" ")]

    def prepare(number: int) -> tuple[Path, bytes]:
        place = tmp_path / str(number)
        place.mkdir()
        change.prepare(place)
        return place, content(place / "image.qed")

    place, _ = prepare(0)
    calls = tracer.calls(command, CHANGES, place)
    assert len(calls) > 1
    for when in _points(len(calls)):
        place, before = prepare(when)
        path = place / "image.qed"
        done = tracer.interrupt(command, calls[:when], place)
        assert done.rc == 128 + signal.SIGINT, (when, done.text)
        unclean = []
        for other in sorted(place.glob("*.qed")):
            with QedFile(other) as file:
                unclean += [other.name] if file.need_check else []
                assert name == "repair" or not file.verify().errors, calls[when - 1]
        said = f"; {unclean[0]} is whole, and will be checked when it is next written to" if unclean else ""
        assert done.out == "" and done.err.splitlines()[-1] == f"qed: interrupted{said}"
        assert "Traceback" not in done.err
        change.verify(before, content(path))
        done = run(command, cwd=place, env={"PYTHONPATH": str(REPO)})
        assert done.rc == 0, (calls[when - 1], done.text)
        for other in place.glob("*.qed"):
            assert_sound(other)
            qemu.assert_check_clean(other)
        change.verify(before, content(path))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals(name: str, tmp_path: Path, tracer: Tracer) -> None:
    """Terminated, or the terminal is gone: they are as Ctrl-C; a line tells only of an image to be checked."""
    code = 128 + getattr(signal, name)
    prepare, compact = CHANGED["compact"].prepare, [*QED, "compact", "-q", "image.qed"]
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        prepare(tmp_path / place)
    calls = tracer.calls(compact, CHANGES, tmp_path / "a")
    done = tracer.interrupt(compact, calls[: len(calls) // 2], tmp_path / "b", name)
    with QedFile(tmp_path / "b" / "image.qed") as file:
        assert file.need_check
    said = "qed: interrupted; image.qed is whole, and will be checked when it is next written to\n"
    assert (done.rc, done.text) == (code, said)
    convert = [*QED, "convert", "-O", "raw", "image.qed", "target"]
    calls = tracer.calls(convert, CHANGES, tmp_path / "a")
    os.unlink(tmp_path / "a" / "target")
    done = tracer.interrupt(convert, calls[: len(calls) // 2], tmp_path / "a", name)
    assert (done.rc, done.text) == (code, "")
    assert os.listdir(tmp_path / "a") == ["image.qed"]


MADE = {
    "convert to QED": "convert -O qed image.qed target",
    "convert to raw": "convert -O raw image.qed target",
    "dd": "dd -O qed if=image.qed of=target",
    "salvage": "salvage -q image.qed target",
    "create": "create -q target 1G",
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("exists", [False, True])
def test_a_target_is_whole_or_not_there(exists: bool, name: str, tmp_path: Path, tracer: Tracer) -> None:
    _full(tmp_path)
    command = [*QED, *MADE[name].split()]
    target = tmp_path / "target"
    if exists:
        target.write_bytes(b"old")
    calls = tracer.calls(command, CHANGES, tmp_path)
    assert len(calls) > 1
    complete = target.read_bytes()
    named = max(i for i, call in enumerate(calls, 1) if "rename" in call)
    for when in _points(named):
        target.unlink()
        if exists:
            target.write_bytes(b"old")
        done = tracer.interrupt(command, calls[:when], tmp_path)
        assert (done.rc, done.text) == (128 + signal.SIGINT, "qed: interrupted\n"), calls[when - 1]
        assert set(os.listdir(tmp_path)) - {"target"} == {"image.qed"}
        if when == named:
            assert target.read_bytes() == complete
        else:
            assert (target.read_bytes() == b"old") if exists else not target.exists(), calls[when - 1]
            target.touch()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_programs_that_work_for_it_end_with_it(name: str, tmp_path: Path) -> None:
    """A conversion by qemu-img through nbdkit; before, it says how far it is.  The source is free then."""
    build(tmp_path / "image.qed", ImageSpec(size=16 * MiB, layout="D" * 256))
    command = [*QED, "convert", "-r", "1M", "-O", "qcow2", "image.qed", "target"]
    process = subprocess.Popen(
        ["env", "--default-signal=INT,HUP", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None

    def in_use() -> bool:
        storage = FileStorage(tmp_path / "image.qed", writable=True)
        try:
            storage.lock(Use.WRITE)
        except LockedError:
            return True
        finally:
            storage.close()
        return False

    wait_for(in_use, "the source in use")
    process.send_signal(signal.SIGUSR1)
    assert re.fullmatch(rb" +\([0-9.]+/100%\)\n", process.stderr.readline())
    for _ in range(2):
        process.send_signal(getattr(signal, name))
    assert process.wait(TIMEOUT) in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT)
    wait_for(lambda: not in_use(), "the source free")
    process.stderr.close()
    assert name == "SIGKILL" or os.listdir(tmp_path) == ["image.qed"]
