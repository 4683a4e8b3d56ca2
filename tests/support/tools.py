"""External programs: a missing one skips the test with a reason, or fails it under CI=true."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

REPO = Path(__file__).resolve().parents[2]
PLUGIN = REPO / "plugin" / "qed.py"
PYTHON = "/usr/bin/python3"  # the interpreter that nbdkit embeds and whose libnbd binding is packaged
TIMEOUT = 20  # seconds: a hang is a failure, nothing waits this long otherwise


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where everything must be installed."""
    if os.environ.get("CI") == "true":
        raise pytest.fail.Exception(f"CI must have this: {reason}")
    raise pytest.skip.Exception(reason)


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            unavailable(f"{program} is not installed")


# A format or an image of QED in an argument, also within "json:" and --image-opts.
_ASKS_FOR_QED = re.compile(r"(^|[=:\"'])qed($|[,\"'])|\.qed($|[,\"'])")


@functools.cache
def qemu_has_qed() -> bool:
    """False where QEMU was built without its QED driver, as RHEL's is."""
    with tempfile.TemporaryDirectory() as directory:
        line = ["qemu-img", "create", "-q", "-f", "qed", os.path.join(directory, "image"), "64K"]
        return subprocess.run(line, capture_output=True, timeout=TIMEOUT, check=False).returncode == 0


def require_driver(argv: Sequence[str]) -> None:
    """Skip if this is a program of QEMU that is to open QED images, which it cannot."""
    if argv[0] in ("qemu-img", "qemu-io", "qemu-nbd") and any(map(_ASKS_FOR_QED.search, argv[1:])):
        if not qemu_has_qed():
            unavailable("this QEMU has no QED driver")


@dataclass(frozen=True)
class Result:
    rc: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def run(
    args: Sequence[str | os.PathLike[str]],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
) -> Result:
    """Run a program to its end; never raises for its exit code."""
    argv = [os.fspath(a) for a in args]
    require(argv[0])
    require_driver(argv)
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=None if env is None else {**os.environ, **env},
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_ok(
    args: Sequence[str | os.PathLike[str]],
    *,
    cwd: str | os.PathLike[str] | None = None,
    stdin: str | None = None,
) -> str:
    """Run a program that must succeed; returns its stdout."""
    result = run(args, cwd=cwd, stdin=stdin)
    assert result.rc == 0, f"{args}: rc {result.rc}\n{result.text}"
    return result.out


def scratch() -> str | None:
    """A directory in memory, if there is one: for thousands of files that are flushed."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def changed_plugin(directory: Path, code: str) -> Path:
    """The plugin, which runs `code` first: to see what then happens, or in smaller steps."""
    path = directory / "changed.py"
    rest = "with open(__file__) as f:\n    code = f.read()\nexec(compile(code, __file__, 'exec'))\n"
    path.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n{code}\n__file__ = {str(PLUGIN)!r}\n{rest}")
    return path
