"""What the sub-commands share: options, the names of images, opening them with qemu-img's messages, progress.

A command calls add_shared() with the letters of the options that it takes, locate() for each image name, and
open_qed(), open_end_point() or open_file() to read or write one: all of them lock it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backing.names import from_options, json_options, parse_name, resolve
from ..backing.policy import BackingPolicy
from ..backing.probe import probe
from ..errors import QEDError, RequestError, StorageError, UnsupportedError
from ..format.header import read_header
from ..storage import Storage
from ..storage.cache_mode import CACHE_MODES, CacheMode, cache_mode
from ..storage.file import FileStorage
from ..storage.file_lock import Locking
from ..storage.open import is_uri, open_storage
from ..storage.open import open_file as open_local
from ..units import parse_qemu_size

if TYPE_CHECKING:
    from ..engine.image import QEDImage
    from .images import EndPoint

# Under the name of the program that it stands in for, it also signs its messages as that one.
PROGRAM = "qemu-img" if os.path.basename(sys.argv[0]) == "qemu-img" else "qed"

QEMU_IMG_VARIABLE = "QED_QEMU_IMG"  # environment: the qemu-img for other formats, instead of the one in PATH

_SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "f": (("-f", "--format"), {"dest": "format", "metavar": "FMT", "help": "format of the image (default: probed)"}),
    "q": (("-q", "--quiet"), {"dest": "quiet", "action": "store_true", "help": "print nothing but errors"}),
    "p": (("-p", "--progress"), {"dest": "progress", "action": "store_true", "help": "print progress, in percent"}),
    "U": (
        ("-U", "--force-share"),
        {"dest": "force_share", "action": "store_true", "help": "open the image even if it is in use"},
    ),
    "t": (
        ("-t",),
        {"dest": "cache", "metavar": "CACHE", "help": f"cache mode for writing: {', '.join(CACHE_MODES)}"},
    ),
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


def _output(text: str) -> str:
    if text not in ("human", "json"):
        raise RequestError("--output must be used with human or json as argument.")
    return text


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=_output, default="human", metavar="human|json")


def sized(text: str, what: str) -> int:
    """A size on the command line in bytes; RequestError, with qemu-img's message, calls it `what`."""
    try:
        return parse_qemu_size(text)
    except RequestError:
        raise RequestError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n"
            f"{PROGRAM}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None


# -- names of images ------------------------------------------------------------------------------------


class Location(NamedTuple):
    """Where an image is, from its name on the command line."""

    name: str  # as given, for messages
    path: str | None  # of a local file
    format: str | None  # "qed", "raw" or another; None: to be probed
    locking: Locking = Locking.AUTO  # of the file itself, not of its backing files
    uri: str | None = None  # of an NBD export

    @property
    def place(self) -> str | None:
        """The path or the URI; None when only QEMU knows how to get there."""
        return self.path if self.uri is None else self.uri


def _options_of(text: str) -> dict[str, str]:
    """KEY=VALUE[,KEY=VALUE...] with doubled commas for commas."""
    options = {}
    for word in text.replace(",,", "\0").split(","):
        key, _, value = word.replace("\0", ",").partition("=")
        options[key] = value
    return options


def locate(name: str, format: str | None = None, image_opts: bool = False) -> Location:
    """What `name` means: a path, file:PATH, an NBD URI, json:{...}, or with image_opts driver=...,file.filename=...

    Raises RequestError when it cannot be read.
    """
    if image_opts:
        if format is not None:
            raise RequestError("--image-opts and --format are mutually exclusive")
        options: dict[str, str] = _options_of(name)
    elif name.startswith("json:"):
        try:
            options = json_options(name[len("json:") :])
        except ValueError as error:
            raise RequestError(f"Could not open '{name}': Could not parse the JSON options: {error}") from None
    elif re.match(r"nbds?[+:]", name):
        return Location(name, None, format, uri=parse_name(name, "").uri)
    elif re.match(r"[^/]*:", name):
        protocol, _, rest = name.partition(":")
        if re.match(r"[^/]*:", rest):
            rest = f"./{rest}"  # so that nobody takes its beginning for another protocol
        return Location(name, rest if protocol == "file" else None, format)
    else:
        return Location(name, name, format)
    if options.get("file.driver") == "nbd" and options.get("driver", "qed") == "qed":
        with suppress(UnsupportedError):
            return Location(name, None, options.get("driver") or format, uri=from_options(options, name, "").uri)
    driver = options.pop("driver", None)
    if driver == "file":  # a protocol by itself: its bytes are the image
        return Location(name, options.get("filename"), format or "raw", _locking(name, options.get("locking")))
    format = driver or format
    path = options.pop("file.filename", None)
    plain = options.pop("file.driver", "file") == "file"
    file_locking = _locking(name, options.pop("file.locking", None))
    if format == "qed" and plain and path is not None and options:
        raise UnsupportedError(
            f"Could not open '{name}': Block format 'qed' does not support the option '{min(options)}'"
        )
    return Location(name, path if plain and not options else None, format, file_locking)


