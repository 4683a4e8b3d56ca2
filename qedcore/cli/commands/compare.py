"""qed compare"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Callable

from ...errors import QEDError
from ...format.geometry import SECTOR
from ...units import KiB
from ..images import EndPoint, Run, block_status, first_nonzero
from ..locate import Location, find_format, is_ours, locate
from ..messages import not_local
from ..nbdkit import URI, serve
from ..open import open_end_point
from ..options import add_shared, check_cache
from ..progress import Progress
from ..qemu_img import delegate, option_words

EPILOG = """\
exit codes: 0 the images are identical, 1 they differ, 2 an image cannot be opened, 3 its tables cannot be read,
4 its data cannot be read
"""

DIFFERENT = 1
FAILURE = 2  # exit codes of qemu-img
BAD_STATUS = 3
BAD_READ = 4

_STEP = 256 * KiB  # bytes compared at once: two of them stay in a processor's own cache


class CompareError(QEDError):
    """Reading failed: the message, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] FILE1 FILE2"
    add_shared(parser, "fpqTU")
    parser.add_argument("-F", dest="second_format", metavar="FMT", help="format of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="also compare sizes and what is allocated")


class Comparison:
    """Two open images."""

    def __init__(
        self,
        images: tuple[EndPoint, EndPoint],
        names: tuple[str, str],
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._images = images
        self._names = names
        self._progress = progress
        self._say = say  # takes lines for the user
        self._buffers = (bytearray(_STEP), bytearray(_STEP))
        nothing = Run(0, 0, False, False, False, None, None)
        self._runs = [(0, nothing), (0, nothing)]  # (end, the last one looked up) of each image
        self._end = max(image.size for image in images)  # bytes

    def run(self, strict: bool) -> str | None:
        """What is different; None if nothing is.  Raises CompareError."""
        sizes = [image.size for image in self._images]
        if strict and sizes[0] != sizes[1]:
            return "Strict mode: Image size mismatch!"
        found = self._common(min(sizes), strict)
        if found is None and sizes[0] != sizes[1]:
            self._say("Warning: Image size mismatch!")
            found = self._rest(0 if sizes[0] > sizes[1] else 1, min(sizes))
        return found

    def _common(self, end: int, strict: bool) -> str | None:
        """Compare [0, end); what is wrong, if anything."""
        pos = 0
        while pos < end:
            one, two = self._status(0, pos, end - pos), self._status(1, pos, end - pos)
            n = min(one.length, two.length)
            if strict and self._flags(0, pos, one) != self._flags(1, pos, two):
                return f"Strict mode: Offset {pos} block status mismatch!"
            found = None
            if one.data and two.data:
                n = min(n, _STEP)
                found = self._differ(pos, n)
            elif one.data or two.data:
                n = min(n, _STEP)
                found = self._nonzero(0 if one.data else 1, pos, n)
            if found is not None:
                return f"Content mismatch at offset {found}!"
            pos += n
            self._progress.update(pos)
        return None

    def _rest(self, which: int, pos: int) -> str | None:
        """The part of the longer image past the end of the other one must be zeros."""
        while pos < self._end:
            run = self._status(which, pos, self._end - pos)
            n = run.length
            if run.data:
                n = min(n, _STEP)
                found = self._nonzero(which, pos, n)
                if found is not None:
                    return f"Content mismatch at offset {found}!"
            pos += n
            self._progress.update(pos)
        return None

    def _status(self, which: int, pos: int, length: int) -> Run:
        """The run at pos; looked up once, because that takes time in proportion to its length."""
        end, run = self._runs[which]
        if pos < end:
            return run._replace(length=end - pos)
        try:
            run = block_status(self._images[which], pos, length)
            self._runs[which] = (pos + run.length, run)
            return run
        except QEDError as error:
            raise CompareError(
                f"Sector allocation test failed for {self._names[which]}: {error}", BAD_STATUS
            ) from error

    def _flags(self, which: int, pos: int, run: Run) -> tuple[bool, ...]:
        """What qemu-img compares in strict mode; whether a run is the last one of the device is part of it."""
        last = run.end or pos + run.length == self._images[which].size
        return run.data, run.zero, run.present or run.short, run.offset is not None, last

    def _read(self, which: int, pos: int, n: int) -> memoryview:
        view = memoryview(self._buffers[which])[:n]
        try:
            self._images[which].pread_into(view, pos)
        except QEDError as error:
            message = f"Error while reading offset {pos} of {self._names[which]}: {error}"
            raise CompareError(message, BAD_READ) from error
        return view

    def _nonzero(self, which: int, pos: int, n: int) -> int | None:
        self._read(which, pos, n)
        found = first_nonzero(self._buffers[which], n)
        return None if found is None else pos + found

    def _differ(self, pos: int, n: int) -> int | None:
        self._read(0, pos, n)
        self._read(1, pos, n)
        one, two = self._buffers
        if n < _STEP:
            one, two = one[:n], two[:n]
        if one == two:  # memcmp
            return None
        return pos + next(i for i in range(0, n, SECTOR) if one[i : i + SECTOR] != two[i : i + SECTOR])


def compare(args: argparse.Namespace, places: tuple[Location, Location]) -> int:
    """Compare two images, QED or raw; the exit code."""

    def say(line: str) -> None:
        if not args.quiet:
            print(line)

    with ExitStack() as stack:
        images = []
        for where in places:
            images.append(open_end_point(where, cache=args.source_cache, force_share=args.force_share))
            stack.callback(images[-1].close)
        # qemu-img says its verdict before it ends the line of the progress
        progress = stack.enter_context(Progress(args, max(image.size for image in images)))
        names = (places[0].name, places[1].name)
        difference = Comparison((images[0], images[1]), names, progress, say).run(args.strict)
        if difference is None:
            progress.finish()
            say("Images are identical.")
            return 0
        progress.stop()
        say(difference)
        return DIFFERENT


def run(args: argparse.Namespace) -> int:
    if len(args.files) != 2:
        raise CompareError("Expecting two image file names", 1)
    check_cache(args.source_cache, "source cache")
    places = (
        locate(args.files[0], args.format, args.image_opts),
        locate(args.files[1], args.second_format, args.image_opts),
    )
    formats = [find_format(where) for where in places]
    if all(map(is_ours, places, formats)):
        return compare(args, places)
    if "qed" not in formats or args.strict:
        return delegate(args, f"comparing {places[0].name} ({formats[0]}) and {places[1].name} ({formats[1]})")
    served = formats.index("qed")
    other = 1 - served
    words = ["compare", *option_words(f="raw", F=places[other].format, q=args.quiet)]
    place = places[served].place
    if place is None:
        raise CompareError(str(not_local(places[served].name)), 2)
    return serve(
        place,
        [*words, URI, places[other].name],
        f"comparing with {places[other].name} ({formats[other]})",
        args,
        lock=not args.force_share,
    )
