"""Messages of the command, in qemu-img's words where it has them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

from ..errors import QEDError, UnsupportedError

# Under the name of the program that it stands in for, it also signs its messages as that one.
PROGRAM = "qemu-img" if os.path.basename(sys.argv[0]) == "qemu-img" else "qed"

# Beginnings of the engine's messages (pattern) and what qemu-img says: the same without the values.
_REASONS = (
    (r"image not in QED format", "Image not in QED format"),
    (r"unsupported QED features: ([0-9a-f]+)", r"Unsupported QED features: \1"),
    (r"(QED [a-z0-9 ]+ is (?:invalid|too large))", r"\1"),
    (r"backing filename of [0-9]+ bytes is too long", "Failed to read backing filename"),
    (r"cannot open (.*): not a file or block device", r"'file' driver requires '\1' to be a regular file"),
    (r"(Failed to .*)\. (Is another process using the image \[.*\]\?)", r"\1\n\2"),
    (r"cannot open (.*): (.*)", r"Could not open '\1': \2"),
)


def open_reason(error: QEDError, path: str = "") -> str:
    """What qemu-img says of an error while opening the file at `path`, whose name the engine may put first."""
    text = re.sub(r"^.*?: its backing file: ", "", str(error), count=1, flags=re.DOTALL).removeprefix(f"{path}: ")
    for pattern, words in _REASONS:
        match = re.match(pattern, text, re.DOTALL)
        if match is not None:
            return match.expand(words)
    return text


def not_local(name: str) -> UnsupportedError:
    """For what only works on files here: `name` is on a server, or only QEMU reaches it."""
    return UnsupportedError(f"Could not open '{name}': not a local file: serve it with nbdkit, or copy it here")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", if one of the known words is near."""
    import difflib  # here, because only errors need it

    near = difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def print_json(facts: object) -> None:
    """As qemu-img does: ASCII, and U+FFFD for what is not UTF-8 in a name."""
    import json  # here, because mere text should not wait for it

    text = os.fsencode(json.dumps(facts, indent=4, ensure_ascii=False)).decode("utf-8", "replace")
    print(re.sub("[^\0-\x7f]+", lambda match: json.dumps(match[0])[1:-1], text))


def notice(line: str) -> None:
    """Say on standard error what was done besides the task, such as a repair; for open_image's `log`."""
    print(f"{PROGRAM}: {line}", file=sys.stderr)
