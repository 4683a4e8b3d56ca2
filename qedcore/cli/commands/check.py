"""qed check"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Callable

from ...check.image_end import as_file
from ...check.scan import Scan, ScanResult
from ...errors import ImageFormatError, RequestError, StorageError, UnsupportedError
from ...format.header import Header, read_header
from ...storage import Storage
from ..locate import Location, find_format, is_ours, locate
from ..messages import PROGRAM, notice, open_reason, print_json
from ..open import open_file
from ..options import add_output, add_shared, check_cache, only_image
from ..progress import Progress
from ..qemu_img import delegate, find_qemu_img

EXIT_CLEAN = 0
EXIT_NOT_COMPLETED = 1
EXIT_CORRUPTIONS = 2
EXIT_LEAKS = 3
EXIT_UNSUPPORTED = 63

_STEPS = 100  # of progress: percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fqpUT")
    parser.add_argument("-r", dest="repair", metavar="leaks|all", help="give leaks back, or repair everything")
    parser.add_argument("--dry-run", action="store_true", help="with -r: only say what would be done")
    parser.add_argument("--force", action="store_true", help="with -r all: give up tables whose place is not known")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every damaged entry")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    if args.repair not in (None, "leaks", "all"):
        raise RequestError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {args.repair}")
    name = only_image(args.files)
    if args.dry_run and args.repair is None:
        raise RequestError("--dry-run needs -r leaks or -r all")
    if args.force and args.repair != "all":
        raise RequestError("--force needs -r all")
    check_cache(args.source_cache, "source cache")
    where = locate(name, args.format, args.image_opts)
    if args.force_share and args.repair is not None:
        raise RequestError(f"Could not open '{where.name}': force-share=on can only be used with read-only images")
    format = find_format(where)
    if not is_ours(where, format) and find_qemu_img() is not None:
        return delegate(args, f"checking a {format} image")
    if format != "qed" or where.place is None:
        print(f"{PROGRAM}: This image format does not support checks", file=sys.stderr)
        return EXIT_UNSUPPORTED
    writable = args.repair is not None and not args.dry_run
    storage = open_file(where, writable, cache=args.source_cache, force_share=args.force_share)
    try:
        run_on = _check if args.repair is None else _repair
        return run_on(args, where, as_file(storage, writable))
    except (ImageFormatError, UnsupportedError) as error:
        raise type(error)(f"Could not open '{where.name}': {open_reason(error, where.place)}") from None
    except StorageError as error:
        print(f"{PROGRAM}: Check failed: {os.strerror(error.errno)} ({error})", file=sys.stderr)
        return EXIT_NOT_COMPLETED
    finally:
        storage.close()


def _check(args: argparse.Namespace, where: Location, storage: Storage) -> int:
    header, geometry, bounds = read_header(storage)
    report = (lambda damage: notice(str(damage))) if args.verbose and not args.quiet else _silent
    with Progress(args, _STEPS, unit="%") as progress:
        update = _fraction(progress)
        found = Scan(storage, geometry, bounds, header.l1_table_offset, report=report, progress=update).run()
    return _finish(args, where, header, found)


def _repair(args: argparse.Namespace, where: Location, storage: Storage) -> int:
    from ...maintenance.header_fit import raw_header
    from ...maintenance.repair import Repair
    from ...storage.overlay import Rehearsal  # here, because a mere check should not wait for them

    notes: list[str] = []
    target: Storage = Rehearsal(storage) if args.dry_run else storage
    say = notes.append if args.dry_run else _silent if args.quiet else notice
    with Progress(args, _STEPS, unit="%") as progress:
        repair = Repair(target, say=say, progress=_fraction(progress), rehearse=args.dry_run, force=args.force)
        outcome = repair.run(everything=args.repair == "all")
    if not args.dry_run:
        fixed = outcome.corruptions_fixed, outcome.leaks_fixed
        return _finish(args, where, read_header(storage)[0], outcome.last, *fixed)
    if not args.quiet and args.output == "human":
        print("The following would be done:\n" if notes else "Nothing would be done.")
        for line in notes:
            print(f"    {line}")
        print("\nThe image now, unchanged:\n" if notes else "")
    # Not read_header(): the file of the rehearsal is shorter than where its tables, which were not moved, are.
    return _finish(args, where, raw_header(target), outcome.first, notes=notes)


def _silent(text: object) -> None:
    pass


def _fraction(progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress.update(done * _STEPS // total if total else _STEPS)


def _finish(
    args: argparse.Namespace,
    where: Location,
    header: Header,
    last: ScanResult,
    corruptions_fixed: int = 0,
    leaks_fixed: int = 0,
    notes: list[str] | None = None,
) -> int:
    """Print the result as qemu-img does; the exit code."""
    if args.output == "human" and (corruptions_fixed or leaks_fixed) and not args.quiet:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {leaks_fixed} leaked clusters\n    {corruptions_fixed} corruptions\n")
        print("Double checking the fixed image now...")
    if last.error is not None:
        sys.stdout.flush()
        print(f"{PROGRAM}: Check failed: {os.strerror(last.error.errno)} ({last.error})", file=sys.stderr)
        return EXIT_NOT_COMPLETED
    if not args.quiet:
        if args.output == "json":
            found = facts(where.name, header, last, corruptions_fixed, leaks_fixed)
            print_json(found if notes is None else {**found, "repairs": notes})
        else:
            print_human(header, last)
    if last.corruptions:
        return EXIT_CORRUPTIONS
    return EXIT_LEAKS if last.leaks else EXIT_CLEAN


def facts(
    name: str, header: Header, found: ScanResult, corruptions_fixed: int = 0, leaks_fixed: int = 0
) -> dict[str, Any]:
    """Under qemu-img's JSON names; those that are 0 are left out, as there."""
    optional = {
        "total-clusters": -(-header.image_size // header.cluster_size),
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        "corruptions-fixed": corruptions_fixed,
        "leaks-fixed": leaks_fixed,
        "allocated-clusters": found.allocated,
        "fragmented-clusters": found.fragmented,
    }
    always = {"filename": name, "format": "qed", "check-errors": found.check_errors}
    return {**always, **{key: value for key, value in optional.items() if value}}


def print_human(header: Header, found: ScanResult) -> None:
    if found.corruptions:
        print(f"\n{found.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if found.leaks:
        print(f"\n{found.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if not found.corruptions and not found.leaks:
        print("No errors were found on the image.")
    total = -(-header.image_size // header.cluster_size)
    if total and found.allocated:
        print(
            f"{found.allocated}/{total} = {found.allocated * 100 / total:.2f}% allocated, "
            f"{found.fragmented * 100 / found.allocated:.2f}% fragmented, 0.00% compressed clusters"
        )
