"""The command line: getopt's rules, as in qemu-img, and help that fits a terminal.

argparse holds the options and prints the help; the words are taken apart by getopt, which argparse cannot imitate:
what follows "--" is a name, a value may begin with a dash, and long options may be abbreviated.
"""

from __future__ import annotations

import argparse
import getopt
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .messages import PROGRAM, did_you_mean

EXIT_FAILURE = 1


class _HelpFormatter(argparse.HelpFormatter):
    """Paragraphs are filled; lines that are indented, such as examples, stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, 80) - 1)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for part in text.strip().split("\n\n"):
            head = [line for line in part.splitlines() if not line.startswith("  ")]
            rest = [line for line in part.splitlines() if line.startswith("  ")]
            filled.append("\n".join([super()._fill_text(" ".join(head), width, indent), *rest] if head else rest))
        return "\n\n".join(filled) + "\n"


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 1, as everywhere else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_FAILURE, f"{PROGRAM}: {message}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help or an error; argparse of CPython 3.12 and later hides that nobody got it.  Raises OSError."""
        if message:
            (file or sys.stderr).write(message)

    def take(self, words: Sequence[str], args: argparse.Namespace, leading: bool = False) -> list[str]:
        """Enter the options among `words` into args; the other words.

        `leading`: only those before the first other word, which may begin the command.
        """
        self.parse_args([], args)  # all defaults
        options = self._option_string_actions
        short = "".join(name[1] + (":" if _has_value(options[name]) else "") for name in options if name[1] != "-")
        long = [name[2:] + ("=" if _has_value(options[name]) else "") for name in options if name[:2] == "--"]
        try:
            found, rest = (getopt.getopt if leading else getopt.gnu_getopt)(list(words), short, long)
        except getopt.GetoptError as error:
            self.error(_explained(error, options))
        for name, text in found:
            action = options[name]
            value: Any = text if _has_value(action) else []
            if _has_value(action) and callable(action.type):
                try:
                    value = action.type(text)
                except ValueError:
                    self.error(f"Invalid value for option '{name}': {text}")
            action(self, args, value, name)
        return rest


def _has_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def _explained(error: getopt.GetoptError, options: Iterable[str]) -> str:
    """In qemu-img's words."""
    name = f"--{error.opt}" if len(error.opt) > 1 else f"-{error.opt}"
    if "requires argument" in error.msg:
        return f"missing argument for option '{name}'"
    if "must not have an argument" in error.msg:
        return f"option '{name}' takes no argument"
    if "not a unique prefix" in error.msg:
        return f"option '{name}' is ambiguous"
    return f"unrecognized option '{name}'" + did_you_mean(name, options)
