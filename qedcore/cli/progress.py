"""How far a command is, and how fast it may go."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Callable, TypeVar


class RateLimit:
    """Holds a copy down to a number of bytes per second, from now on; 0: no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._started = time.monotonic()
        self._done = 0  # bytes

    def wait(self, length: int) -> None:
        """Another `length` bytes are done: sleep until they may be."""
        self._done += length
        if self._rate:
            time.sleep(max(0.0, self._started + self._done / self._rate - time.monotonic()))


# Those who answer when SIGUSR1 asks how far the command is; the last one does.
_askable: list[Callable[[int], None]] = []


@contextmanager
def asked_for_progress(answer: Callable[[int], None]) -> Iterator[None]:
    """Until the block ends, SIGUSR1 calls `answer` with its number; the work goes on."""
    _askable.append(answer)
    try:
        yield
    finally:
        _askable.remove(answer)


def ask(number: int, _: object = None) -> None:
    """The handler of SIGUSR1."""
    if _askable:
        _askable[-1](number)
    else:
        tell_progress(0.0)


def tell_progress(percent: float) -> None:
    """As qemu-img does.  Not through sys.stderr, which may just be in use."""
    with suppress(OSError):
        os.write(2, f"    ({percent:.2f}/100%)\n".encode())


Item = TypeVar("Item")


class Progress:
    """How far a command is, of `total` (bytes, or percent, as `unit` says), also for SIGUSR1.

    With -p as qemu-img prints it; else, on a terminal and without -q, a bar if tqdm is installed; else nothing.
    `silent`: for a command that prints other things meanwhile.
    """

    def __init__(self, args: argparse.Namespace, total: float, unit: str = "B", silent: bool = False) -> None:
        self._total = total
        self._done = 0.0
        self._percent = -1.0  # that was printed last
        self._stopped = False
        self._lines = args.progress and not args.quiet and not silent
        self._bar: Any = None
        self._asked = asked_for_progress(lambda number: tell_progress(self._fraction()))
        if not (self._lines or silent or args.quiet) and sys.stderr.isatty():
            try:
                tqdm = importlib.import_module("tqdm").tqdm
            except ImportError:
                return
            scaled = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
            self._bar = tqdm(total=total, unit=unit, leave=False, **scaled)

    def __enter__(self) -> Progress:
        self._asked.__enter__()
        self.update(0)
        return self

    def _fraction(self) -> float:
        """In percent."""
        return min(100 * self._done / self._total, 100.0) if self._total else 100.0 if self._done else 0.0

    def update(self, done: float) -> None:
        """`done` of the total is done."""
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._lines:
            percent = self._fraction()
            # qemu-img prints steps of one percent
            if percent >= self._percent + 1 or percent == 100 != self._percent:
                self._percent = percent
                print(f"    ({percent:.2f}/100%)", end="\r", flush=True)

    def finish(self) -> None:
        """All is done."""
        self.update(self._total or 1)

    def stop(self) -> None:
        """The rest need not be done: end without 100 percent."""
        self._stopped = True

    def __exit__(self, kind: object, *_: object) -> None:
        self._asked.__exit__(None, None, None)
        if kind is None and not self._stopped:
            self.finish()
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            print(flush=True)


def silently(args: argparse.Namespace, rows: Iterable[tuple[int, Item]], end: int) -> Iterator[tuple[int, Item]]:
    """The rows, which begin with positions up to `end`; how far they are is only told to SIGUSR1."""
    with Progress(args, end, silent=True) as progress:
        for row in rows:
            progress.update(row[0])
            yield row
