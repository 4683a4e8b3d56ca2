"""qed commit"""

from __future__ import annotations

import argparse
import os

from ...backing.names import resolve
from ...engine.image import QEDImage
from ...engine.source import Source
from ...errors import RequestError, StorageError
from ...maintenance.commit import commit
from ..locate import Location, backing_path, find_format, locate
from ..messages import notice
from ..open import open_qed
from ..options import add_shared, check_cache, only_image, sized
from ..progress import Progress, RateLimit
from ..qemu_img import delegate

EPILOG = """\
The image is emptied afterwards, except with -d, or with -b (which implies -d).  With -b, the images between FILE and
BASE are no longer valid.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fqpt")
    parser.add_argument(
        "-d", dest="keep", action="store_true", help="do not empty the image: it is to be deleted anyway"
    )
    parser.add_argument("-b", dest="base", metavar="BASE", help="a file further down the chain, to commit into")
    parser.add_argument("-r", dest="rate", metavar="RATE", help="bytes per second at most")


class BaseChoice:
    """Finds the base while the chain is opened: open_image's write_below."""

    def __init__(self, image: str, wanted: str | None) -> None:
        self._wanted = wanted
        self._wanted_path = None if wanted is None else os.path.realpath(resolve(wanted, image))
        self._depth = 0
        self.depth = 0  # of the base under the image, from 1; 0 until it is found

    def __call__(self, name: str, path: str) -> bool:
        self._depth += 1
        found = self._wanted is None or name == self._wanted or os.path.realpath(path) == self._wanted_path
        if found and not self.depth:
            self.depth = self._depth
            return True
        return False

    def of(self, image: QEDImage) -> Source | None:
        """The base in the chain of `image`."""
        layer: Source | None = image
        for _ in range(self.depth):
            layer = layer.backing if layer is not None else None
        return layer if self.depth else None


def _only_qemu_reaches_backing(where: Location) -> bool:
    with open_qed(where, follow=False, force_share=True) as image:
        return image.backing_name is not None and backing_path(image.backing_name, where.place or "") is None


def run(args: argparse.Namespace) -> int:
    rate = sized(args.rate, "rate limit") if args.rate is not None else 0
    name = only_image(args.files)
    check_cache(args.cache)
    where = locate(name, args.format, args.image_opts)
    format = find_format(where)
    if format == "raw":
        raise RequestError("Image does not have a backing file")
    if format != "qed":
        return delegate(args, f"committing a {format} image")
    if _only_qemu_reaches_backing(where):
        return delegate(args, f"committing {name}, whose backing file is not a local file,")
    choice = BaseChoice(where.place or "", args.base)
    with open_qed(where, writable=True, cache=args.cache, log=notice, write_below=choice) as image:
        base = choice.of(image)
        if base is None and args.base is not None:
            raise RequestError(f"Did not find '{args.base}' in the backing chain of '{name}'")
        if base is None:
            raise RequestError("Image does not have a backing file")
        with Progress(args, image.size) as progress:
            keep = args.keep or args.base is not None
            try:
                commit(image, base, keep=keep, progress=progress.update, written=RateLimit(rate).wait)
            except StorageError as error:
                raise StorageError(
                    f"Block job failed: {os.strerror(error.errno)} ({error})", code=error.errno
                ) from error
    if not args.quiet:
        print("Image committed.")
    return 0