def _locking(name: str, value: str | None) -> Locking:
    """The option `locking` of an image's file."""
    try:
        return Locking("auto" if value is None else value)
    except ValueError:
        raise RequestError(f"Could not open '{name}': invalid parameter value: {value}") from None


def backing_path(name: str, overlay: str) -> str | None:
    """The path of the backing file called `name` in the image at `overlay`; None when only QEMU knows the way.

    Raises RequestError and UnsupportedError when it cannot be read.
    """
    if re.match(r"(?!file:)[^/]*:", name):
        return locate(name).path
    return resolve(name, overlay)


def find_format(where: Location) -> str:
    """The format of the image at `where`: as given, or probed.  Raises RequestError if it cannot be opened."""
    if where.format is not None or where.place is None:
        return where.format or "unknown"
    try:
        with look(where) as storage:
            return probe(storage)
    except StorageError as error:
        raise RequestError(f"Could not open '{where.name}': {open_reason(error, where.place)}") from None


@contextmanager
def look(where: Location) -> Iterator[Storage]:
    """The file or export, to read a little of it: in use or not, that does no harm.  Raises StorageError."""
    assert where.place is not None
    storage: Storage = FileStorage(where.path, False) if where.path is not None else open_storage(where.place, False)
    try:
        yield storage
    finally:
        storage.close()


def is_ours(where: Location, format: str) -> bool:
    """An image in this format is read without qemu-img."""
    return where.place is not None and format in ("qed", "raw")


# -- opening --------------------------------------------------------------------------------------------


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


# What qemu-img does with the names in images.
POLICY = BackingPolicy(follow="any", format="probe")

_tracing: dict[str, Any] = {}  # options for chain.open_image


def trace(text: str) -> None:
    """Print the events in `text` (see TraceSelection) of all images opened from now on.  Raises RequestError."""
    from ..trace import TraceSelection

    selection = TraceSelection(text.partition("=")[2] or text, lambda line: print(line, file=sys.stderr))
    _tracing.update(trace=selection, trace_dialect=selection.dialect)


def open_qed(
    where: Location, writable: bool = False, *, cache: str | None = None, force_share: bool = False, **options: Any
) -> QEDImage:
    """Open a QED image and its backing files; `options` go to chain.open_image.

    Raises QEDError with qemu-img's message: Could not open 'NAME': ...
    """
    if where.place is None:
        raise UnsupportedError(
            f"Could not open '{where.name}': not a local file: serve it with nbdkit, or copy it here"
        )
    from ..engine.chain import open_image  # here and below, because not all commands should wait for these

    options = {"log": notice, "policy": POLICY, **_tracing, **options}
    opened: list[str] = []

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        locking = Locking.AUTO if opened else where.locking
        opened.append(path)
        if writable:
            _written.append(path)
        if is_uri(path):
            return open_storage(path, writable, mode)
        return open_local(path, writable, mode, locking=locking, share=force_share)

    try:
        return open_image(where.place, writable, cache=cache or "writeback", opener=opener, **options)
    except QEDError as error:
        reason = open_reason(error, opened[-1] if opened else where.place)
        if len(opened) > 1:
            reason = f"Could not open backing file: {reason}"
        raise RequestError(f"Could not open '{where.name}': {reason}") from error


