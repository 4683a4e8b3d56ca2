"""qed rebase"""

from __future__ import annotations

import argparse

from ..chain import close_source, open_source, resolve
from ..errors import QEDError, RequestError, UnsupportedError
from ..rebase import change_name, rebase
from ..request import Source
from .common import (
    POLICY,
    Location,
    Progress,
    add_shared,
    check_cache,
    delegate,
    find_format,
    locate,
    notice,
    only_image,
    open_qed,
    open_reason,
    refuse_if_in_use,
)

HELP = "put an image onto another backing file, or onto none"
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
    parser.add_argument("file", nargs="*", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    name = only_image(args.file)
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
        raise UnsupportedError(f"Could not open '{where.name}': not a local file")
    refuse_if_in_use(where.path, writable=True)
    open_qed(where, follow=False).close()  # for its messages
    if args.backing and not args.backing_format:
        raise _cannot_change(args.backing, RequestError("backing format must be specified"))
    try:
        change_name(where.path, args.backing or None, args.backing_format == "raw")
    except QEDError as error:
        raise _cannot_change(args.backing, error) from None


def _rebase(args: argparse.Namespace, where: Location) -> None:
    with open_qed(where, writable=True, cache=args.cache, log=notice) as image:
        new: Source | None = None
        try:
            if args.backing:
                if not args.backing_format:
                    raise _cannot_change(args.backing, RequestError("backing format must be specified"))
                path = resolve(args.backing, where.path or "")
                refuse_if_in_use(path, writable=False, force_share=args.force_share)
                try:
                    new = open_source(
                        path, args.backing_format, cache=args.source_cache or "writeback", policy=POLICY
                    )
                except QEDError as error:
                    reason = open_reason(error, path)
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
    if "infinite loop" in reason:
        return error
    if isinstance(error, UnsupportedError):
        reason = "Operation not supported"
    elif reason.startswith("no space left"):
        reason = "No space left in the file header"
    return type(error)(f"Could not change the backing file to '{name or ''}': {reason}")
