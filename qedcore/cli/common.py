"""What the sub-commands share: options, the names of images, opening them with qemu-img's messages, progress.

A command calls add_shared() with the letters of the options that it takes, locate() for each image name, and
open_qed() or refuse_if_in_use() before it reads or writes one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

from ..chain import open_image, probe
from ..errors import ImageFormatError, QEDError, RequestError, StorageError, UnsupportedError
from ..image import QEDImage
from ..storage.file import CACHE_MODES, open_storage

# Under the name of the program that it stands in for, it also signs its messages as that one.
PROGRAM = "qemu-img" if os.path.basename(sys.argv[0]) == "qemu-img" else "qed"

QEMU_IMG_VARIABLE = "QED_QEMU_IMG"  # environment: the qemu-img for other formats, instead of the one in PATH

_SHARED = {
    "f": (("-f", "--format"), {"dest": "format", "metavar": "FMT", "help": "format of the image (default: probed)"}),
    "q": (("-q", "--quiet"), {"dest": "quiet", "action": "store_true", "help": "print nothing but errors"}),
    "p": (("-p", "--progress"), {"dest": "progress", "action": "store_true", "help": "print progress, in percent"}),
    "U": (
        ("-U", "--force-share"),
        {"dest": "force_share", "action": "store_true", "help": "open the image even if it is in use"},
    ),
    "t": (("-t",), {"dest": "cache", "metavar": "CACHE", "help": f"cache mode for writing: {', '.join(CACHE_MODES)}"}),
    "T": (("-T",), {"dest": "source_cache", "metavar": "CACHE", "help": "cache mode for reading"}),
}


def add_shared(parser: argparse.ArgumentParser, letters: str) -> None:
    """Add --object, --image-opts and the options named by `letters`, of f q p U t T.

    They become args.format, quiet, progress, force_share, cache, source_cache and image_opts; those that are not
    in `letters` have their defaults there, too.
    """
    for letter, (names, keywords) in _SHARED.items():
        if letter in letters:
            parser.add_argument(*names, **keywords)
        else:
            parser.set_defaults(**{keywords["dest"]: False if "action" in keywords else None})
    parser.add_argument("--image-opts", action="store_true", help="FILE is driver=qed,file.filename=NAME")
    parser.add_argument("--object", action="append", metavar="DEF", help="accepted; only qemu-img uses objects")


# -- names of images -------------------------------------------------------------------------------------------------


class Location(NamedTuple):
    """Where an image is, from its name on the command line."""

    name: str  # as given, for messages
    path: str | None  # of a local file; None when only QEMU knows how to get there
    format: str | None  # "qed", "raw" or another; None: to be probed


def _options_of(text: str) -> dict[str, str]:
    """KEY=VALUE[,KEY=VALUE...] with doubled commas for commas."""
    options = {}
    for word in text.replace(",,", "\0").split(","):
        key, _, value = word.replace("\0", ",").partition("=")
        options[key] = value
    return options


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"file": {"filename": X}} as {"file.filename": X}."""
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def locate(name: str, format: str | None = None, image_opts: bool = False) -> Location:
    """What `name` means: a path, file:PATH, json:{...}, or with image_opts driver=...,file.filename=...

    Raises RequestError when it cannot be read.
    """
    if image_opts:
        if format is not None:
            raise RequestError("--image-opts and --format are mutually exclusive")
        options = _options_of(name)
    elif name.startswith("json:"):
        try:
            options = _flat(json.loads(name[len("json:") :]))
        except ValueError as error:
            raise RequestError(f"Could not open '{name}': Could not parse the JSON options: {error}") from None
    elif re.match(r"[^/]*:", name):
        protocol, _, path = name.partition(":")
        return Location(name, path if protocol == "file" else None, format)
    else:
        return Location(name, name, format)
    driver = options.pop("driver", None)
    if driver == "file":  # a protocol by itself: its bytes are the image
        return Location(name, options.get("filename"), format or "raw")
    format = driver or format
    path = options.pop("file.filename", None)
    plain = options.pop("file.driver", "file") == "file"
    options.pop("file.locking", None)
    if format == "qed" and plain and path is not None and options:
        raise UnsupportedError(f"Could not open '{name}': Block format 'qed' does not support the option '{min(options)}'")
    return Location(name, path if plain and not options else None, format)