def open_end_point(
    where: Location, writable: bool = False, *, cache: str | None = None, force_share: bool = False
) -> EndPoint:
    """Open a QED image or a raw file, as find_format tells.  Raises QEDError with qemu-img's message."""
    if find_format(where) == "qed":
        return open_qed(where, writable, cache=cache, force_share=force_share)
    from .images import RawImage

    storage = open_file(where, writable, cache=cache, force_share=force_share)
    try:
        return RawImage(storage, writable)
    except StorageError:
        storage.close()
        raise


def open_file(
    where: Location, writable: bool = False, *, cache: str | None = None, force_share: bool = False
) -> Storage:
    """Open the file of an image by itself, and lock it; or an export.

    Raises RequestError with qemu-img's message.
    """
    assert where.place is not None
    try:
        mode = cache_mode(cache or "writeback")
        if where.path is None:
            return open_storage(where.place, writable, mode)
        return open_local(where.path, writable, mode, locking=where.locking, share=force_share)
    except StorageError as error:
        raise RequestError(f"Could not open '{where.name}': {open_reason(error, where.place)}") from error


_written: list[str] = []  # paths of all that open_qed has opened for writing


def to_be_checked() -> str | None:
    """The path of an image that the command has left so when it was interrupted."""
    for path in _written:
        with suppress(QEDError):
            storage = open_storage(path, writable=False)
            try:
                if read_header(storage)[0].need_check:
                    return path
            finally:
                storage.close()
    return None


def notice(line: str) -> None:
    """Say on standard error what was done besides the task, such as a repair; for open_image's `log`."""
    print(f"{PROGRAM}: {line}", file=sys.stderr)


def check_cache(name: str | None, what: str = "cache") -> None:
    """Raise RequestError unless `name` is a cache mode; `what` is "cache" or "source cache"."""
    if name is not None and name not in CACHE_MODES:
        raise RequestError(f"Invalid {what} option: {name}")


def only_image(files: list[str]) -> str:
    """The one image name of a command that takes one."""
    if len(files) != 1:
        raise RequestError("Expecting one image file name")
    return files[0]


# -- other formats --------------------------------------------------------------------------------------


def find_qemu_img() -> str | None:
    """The path of a qemu-img that is not this program; None without one."""
    import shutil

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


class RateLimit:
    """Holds a copy down to a number of bytes per second, from now on; 0: no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._started = time.monotonic()
        self._done = 0  # bytes

    def wait(self, length: int) -> None:
        """Another `length` bytes are done: sleep until they may be."""
        self._done += length
        if self._rate:
            time.sleep(max(0.0, self._started + self._done / self._rate - time.monotonic()))


# -- progress -------------------------------------------------------------------------------------------


class Progress:
    """How far a command is, of `total` (bytes, or anything).

    With -p as qemu-img prints it; else, on a terminal and without -q, a bar if tqdm is installed; else nothing.
    """

    def __init__(self, args: argparse.Namespace, total: float, label: str = "") -> None:
        self._total = total
        self._percent = -1.0
        self._stopped = False
        self._lines = args.progress and not args.quiet
        self._bar: Any = None
        if not self._lines and not args.quiet and sys.stderr.isatty():
            try:
                tqdm = importlib.import_module("tqdm").tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total, desc=label or None, unit="B", unit_scale=True, unit_divisor=1024, leave=False
            )

    def __enter__(self) -> Progress:
        self.update(0)
        return self

    def update(self, done: float) -> None:
        """`done` of the total is done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._lines:
            percent = min(100 * done / self._total, 100.0) if self._total else 100.0 if done else 0.0
            # qemu-img prints steps of one percent
            if percent >= self._percent + 1 or percent == 100 != self._percent:
                self._percent = percent
                print(f"    ({percent:.2f}/100%)", end="\r", flush=True)

    def finish(self) -> None:
        """All is done."""
        self.update(self._total or 1)

    def stop(self) -> None:
        """The rest need not be done: end without 100 percent."""
        self._stopped = True

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and not self._stopped:
            self.finish()
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            print(flush=True)
