"""qed bench"""

from __future__ import annotations

import argparse
import os
import threading
import time

from ...errors import QEDError, RequestError, StorageError
from ...storage.cache_mode import CACHE_MODES
from ..images import EndPoint
from ..locate import find_format, is_ours, locate
from ..open import open_end_point
from ..options import add_shared, only_image, sized
from ..progress import asked_for_progress, tell_progress
from ..qemu_img import delegate, find_qemu_img

EPILOG = """\
Requests of one size go to the image at regular steps, -d of them at a time, and start over at its end.
-w WRITES INTO THE IMAGE: what is there is lost.
"""

_MAX = 2**31 - 1
_MAX_DEPTH = 1024  # each request at a time is a thread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fqtU")
    parser.add_argument("-c", dest="count", metavar="N", default="75000", help="requests in all (75000)")
    parser.add_argument("-d", dest="depth", metavar="N", default="64", help="requests at a time (64)")
    parser.add_argument("-o", dest="offset", metavar="SIZE", default="0", help="where to begin (0)")
    parser.add_argument("-s", dest="size", metavar="SIZE", default="4096", help="of a request (4096)")
    parser.add_argument(
        "-S", dest="step", metavar="SIZE", default="0", help="from one to the next (size of a request)"
    )
    parser.add_argument(
        "-w", dest="write", action="store_true", help="write instead of reading: destroys the content"
    )
    parser.add_argument("--pattern", metavar="BYTE", default="0", help="the byte to write (0)")
    parser.add_argument("--flush-interval", metavar="N", default="0", help="flush after every N writes")
    parser.add_argument("--no-drain", action="store_true", help="do not wait for requests in flight before a flush")
    parser.add_argument("-i", dest="aio", metavar="AIO", help="accepted")
    parser.add_argument("-n", dest="native", action="store_true", help="accepted")


def _number(text: str, what: str, limit: int = _MAX) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= limit:
        raise RequestError(f"Invalid {what} specified")
    return value


def _size(text: str, what: str) -> int:
    return sized(text, what, _MAX)


class Bench:
    """Requests at regular positions, from `depth` threads."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.count = _number(args.count, "request count")
        self.depth = max(_number(args.depth, "queue depth", _MAX_DEPTH), 1)
        self.pattern = _number(args.pattern, "pattern byte", 255)
        self.flush_interval = _number(args.flush_interval, "flush interval")
        self.size = _size(args.size, "buffer size")  # bytes
        self.step = _size(args.step, "step_size") or self.size  # bytes
        self.offset = sized(args.offset, "offset")  # bytes
        self.write: bool = args.write
        if self.flush_interval and not self.write:
            raise RequestError("--flush-interval is only available in write tests")
        if 0 < self.flush_interval < self.depth:
            raise RequestError("Flush interval can't be smaller than depth")
        self._drain = not args.no_drain
        self._lock = threading.Lock()  # of the two below
        self._next = 0  # number of the next request
        self._error: QEDError | None = None  # the first one: no request starts after it

    def __str__(self) -> str:
        flushes = f"\nSending flush every {self.flush_interval} requests" if self.flush_interval else ""
        return (
            f"Sending {self.count} {'write' if self.write else 'read'} requests, {self.size} bytes each, "
            f"{self.depth} in parallel (starting at offset {self.offset}, step size {self.step}){flushes}"
        )

    def run(self, image: EndPoint) -> float:
        """Seconds that all requests took.  Raises QEDError, the first one."""
        started = time.monotonic()
        batch = self.flush_interval if self.flush_interval and self._drain else self.count
        while self._next < self.count:
            end = min(self._next + batch, self.count)
            self._in_parallel(image, end)
            if self._error is not None:
                raise self._error
            if self._drain and self.flush_interval and not end % self.flush_interval:
                image.flush()
        return time.monotonic() - started

    @property
    def percent(self) -> float:
        return 100 * self._next / self.count if self.count else 100.0

    def _in_parallel(self, image: EndPoint, end: int) -> None:
        """All requests up to number `end`."""
        threads = [
            threading.Thread(target=self._work, args=(image, end)) for _ in range(min(self.depth, end - self._next))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._error = self._error or StorageError("interrupted")
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()  # nothing may be in flight when the image is closed

    def _work(self, image: EndPoint, end: int) -> None:
        buffer = bytearray([self.pattern]) * self.size
        try:
            while True:
                with self._lock:
                    number = self._next
                    if number >= end or self._error is not None:
                        return
                    self._next += 1
                self._request(image, buffer, self.offset + number * self.step, wrap=number > 0)
                if self.flush_interval and not self._drain and not (number + 1) % self.flush_interval:
                    image.flush()
        except QEDError as error:
            with self._lock:
                self._error = self._error or error

    def _request(self, image: EndPoint, buffer: bytearray, pos: int, wrap: bool) -> None:
        if wrap and image.size:
            pos %= image.size
        if pos + self.size > image.size:
            raise StorageError(f"{self.size} bytes at {pos} are not in a device of {image.size}")
        if self.write:
            image.pwrite(buffer, pos)
        else:
            image.pread_into(buffer, pos)


def run(args: argparse.Namespace) -> int:
    if args.aio not in (None, "threads", "native", "io_uring"):
        raise RequestError(f"Invalid aio option: {args.aio}")
    if args.cache is not None and args.cache not in CACHE_MODES:
        raise RequestError("Invalid cache mode")
    bench = Bench(args)
    where = locate(only_image(args.files), args.format, args.image_opts)
    format = find_format(where)
    plain_export = where.uri is not None and format == "raw"  # most servers are faster than this program asks
    if not is_ours(where, format) or (plain_export and find_qemu_img() is not None):
        return delegate(args, f"measuring the speed of {where.name} ({format})")
    with open_end_point(where, bench.write, cache=args.cache, force_share=args.force_share) as image:
        print(bench, flush=True)
        try:
            with asked_for_progress(lambda number: tell_progress(bench.percent)):
                seconds = bench.run(image)
        except QEDError as error:
            raise StorageError(f"Failed request: {os.strerror(error.errno)} ({error})", code=error.errno) from error
        image.flush()
        print(f"Run completed in {seconds:.3f} seconds.")
    return 0
