"""qed salvage"""

from __future__ import annotations

import argparse

HELP = "rescue what is left of an image that cannot be repaired"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")


def run(args: argparse.Namespace) -> int:
    return 1
