"""qed salvage"""

from __future__ import annotations

import argparse
import os

from ...engine.raw import RawImage
from ...errors import RequestError
from ...maintenance.salvage import GOOD, LOST, Found, Range, Salvage
from ...storage import Storage
from ...storage.open import is_uri, open_file, open_storage
from ...units import parse_size
from ..conversion import new_target
from ..creation import Options
from ..locate import Location
from ..messages import print_json
from ..options import add_output, add_shared
from ..progress import Progress

EPILOG = """\
FILE is only read.  TARGET becomes a raw file with zeros where nothing was found.  The ranges of the device are
printed: good (found), zero (nothing was written there, or zeros) and lost.  The exit code is 0 if nothing was lost
and no position had to be guessed, 2 otherwise, and 1 if nothing could be rescued.
"""

EXIT_WHOLE = 0
EXIT_INCOMPLETE = 2

_STEPS = 100  # of progress: percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] FILE TARGET"
    add_shared(parser, "qpU")
    add_output(parser)
    parser.add_argument("--cluster-size", metavar="SIZE", help="if you know it")
    parser.add_argument("--table-size", metavar="N", help="in clusters, if you know it")
    parser.add_argument("--size", metavar="SIZE", help="of the device, if you know it")
    parser.add_argument(
        "--guess", action="store_true", help="take an L1 table without entries for one that lost them"
    )


def run(args: argparse.Namespace) -> int:
    cluster_size, table_size, image_size = (
        parse_size(text, name) if text is not None else 0
        for name, text in (
            ("cluster_size", args.cluster_size),
            ("table_size", args.table_size),
            ("image_size", args.size),
        )
    )
    if len(args.files) != 2:
        raise RequestError("Expecting the image file name and that of the raw file to make")
    name, out = args.files
    local = not is_uri(name)
    storage: Storage = open_file(name, writable=False, share=args.force_share) if local else open_storage(name, False)
    try:
        if local and os.path.exists(out) and os.path.samefile(name, out):
            raise RequestError(f"{out} is the image itself")
        with Progress(args, _STEPS, unit="%") as progress:
            salvage = Salvage(
                storage,
                cluster_size=cluster_size,
                table_size=table_size,
                image_size=image_size,
                guess=args.guess,
                progress=lambda done, total: progress.update(done * _STEPS // total if total else _STEPS),
            )
            found = salvage.search()
            ranges = _write(salvage, found, out)
    finally:
        storage.close()
    if not args.quiet:
        _print(args.output, name, found, ranges)
    return EXIT_INCOMPLETE if found.guessed or any(piece.state == LOST for piece in ranges) else EXIT_WHOLE


def _write(salvage: Salvage, found: Found, path: str) -> list[Range]:
    """Make the raw file, durably: what was rescued may be all that there is."""
    where = Location(path, None, "raw", uri=path) if is_uri(path) else Location(path, path, "raw")
    with new_target(path, where, "raw", found.image_size, Options(path, []), "writeback") as (target, fresh):
        assert isinstance(target, RawImage)
        return salvage.write(found, target, fresh)


def _print(output: str, image: str, found: Found, ranges: list[Range]) -> None:
    geo = found.geometry
    sums = {
        state: sum(piece.length for piece in ranges if piece.state == state) for state in ("good", "zero", "lost")
    }
    if output == "json":
        facts = {
            "filename": image,
            "virtual-size": found.image_size,
            "cluster-size": geo.cluster_size,
            "table-size": geo.table_size,
            **{f"{state}-bytes": length for state, length in sums.items()},
            "notes": found.notes,
            "ranges": [
                {"start": piece.start, "length": piece.length, "state": piece.state}
                | ({"detail": piece.why} if piece.why else {})
                for piece in ranges
            ],
        }
        print_json(facts)
        return
    print(f"cluster_size {geo.cluster_size}, table_size {geo.table_size}, size {found.image_size}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"{'Offset':<16}{'Length':<16}State")
    for piece in ranges:
        print(f"{piece.start:<#16x}{piece.length:<#16x}{piece.state}{f' ({piece.why})' if piece.why else ''}")
    print(f"good {sums[GOOD]} bytes, zero {sums['zero']} bytes, lost {sums[LOST]} bytes")
