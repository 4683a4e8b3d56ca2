"""Programs that work for a command, such as qemu-img: they end when the command ends, in whatever way it does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from subprocess import PIPE as PIPE
from typing import Any, Callable

_END_SECONDS = 5.0  # for a program that has been told to end
_PR_SET_PDEATHSIG = 1


@cache
def end_with_parent() -> Callable[[], None] | None:
    """For preexec_fn: the system ends the program when this one is gone, also after SIGKILL.  None: it cannot."""
    import ctypes

    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    parent = os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was too late
            os.kill(os.getpid(), signal.SIGTERM)

    return arrange


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program, which has ended when the block has: by itself, when its input ends, or by SIGTERM and SIGKILL."""
    process = subprocess.Popen(command, preexec_fn=end_with_parent(), **options)
    try:
        yield process
    finally:
        with suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()
            elif process.poll() is None:
                process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            if options.get("start_new_session"):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """As a shell has it."""
    code = process.returncode
    return code if code >= 0 else 128 - code
