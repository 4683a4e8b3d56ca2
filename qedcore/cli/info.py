"""qed info"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..chain import open_image, resolve
from ..errors import UnsupportedError
from ..header import FEATURE_NAMES, FEATURE_NO_PROBE
from ..image import QEDImage
from ..sizes import format_size

HELP = "describe an image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=("human", "json"), default="human")
    parser.add_argument("file", metavar="FILE")


def describe(path: str, image: QEDImage) -> dict[str, Any]:
    """The facts under qemu-img's JSON names, and table-size and features, which it lacks."""
    header = image.header
    facts: dict[str, Any] = {
        "virtual-size": header.image_size,
        "filename": path,
        "cluster-size": header.cluster_size,
        "table-size": header.table_size,
        "format": "qed",
        "actual-size": os.stat(path).st_blocks * 512,
        "features": [name for bit, name in FEATURE_NAMES.items() if header.features & bit],
        "dirty-flag": header.need_check,
    }
    if image.backing_name is not None:
        facts["backing-filename"] = image.backing_name
        try:
            facts["full-backing-filename"] = resolve(image.backing_name, path)
        except UnsupportedError:
            facts["full-backing-filename"] = image.backing_name
        if header.features & FEATURE_NO_PROBE:
            facts["backing-filename-format"] = "raw"
    return facts


def print_human(facts: dict[str, Any]) -> None:
    print(f"image: {facts['filename']}")
    print("file format: qed")
    print(f"virtual size: {format_size(facts['virtual-size'])} ({facts['virtual-size']} bytes)")
    print(f"disk size: {format_size(facts['actual-size'])}")
    print(f"cluster_size: {facts['cluster-size']}")
    print(f"table_size: {facts['table-size']}")
    if "backing-filename" in facts:
        line = f"backing file: {facts['backing-filename']}"
        if facts["full-backing-filename"] != facts["backing-filename"]:
            line += f" (actual path: {facts['full-backing-filename']})"
        print(line)
    if "backing-filename-format" in facts:
        print(f"backing file format: {facts['backing-filename-format']}")
    if facts["dirty-flag"]:
        print("dirty: not closed cleanly; opening it for writing checks and repairs it")


def run(args: argparse.Namespace) -> int:
    with open_image(args.file, writable=False, follow=False) as image:
        facts = describe(args.file, image)
    if args.output == "json":
        print(json.dumps(facts, indent=4))
    else:
        print_human(facts)
    return 0
