"""qed rebase"""

from __future__ import annotations

import argparse
from functools import partial

from ...engine.chain import close_source
from ...engine.source import Source
from ...errors import QEDError, RequestError, UnsupportedError
from ...maintenance.rebase import LoopError, change_name, open_base, rebase
from ...storage.file_lock import LockedError
from ...storage.open import open_file
from ..locate import Location, backing_path, find_format, locate
from ..messages import not_local, notice, open_reason
from ..open import POLICY, open_qed
from ..options import add_shared, check_cache, only_image
from ..progress import Progress
from ..qemu_img import delegate

EPILOG = """\
The guest's data stay the same: what the new backing file has differently is copied into the image first.
With -u only the name changes, for a backing file that was moved or renamed; its content must be the same.
"""

# What QEMU accepts after -F; the image only records whether it is "raw".
_FORMATS = frozenset(
    "raw qed qcow2 qcow vmdk vdi vhdx vpc parallels dmg bochs cloop luks cloud file nbd host_device".split()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fqpUtT")
    parser.add_argument("-b", dest="backing", metavar="BACKING", help='the new backing file; "" for none')
    parser.add_argument("-F", dest="backing_format", metavar="FMT", help="its format: raw or qed")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="change the name only, trust that data agree")


def run(args: argparse.Namespace) -> int:
    name = only_image(args.files)
    if not args.unsafe and args.backing is None:
        raise RequestError("Must specify backing file (-b) or use unsafe mode (-u)")
    check_cache(args.cache)
    check_cache(args.source_cache, "source cache")
    where = locate(name, args.format, args.image_opts)
    if find_format(where) != "qed":
        return delegate(args, f"rebasing a {find_format(where)} image")
    if args.backing_format is not None and args.backing_format not in _FORMATS:
        raise RequestError(f"Invalid format name: '{args.backing_format}'")
    (_rename if args.unsafe else _rebase)(args, where)
    return 0


def _rename(args: argparse.Namespace, where: Location) -> None:
    if where.path is None:
        raise not_local(where.name)
    open_qed(where, follow=False, force_share=True).close()  # for its messages
    if args.backing and not args.backing_format:
        raise _cannot_change(args.backing, RequestError("backing format must be specified"))
    try:
        opener = partial(open_file, locking=where.locking)
        change_name(where.path, args.backing or None, args.backing_format == "raw", opener=opener)
    except LockedError as error:
        raise RequestError(f"Could not open '{where.name}': {open_reason(error)}") from error
    except QEDError as error:
        raise _cannot_change(args.backing, error) from None


def _rebase(args: argparse.Namespace, where: Location) -> None:
    with open_qed(where, writable=True, cache=args.cache, log=notice) as image:
        new: Source | None = None
        try:
            if args.backing:
                if not args.backing_format:
                    raise _cannot_change(args.backing, RequestError("backing format must be specified"))
                path = backing_path(args.backing, where.place or "")
                if path is None:
                    raise UnsupportedError(f"backing file {args.backing!r} is not a local file: use -u")
                opener = partial(open_file, share=args.force_share)
                cache = args.source_cache or "writeback"
                try:
                    new = open_base(
                        image, path, args.backing_format, args.backing, cache=cache, opener=opener, policy=POLICY
                    )
                except LoopError:
                    raise
                except QEDError as error:
                    below = "Could not open backing file: " if ": its backing file: " in str(error) else ""
                    reason = below + open_reason(error, path)
                    raise RequestError(f"Could not open new backing file '{args.backing}': {reason}") from error
            with Progress(args, image.size) as progress:
                try:
                    rebase(image, args.backing or None, new, args.backing_format == "raw", progress.update)
                except (RequestError, UnsupportedError) as error:
                    raise _cannot_change(args.backing, error) from None
        finally:
            close_source(new)


def _cannot_change(name: str | None, error: QEDError) -> QEDError:
    """`error` with qemu-img's words before it."""
    reason = str(error)
    if isinstance(error, LoopError):
        return error
    if isinstance(error, UnsupportedError):
        reason = "Operation not supported"
    elif reason.startswith("no space left"):
        reason = "No space left in the file header"
    return type(error)(f"Could not change the backing file to '{name or ''}': {reason}")
