"""Images whose file operations are recorded (the fixtures `tapped` and `dirty`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.patterns import KiB
from support.qed_image import Built

import qedcore
from unit.fakes import Call, Gate, Hook, Tap

Image = Callable[..., Built]
Tapped = Callable[..., tuple[qedcore.QEDImage, Tap, Built]]

CS = 64 * KiB
BASE = 9  # tag of backing data

# What goes to disk, in order.  Offsets in clusters of the default image: header 0, L1 1-4.
SET = ("pwrite", 0, 64)
FLUSH = ("flush", 0, 0)
GROW = ("truncate",)


def logged(tap: Tap) -> list[tuple[Any, ...]]:
    """The changes since the last call; vectored writes as plain ones, growth without its size."""
    names = {"pwritev": "pwrite"}
    out = [GROW if call.name == "truncate" else (names.get(call.name, call.name), *call[1:]) for call in tap.log]
    tap.log.clear()
    return out


def stop_at(gate: Gate, matches: Callable[[Call], bool]) -> Hook:
    """A hook that stops the first call that matches."""
    stopped: list[Call] = []

    def hook(call: Call) -> None:
        if not stopped and matches(call):
            stopped.append(call)
            gate.stop()

    return hook
