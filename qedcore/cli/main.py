"""The `qed` command: what comes before the sub-command, signals, and the exit code."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from .. import __version__
from ..errors import QEDError
from . import progress, qemu_img
from .messages import PROGRAM, did_you_mean
from .open import to_be_checked, trace
from .output import Output
from .parser import EXIT_FAILURE, Parser

COMMANDS = {
    "create": "make an empty image",
    "info": "describe an image",
    "check": "check an image, and repair it",
    "salvage": "rescue what is left of an image that cannot be repaired",
    "resize": "change the size of an image",
    "rebase": "put an image onto another backing file, or onto none",
    "commit": "write what an image has into its backing file",
    "compact": "rewrite an image in place: small, in order, without leaks",
    "map": "show where the data of an image is",
    "dump": "show the metadata of an image as it is, damaged or not",
    "compare": "compare the contents of two images",
    "convert": "copy an image into another format",
    "dd": "copy blocks of an image into a new one",
    "measure": "tell how large a file a conversion will make",
    "bench": "measure how fast an image is read or written",
    "snapshot": "list internal snapshots: QED has none",
    "amend": "change options of an image: QED cannot",
    "bitmap": "persistent bitmaps: QED cannot store any",
}
_MODULES = {
    "snapshot": "refusals",
    "amend": "refusals",
    "bitmap": "refusals",
}  # command -> module, if named otherwise

# Those that do more than print.
_CHANGING = frozenset(("create", "salvage", "resize", "rebase", "commit", "compact", "convert", "dd"))

EXIT_OK = 0

_HELP = f"""\
Work with QED (QEMU Enhanced Disk) images.  '{PROGRAM} help COMMAND' or '{PROGRAM} COMMAND --help' explains a command:

""" + "\n".join(f"  {name:<10} {about}" for name, about in COMMANDS.items())

_EPILOG = f"""\
Commands, options, messages and exit codes are those of qemu-img where it has them; qed(1) lists the differences.

examples:
  {PROGRAM} create disk.qed 20G                 an empty image
  {PROGRAM} create -b base.qed -F qed top.qed   keeps only what differs from base.qed
  {PROGRAM} info --backing-chain top.qed        what it is, and what is under it
  {PROGRAM} convert -p disk.qed disk.raw        out of QED
  {PROGRAM} convert -p -O qed disk.raw disk.qed and into it
"""


def load(command: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"{__package__}.commands.{_MODULES.get(command, command)}")


def build_parser() -> Parser:
    """The parser of what comes before the command."""
    usage = f"{PROGRAM} [--debug] [-V] [-T EVENTS] COMMAND [OPTION...] [FILE...]"
    parser = Parser(prog=PROGRAM, usage=usage, description=_HELP, epilog=_EPILOG)
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")
    parser.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "-T", "--trace", metavar="EVENTS", help="print trace events (names, or all) on standard error"
    )
    return parser


def build_command_parser(command: str) -> Parser:
    module = load(command)
    parser = Parser(
        prog=f"{PROGRAM} {command}",
        usage="%(prog)s [OPTION...] FILE",
        description=f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
        epilog=getattr(module, "EPILOG", None),
    )
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(command=command)
    module.add_arguments(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """All arguments; args.module is the command's module, args.files the words that are no options, args.argv all
    words from the command on."""
    parser = build_parser()
    args = argparse.Namespace()
    args.argv = parser.take(argv, args, leading=True)
    if not args.argv:
        parser.error(f"Not enough arguments: which command? One of {', '.join(COMMANDS)}")
    command, *words = args.argv
    if command == "help":
        if not words:
            parser.print_help()
            sys.exit(EXIT_OK)
        command, words = words[0], ["--help"]
    if command not in COMMANDS:
        parser.error(f"Command not found: {command}{did_you_mean(command, COMMANDS)}")
    args.module = load(command)
    split = getattr(args.module, "split", list)
    args.files = build_command_parser(command).take(split(words), args)
    return args


class Terminated(SystemExit):
    """SIGTERM or SIGHUP has come: an exception, so that temporary files are removed.  `code` is the exit code."""


_FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_AFTER_SIGNAL = 128  # and its number: the exit code, as a shell has it


def _terminate(number: int, _: object) -> NoReturn:
    for other in _FATAL:
        signal.signal(other, signal.SIG_IGN)  # the end has begun, and is not to be interrupted
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(_AFTER_SIGNAL + number)


def _broken_pipe() -> int:
    """Who read our output has enough; nothing may be printed at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _ended_by(signal.SIGPIPE)


def _output_lost(failure: int, code: int, changes: bool) -> int:
    """The exit code of a command that has returned `code`; a line says so if its output got lost.

    That is a failure, unless the command has changed something: what is done should not be done again.
    """
    sys.stdout.flush()
    lost = sys.stdout.lost() if isinstance(sys.stdout, Output) else None
    if lost is None:
        return code
    done = changes and code == EXIT_OK
    print(f"{PROGRAM}: {lost}{'; what was asked for is done' if done else ''}", file=sys.stderr)
    return code if changes or code else failure


def _explain(error: QEDError | OSError) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename is not None else error.strerror


def _ended_by(number: int) -> int:
    """The exit code; a line says so if an image has to be checked now."""
    path = to_be_checked()
    with suppress(OSError):  # there may be no terminal any more
        if path is not None:
            text = f"interrupted; {path} is whole, and will be checked when it is next written to"
            print(f"{PROGRAM}: {text}", file=sys.stderr)
        elif number == signal.SIGINT:
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
    return _AFTER_SIGNAL + number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code.  Standard output has been flushed then."""
    try:
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else EXIT_OK
            sys.exit(_output_lost(EXIT_FAILURE, code, False))  # of help: an error if nobody gets it
    except BrokenPipeError:
        return _broken_pipe()
    except (QEDError, OSError) as error:
        print(f"{PROGRAM}: {_explain(error)}", file=sys.stderr)
        return EXIT_FAILURE
    changes = args.command in _CHANGING or getattr(args, "repair", None) is not None
    if isinstance(sys.stdout, Output):
        sys.stdout.needed(not changes)
    failure = getattr(args.module, "FAILURE", EXIT_FAILURE)
    before = {number: signal.getsignal(number) for number in (*_FATAL, signal.SIGUSR1)}
    try:
        for number in _FATAL:
            if before[number] is signal.SIG_DFL:  # nohup has SIGHUP ignored
                signal.signal(number, _terminate)
        if before[signal.SIGUSR1] is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, progress.ask)
        gc.freeze()
        gc.enable()
        qemu_img.objects += [word for text in args.object or () for word in ("--object", text)]
        if args.trace:
            trace(args.trace)
        return _output_lost(failure, int(args.module.run(args)), changes)
    except BrokenPipeError:
        return _broken_pipe()
    except (QEDError, OSError, KeyboardInterrupt) as error:
        if args.debug:
            raise
        with suppress(OSError):  # perhaps it is what has failed
            sys.stdout.flush()
        if isinstance(error, KeyboardInterrupt):
            return _ended_by(signal.SIGINT)
        print(f"{PROGRAM}: {_explain(error)}", file=sys.stderr)
        path = to_be_checked()
        if path is not None:
            text = f"{path} was not closed cleanly: it will be checked when it is next written to"
            print(f"{PROGRAM}: {text}", file=sys.stderr)
        return int(getattr(error, "exit_code", failure))
    except Terminated as signalled:
        return _ended_by(signalled.args[0] - _AFTER_SIGNAL)
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # else all of it has ended
                signal.signal(number, handler)