def find_format(where: Location) -> str:
    """The format of the image at `where`: as given, or probed.  Raises RequestError if it cannot be opened."""
    if where.format is not None or where.path is None:
        return where.format or "unknown"
    try:
        storage = open_storage(where.path, writable=False)
        try:
            return probe(storage)
        finally:
            storage.close()
    except StorageError as error:
        raise RequestError(f"Could not open '{where.name}': {open_reason(error)}") from None


# -- opening -----------------------------------------------------------------------------------------------------------


def open_reason(error: QEDError) -> str:
    """What qemu-img says of an error while opening: the engine says the same, and then adds values."""
    text = str(error)
    opening = re.fullmatch(r"cannot open (.*): (.*)", text, re.DOTALL)
    if opening is not None:
        name, reason = opening.groups()
        if reason.startswith("not a file"):
            return f"'file' driver requires '{name}' to be a regular file"
        return f"Could not open '{name}': {reason}"
    if isinstance(error, (ImageFormatError, UnsupportedError)):
        words = re.match(r"(?:.*: )?((?:image not|unsupported|QED) [^:(]*(?:: [0-9a-f]+)?)(?: \(|: |$)", text)
        if words is not None:
            return words[1][0].upper() + words[1][1:]
    return text


def open_qed(
    where: Location, writable: bool = False, *, cache: str | None = None, force_share: bool = False, **options: Any
) -> QEDImage:
    """Open a QED image and its backing files; `options` go to chain.open_image.

    Raises RequestError with qemu-img's message: Could not open 'NAME': ...
    """
    if where.path is None:
        raise UnsupportedError(f"Could not open '{where.name}': not a local file: serve it with nbdkit, or copy it here")
    refuse_if_in_use(where.path, writable, force_share)
    try:
        return open_image(where.path, writable, cache=cache or "writeback", **options)
    except QEDError as error:
        reason = open_reason(error)
        text = str(error)
        if text.startswith((f"{where.path}: ", f"cannot open {where.path}: ")) or where.path == reason:
            raise type(error)(f"Could not open '{where.name}': {reason}") from None
        if isinstance(error, StorageError) and not text.startswith("cannot open "):
            raise
        if not reason.startswith("Could not open") and ": " in text:
            reason = f"Could not open '{text.split(': ')[0]}': {reason}"
        raise type(error)(f"Could not open '{where.name}': Could not open backing file: {reason}") from None


def check_cache(name: str | None, what: str = "cache") -> None:
    """Raise RequestError unless `name` is a cache mode; `what` is "cache" or "source cache"."""
    if name is not None and name not in CACHE_MODES:
        raise RequestError(f"Invalid {what} option: {name}")


def refuse_if_in_use(path: str, writable: bool, force_share: bool = False) -> None:
    """Raise RequestError when another program uses the image at `path`: the one place that asks.

    It does not yet: QEMU-compatible locks are to be taken here, and held until the image is closed.
    """


# -- other formats -----------------------------------------------------------------------------------------------------


def find_qemu_img() -> str | None:
    """The path of a qemu-img that is not this program; None without one."""
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
    sys.stdout.flush()
    return subprocess.run([program, *args.argv], check=False).returncode


# -- progress ----------------------------------------------------------------------------------------------------------


class Progress:
    """How far a command is, of `total` (bytes, or anything).

    With -p as qemu-img prints it; else, on a terminal and without -q, a bar if tqdm is installed; else nothing.
    """

    def __init__(self, args: argparse.Namespace, total: int, label: str = "") -> None:
        self._total = total
        self._percent = -1.0
        self._lines = args.progress and not args.quiet
        self._bar: Any = None
        if not self._lines and not args.quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=label or None, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __enter__(self) -> Progress:
        self.update(0)
        return self

    def update(self, done: int) -> None:
        """`done` of the total is done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._lines:
            percent = min(100 * done / self._total, 100.0) if self._total else 100.0 if done else 0.0
            # qemu-img prints steps of one percent
            if percent >= self._percent + 1 or percent == 100 != self._percent:
                self._percent = percent
                print(f"    ({percent:.2f}/100%)", end="\r", flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.update(self._total or 1)
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            print(flush=True)
