"""How far a command is, and how fast it may go."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from typing import Any


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


class Progress:
    """How far a command is, of `total` (bytes, or anything).

    With -p as qemu-img prints it; else, on a terminal and without -q, a bar if tqdm is installed; else nothing.
    """

    def __init__(self, args: argparse.Namespace, total: float, label: str = "") -> None:
        self._total = total
        self._percent = -1.0
        self._stopped = False
        self._lines = args.progress and not args.quiet
        self._bar: Any = None
        if not self._lines and not args.quiet and sys.stderr.isatty():
            try:
                tqdm = importlib.import_module("tqdm").tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total, desc=label or None, unit="B", unit_scale=True, unit_divisor=1024, leave=False
            )

    def __enter__(self) -> Progress:
        self.update(0)
        return self

    def update(self, done: float) -> None:
        """`done` of the total is done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._lines:
            percent = min(100 * done / self._total, 100.0) if self._total else 100.0 if done else 0.0
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
        if kind is None and not self._stopped:
            self.finish()
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            print(flush=True)
