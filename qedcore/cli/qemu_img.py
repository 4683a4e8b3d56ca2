"""qemu-img itself, for what this program does not do, and its command line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import RequestError, UnsupportedError
from .messages import PROGRAM

QEMU_IMG_VARIABLE = "QED_QEMU_IMG"  # environment: the qemu-img for other formats, instead of the one in PATH


def find_qemu_img() -> str | None:
    """The path of a qemu-img that is not this program; None without one."""
    import shutil  # here and below, because most commands need no other program

    ourselves = os.path.realpath(sys.argv[0])
    for directory in [os.environ.get(QEMU_IMG_VARIABLE), *os.get_exec_path()]:
        path = directory and (shutil.which("qemu-img", path=directory) or shutil.which(directory))
        if path and os.path.realpath(path) != ourselves:
            return path
    return None


def delegate(args: argparse.Namespace, what: str) -> int:
    """Let qemu-img run this very command line, for `what`, which this program does not do; its exit code.

    Raises UnsupportedError when there is no qemu-img.
    """
    program = find_qemu_img()
    if program is None:
        raise UnsupportedError(f"{what} needs qemu-img, which is not installed")
    return run_signed([program, *args.argv])


def run_signed(command: list[str]) -> int:
    """Run qemu-img (or nbdkit with it), signing its messages with our name; its exit code."""
    import subprocess

    sys.stdout.flush()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stderr is not None
        for line in child.stderr:
            sys.stderr.write(re.sub(r"^qemu-img: ", f"{PROGRAM}: ", line))
    return child.returncode


def option_words(**options: object) -> list[str]:
    """Options for qemu-img: f="raw" is -f raw, p=True is -p; None and False are left out."""
    words = []
    for letter, value in options.items():
        if value is True:
            words.append(f"-{letter}")
        elif value is not None and value is not False:
            words += [f"-{letter}", str(value)]
    return words


class ToldError(Exception):
    """qemu-img failed, and has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def must_succeed(exit_code: int) -> None:
    """Raises ToldError."""
    if exit_code:
        raise ToldError(exit_code)


def needed(what: str) -> str:
    """The path of qemu-img, which `what` needs.  Raises UnsupportedError."""
    program = find_qemu_img()
    if program is None:
        raise UnsupportedError(f"{what} needs qemu-img, which cannot be found")
    return program


def answer(command: str, words: Sequence[str], what: str) -> Any:
    """What `qemu-img command --output=json` says of an image.  Raises RequestError, UnsupportedError."""
    import json
    import subprocess

    argv = [needed(what), command, "--output=json", *words]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RequestError(done.stderr.strip().partition(": ")[2])
    return json.loads(done.stdout)


def virtual_size(words: Sequence[str], what: str) -> int:
    """The size in bytes of the device in an image, which `words` name to qemu-img."""
    return int(answer("info", words, what)["virtual-size"])
