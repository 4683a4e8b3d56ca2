"""The `qed` command.

Each sub-command is a module here with HELP, add_arguments(parser) and run(args) -> exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import QEDError

COMMANDS = ("create", "info")

EXIT_OK = 0
EXIT_FAILURE = 1


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 1, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_FAILURE, f"qed: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qed", description="Work with QED (QEMU Enhanced Disk) images.", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")
    parser.add_argument("-V", "--version", action="version", version=f"qed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    if argv is None:
        argv = sys.argv[1:]
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return int(code)
    except QEDError as error:
        if args.debug:
            raise
        print(f"qed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("qed: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who read our output has enough; nothing may be printed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
