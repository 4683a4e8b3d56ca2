"""qed compact"""

from __future__ import annotations

import argparse

from ...errors import RequestError
from ...maintenance.compact import compact
from ..locate import locate
from ..messages import notice
from ..open import open_qed
from ..options import add_shared, check_cache, only_image
from ..progress import Progress

EPILOG = """\
It may be interrupted at any time without loss; the next run continues.
Leaks are given back first.  While the rest is put in order, the file may be
larger than it then is by 32 MiB and by the size of the L2 tables; on a full disk
it takes more time and less space, and without any the order stays.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fqpt")
    parser.add_argument("--zeros", action="store_true", help="also drop clusters that hold nothing but zeros")


def run(args: argparse.Namespace) -> int:
    if args.format not in (None, "qed"):
        raise RequestError(f"a {args.format} image cannot be compacted")
    check_cache(args.cache)
    name = only_image(args.files)
    where = locate(name, args.format, args.image_opts)
    with open_qed(where, writable=True, cache=args.cache, log=notice) as image:
        before = image.storage.size()
        with Progress(args, before) as progress:
            in_order = compact(image, zeros=args.zeros, progress=progress.update)
        after = image.storage.size()
    if not in_order:
        notice(f"{name}: what was free is given back, but there is no space to put the rest in order")
    if not args.quiet:
        print(f"Image compacted: {before} bytes before, {after} now.")
    return 0
