"""qed snapshot, amend and bitmap: what QED cannot do, refused with qemu-img's words."""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import RequestError
from ..locate import find_format, locate
from ..open import open_qed
from ..options import add_shared
from ..qemu_img import delegate

_BITMAP_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command = parser.get_default("command")
    parser.usage = f"%(prog)s [OPTION...] {'FILE BITMAP' if command == 'bitmap' else 'FILE'}"
    add_shared(parser, {"snapshot": "fqU", "amend": "fqpt", "bitmap": "f"}[command])
    if command == "snapshot":
        parser.add_argument("-l", dest="list", action="store_true", help="list: nothing")
        for letter, verb in (("a", "apply"), ("c", "create"), ("d", "delete")):
            parser.add_argument(f"-{letter}", dest=verb, metavar="SNAPSHOT", help=f"{verb} one: refused")
    elif command == "amend":
        parser.add_argument("-o", dest="options", metavar="OPTIONS")
        parser.add_argument("--force", action="store_true")
    else:
        for action in _BITMAP_ACTIONS:
            parser.add_argument(f"--{action}", **_takes(action))
        parser.add_argument("-g", dest="granularity", metavar="SIZE")
        parser.add_argument("-b", dest="source_file", metavar="FILE")
        parser.add_argument("-F", dest="source_format", metavar="FMT")


def _takes(action: str) -> dict[str, Any]:
    return {"metavar": "SOURCE"} if action == "merge" else {"action": "store_true"}


def run(args: argparse.Namespace) -> int:
    wanted = 2 if args.command == "bitmap" else 1
    if len(args.files) != wanted:
        raise RequestError("Expecting filename and bitmap name" if wanted == 2 else "Expecting one image file name")
    if args.command == "amend" and args.options is None:
        raise RequestError("Must specify options (-o)")
    if (
        args.command == "snapshot"
        and args.list + sum(action is not None for action in (args.apply, args.create, args.delete)) > 1
    ):
        raise RequestError("Cannot mix '-l', '-a', '-c', '-d'")
    where = locate(args.files[0], args.format, args.image_opts)
    format = find_format(where)
    if format != "qed" or where.place is None:
        return delegate(args, f"{args.command} of {where.name} ({format})")
    with open_qed(where, force_share=args.force_share, follow=False):
        pass
    if args.command == "amend":
        raise RequestError("Format driver 'qed' does not support option amendment")
    if args.command == "bitmap":
        done = [action for action in _BITMAP_ACTIONS if getattr(args, action)]
        if not done:
            raise RequestError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
        raise RequestError(
            f"Operation {done[0]} on bitmap {args.files[1]} failed: "
            f"Can't store persistent bitmaps to {where.name}: Operation not supported"
        )
    if args.create is not None:
        raise RequestError(f"Could not create snapshot '{args.create}': -95 (Operation not supported)")
    if args.apply is not None:
        raise RequestError(f"Could not apply snapshot '{args.apply}': Block driver does not support snapshots")
    if args.delete is not None:
        raise RequestError(f"Could not delete snapshot '{args.delete}': snapshot not found")
    return 0
