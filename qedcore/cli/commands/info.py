"""qed info"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ...backing.names import resolve
from ...check.scan import Scan
from ...engine.image import QEDImage
from ...errors import RequestError, StorageError, UnsupportedError
from ...format.geometry import SECTOR, round_up
from ...format.header import FEATURE_NAMES, FEATURE_NO_PROBE, read_header
from ...storage.file import FileStorage
from ...storage.open import is_uri
from ...units import format_size
from ..locate import Location, find_format, is_ours, locate, locate_backing, look
from ..messages import print_json
from ..open import open_qed
from ..options import add_output, add_shared, only_image
from ..qemu_img import ask_qemu_img, delegate, find_qemu_img, objects

EPILOG = """\
--verbose adds what qemu-img does not tell: table_size, features, and how many clusters of the file are in use (for
which it reads all tables).  "dirty" means that the image was not closed cleanly; it is said whenever it is so.
"""

Facts = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fU")
    add_output(parser)
    parser.add_argument("--backing-chain", action="store_true", help="describe all the backing files, too")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell more than qemu-img does")


def describe(path: str, image: QEDImage) -> Facts:
    """The facts under qemu-img's JSON names and in its order."""
    header = image.header
    facts: Facts = {}
    if image.backing_name is not None and header.features & FEATURE_NO_PROBE:
        facts["backing-filename-format"] = "raw"
    facts.update(_plain(path, header.image_size, "qed", header.cluster_size))
    if image.backing_name is not None:
        try:
            facts["full-backing-filename"] = resolve(image.backing_name, path)
        except UnsupportedError:
            facts["full-backing-filename"] = image.backing_name
        facts["backing-filename"] = image.backing_name
    facts["dirty-flag"] = header.need_check
    return facts


def _plain(path: str, size: int, format: str, cluster_size: int = 0) -> Facts:
    facts: Facts = {"virtual-size": size, "filename": path}
    if cluster_size:
        facts["cluster-size"] = cluster_size
    facts["format"] = format
    if not is_uri(path):
        facts["actual-size"] = os.stat(path).st_blocks * SECTOR
    return facts


def describe_raw(where: Location) -> Facts:
    assert where.place is not None
    try:
        with look(where) as storage:
            size = round_up(storage.size(), SECTOR)
    except StorageError as error:
        raise RequestError(
            f"Could not open '{where.name}': Could not open '{where.place}': {os.strerror(error.errno)}"
        ) from None
    return {**_plain(where.place, size, "raw"), "dirty-flag": False}


def details(image: QEDImage) -> Facts:
    """What --verbose adds.  Reads all tables.  Raises StorageError."""
    header, geometry, bounds = read_header(image.storage)
    found = Scan(image.storage, geometry, bounds, header.l1_table_offset).run()
    if found.error is not None:
        raise found.error
    return {
        "table-size": header.table_size,
        "features": [name for bit, name in FEATURE_NAMES.items() if header.features & bit],
        "allocated-clusters": found.allocated,
        "free-clusters": found.leaks,
    }


class Chain:
    """The descriptions of an image and, if wanted, of all that is under it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.layers: list[Facts] = []
        self.tail = ""  # qemu-img's human description of layers in other formats
        self.in_use = False  # somebody writes to one of the images
        self._seen: set[object] = set()

    def follow(self, where: Location) -> None:
        """Describe the image at `where` and its backing files.  Raises QEDError."""
        next_image: Location | None = where
        while next_image is not None:
            next_image = self._layer(next_image)
            if not self._args.backing_chain:
                return

    def _layer(self, where: Location) -> Location | None:
        """Describe one image; returns the one under it."""
        if where.path is not None:
            self._refuse_loop(where)
        format = find_format(where)
        if where.place is None or format not in ("raw", "qed"):
            self._foreign(where, format)
            return None
        if format == "raw":
            self.layers.append(describe_raw(where))
            return None
        with open_qed(where, force_share=self._args.force_share, follow=False) as image:
            facts = describe(where.place, image)
            self.in_use |= isinstance(image.storage, FileStorage) and image.storage.has_writer()
            if self._args.verbose:
                facts.update(details(image))
        self.layers.append(facts)
        if "backing-filename" not in facts:
            return None
        return locate_backing(facts["backing-filename"], where.place, facts.get("backing-filename-format"))

    def _refuse_loop(self, where: Location) -> None:
        try:
            info = os.stat(where.path or "")
        except OSError:
            return  # opening it will tell
        if (info.st_dev, info.st_ino) in self._seen:
            raise RequestError(f"Backing file '{where.path}' creates an infinite loop.")
        self._seen.add((info.st_dev, info.st_ino))

    def _foreign(self, where: Location, format: str) -> None:
        """Layers in another format: qemu-img describes them."""
        program = find_qemu_img()
        if program is None:
            raise UnsupportedError(f"Could not open '{where.name}': describing it ({format}) needs qemu-img")
        output = f"--output={self._args.output}"
        done = ask_qemu_img([program, "info", *objects, "--backing-chain", output, "--", where.name])
        if self._args.output == "json":
            import json

            self.layers += json.loads(done)
        else:
            self.tail = done


def print_human(facts: Facts, in_use: bool) -> None:
    print(f"image: {facts['filename']}")
    print(f"file format: {facts['format']}")
    print(f"virtual size: {format_size(facts['virtual-size'])} ({facts['virtual-size']} bytes)")
    print(f"disk size: {format_size(facts['actual-size']) if 'actual-size' in facts else 'unavailable'}")
    if "cluster-size" in facts:
        print(f"cluster_size: {facts['cluster-size']}")
    if "backing-filename" in facts:
        line = f"backing file: {facts['backing-filename']}"
        if facts["full-backing-filename"] != facts["backing-filename"]:
            line += f" (actual path: {facts['full-backing-filename']})"
        print(line)
    if "backing-filename-format" in facts:
        print(f"backing file format: {facts['backing-filename-format']}")
    if "table-size" in facts:
        print(f"table_size: {facts['table-size']}")
        print(f"features: {', '.join(facts['features']) or 'none'}")
        print(f"allocated clusters: {facts['allocated-clusters']}")
        print(f"free clusters: {facts['free-clusters']}")
    if facts["dirty-flag"] and in_use:
        print("dirty: another program is writing to it")
    elif facts["dirty-flag"]:
        print("dirty: not closed cleanly; opening it for writing checks and repairs it")


def run(args: argparse.Namespace) -> int:
    where = locate(only_image(args.files), args.format, args.image_opts)
    format = find_format(where)
    if not is_ours(where, format):
        return delegate(args, f"describing {where.name} ({format})")
    chain = Chain(args)
    chain.follow(where)
    if args.output == "json":
        print_json(chain.layers if args.backing_chain else chain.layers[0])
        return 0
    for i, facts in enumerate(chain.layers):
        if i:
            print()
        print_human(facts, chain.in_use)
    if chain.tail:
        print(f"\n{chain.tail}", end="")
    return 0
