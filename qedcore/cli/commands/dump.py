"""qed dump"""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import QEDError, RequestError
from ...format.geometry import ENTRY
from ...format.header import (
    FEATURE_NAMES,
    HEADER_BYTES,
    KNOWN_FEATURES,
    Header,
    read_backing_name,
    read_header,
)
from ...format.table import TableIO
from ...storage import Storage
from ...units import MiB
from ..locate import locate
from ..messages import print_json
from ..open import open_file
from ..options import add_output, add_shared, only_image

EPILOG = """\
Without options, the header.  Tables list every entry that is not 0: its index, its value, and what that is.
Nothing is validated before it is shown, and nothing is changed.
"""

_READ = MiB // ENTRY  # entries read at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fU")
    add_output(parser)
    parser.add_argument("--header", action="store_true", help="the header's fields")
    parser.add_argument("--l1", action="store_true", help="the L1 table")
    parser.add_argument("--l2", type=int, action="append", default=[], metavar="N", help="the L2 table of L1 entry N")


def header_facts(storage: Storage) -> dict[str, Any]:
    """The header's fields, and what is to be said of them."""
    data = bytearray(HEADER_BYTES)
    storage.pread_into(data, 0)
    header = Header.unpack(bytes(data))
    facts: dict[str, Any] = {
        "magic": header.magic,
        "cluster-size": header.cluster_size,
        "table-size": header.table_size,
        "header-size": header.header_size,
        "features": header.features,
        "feature-names": _names(header.features),
        "compat-features": header.compat_features,
        "autoclear-features": header.autoclear_features,
        "l1-table-offset": header.l1_table_offset,
        "image-size": header.image_size,
        "backing-filename-offset": header.backing_filename_offset,
        "backing-filename-size": header.backing_filename_size,
        "file-size": storage.size(),
    }
    try:
        read_header(storage)
        facts["backing-filename"] = read_backing_name(storage, header)
    except QEDError as error:
        facts["problem"] = str(error)
    return facts


def _names(features: int) -> list[str]:
    names = [name for bit, name in FEATURE_NAMES.items() if features & bit]
    unknown = features & ~KNOWN_FEATURES
    return names + ([f"unknown {unknown:#x}"] if unknown else [])


def table_facts(storage: Storage, header: Header, offset: int, level: str) -> list[dict[str, Any]]:
    """The entries of a table at file offset `offset` that are not 0.  Raises StorageError."""
    tables = TableIO(storage)
    file_size = storage.size()
    rows = []
    # A damaged header may claim any table size; past the end of the file there is nothing to see.
    entries = min(header.table_size * header.cluster_size, max(file_size - offset, 0)) // ENTRY
    for start in range(0, entries, _READ):
        for i, value in enumerate(tables.read(offset + start * ENTRY, min(_READ, entries - start)), start):
            if value:
                what = _what(value, header, file_size, level)
                rows.append({"index": i, "at": offset + i * ENTRY, "value": value, "what": what})
    return rows


def _what(value: int, header: Header, file_size: int, level: str) -> str:
    if value == 1 and level == "L2":
        return "zero cluster"
    if header.cluster_size and value % header.cluster_size:
        return "not aligned to a cluster"
    if value < header.header_bytes:
        return "inside the header"
    if value >= file_size:
        return "past the end of the file"
    return "data" if level == "L2" else "L2 table"


def print_header(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if name in ("magic", "features", "compat-features", "autoclear-features", "l1-table-offset"):
            text = f"{value:#x}"
        elif isinstance(value, list):
            text = ", ".join(value) or "none"
        else:
            text = str(value)
        print(f"{name + ':':<25}{text}")


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"{title}: {len(rows)} entries")
    for row in rows:
        print(f"{row['index']:>8}  at {row['at']:#014x}  {row['value']:#018x}  {row['what']}")


def run(args: argparse.Namespace) -> int:
    where = locate(only_image(args.files), args.format, args.image_opts)
    if where.place is None or where.format not in (None, "qed"):
        raise RequestError(f"{where.name}: only QED files can be dumped")
    storage = open_file(where, force_share=args.force_share)
    try:
        return dump(args, storage)
    finally:
        storage.close()


def dump(args: argparse.Namespace, storage: Storage) -> int:
    raw = bytearray(HEADER_BYTES)
    storage.pread_into(raw, 0)
    header = Header.unpack(bytes(raw))
    found: dict[str, Any] = {}
    if args.header or not (args.l1 or args.l2):
        found["header"] = header_facts(storage)
    l1_offset = header.l1_table_offset
    if args.l1:
        found["l1"] = {"offset": l1_offset, "entries": table_facts(storage, header, l1_offset, "L1")}
    tables = []
    for index in args.l2:
        entries = header.table_size * header.cluster_size // ENTRY
        if not 0 <= index < entries:
            raise RequestError(f"--l2 {index}: the L1 table has entries 0 to {entries - 1}")
        at = l1_offset + index * ENTRY
        # Past the end of the file there are zeros; a damaged offset may even be past what a file can have.
        offset = TableIO(storage).read(at, 1)[0] if at < storage.size() else 0
        rows = table_facts(storage, header, offset, "L2") if offset else []
        tables.append({"index": index, "offset": offset, "entries": rows})
    if tables:
        found["l2"] = tables
    if args.output == "json":
        print_json(found)
        return 0
    if "header" in found:
        print_header(found["header"])
    if args.l1:
        print_table(f"L1 table at {l1_offset:#x}", found["l1"]["entries"])
    for table in tables:
        if table["offset"]:
            print_table(f"L2 table {table['index']} at {table['offset']:#x}", table["entries"])
        else:
            print(f"L2 table {table['index']}: does not exist")
    return 0
