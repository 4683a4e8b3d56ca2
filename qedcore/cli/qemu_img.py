"""qemu-img itself, for what this program does not do, and its command line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, UnsupportedError
from .messages import PROGRAM
from .progress import Progress, asked_for_progress

if TYPE_CHECKING:
    import subprocess
    import threading

QEMU_IMG_VARIABLE = "QED_QEMU_IMG"  # environment: the qemu-img for other formats, instead of the one in PATH

objects: list[str] = []  # --object of the command line, for every qemu-img that works for it


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
    return run_signed([needed(what), *args.argv], args if args.progress else None)


def run_signed(command: list[str], args: argparse.Namespace | None = None) -> int:
    """Run qemu-img, signing its messages with our name; its exit code.

    With the command's `args`, qemu-img tells its progress, which is shown like that of other commands.
    """
    from .child import PIPE, child, exit_code

    sys.stdout.flush()
    if args is not None:
        command = [*command[:2], "-p", *command[2:]]
    with child(command, stdout=None if args is None else PIPE, stderr=PIPE) as process:
        teller = sign(process)
        if args is not None:
            _follow(process, args)
        with asked_for_progress(process.send_signal):
            process.wait()
        teller.join()
    return exit_code(process)


def sign(process: subprocess.Popen[bytes]) -> threading.Thread:
    """A thread that prints what qemu-img or nbdkit has to say, signed with our name, until the end of that."""

    import threading

    def copy() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(re.sub(r"^qemu-img: ", f"{PROGRAM}: ", os.fsdecode(line)))

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _follow(process: subprocess.Popen[bytes], args: argparse.Namespace) -> None:
    """Show the progress that qemu-img prints, and after it whatever else it prints."""
    assert process.stdout is not None
    text = ""
    with Progress(args, 100, unit="%") as progress:
        while True:
            data = os.read(process.stdout.fileno(), 4096)
            *parts, text = re.split(r"    \(([0-9.]+)/100%\)\r", text + os.fsdecode(data))
            for percent in parts[1::2]:
                progress.update(float(percent))
            text = "".join(parts[::2]) + text
            if not data:
                break
        if process.wait():
            progress.stop()
    sys.stdout.write(text.removesuffix("\n"))  # which ends the line of the progress


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

    return json.loads(ask_qemu_img([needed(what), command, *objects, "--output=json", *words]))


def ask_qemu_img(command: list[str]) -> str:
    """What qemu-img prints.  Raises RequestError with its message."""
    import subprocess

    from .child import end_with_parent

    done = subprocess.run(command, capture_output=True, check=False, preexec_fn=end_with_parent())
    if done.returncode:
        raise RequestError(os.fsdecode(done.stderr).strip().partition(": ")[2])
    return os.fsdecode(done.stdout)


def virtual_size(words: Sequence[str], what: str) -> int:
    """The size in bytes of the device in an image, which `words` name to qemu-img."""
    return int(answer("info", words, what)["virtual-size"])
