"""Where the data of images in other formats are: only QEMU knows."""

from __future__ import annotations

from bisect import bisect_right
from typing import Callable

from ..engine.raw import RawImage
from ..engine.source import Source, layers
from .images import Run
from .qemu_img import answer, option_words


def rows_of(image: Source, force_share: bool) -> Callable[[int, int], Run] | None:
    """What qemu-img says of the image in another format that the chain ends with (images.Rows); None without one.

    Raises RequestError and UnsupportedError.
    """
    for layer in layers(image):
        if isinstance(layer, RawImage) and layer.guest_of is not None:
            name, format = layer.guest_of
            return ForeignRows(name, format, force_share).run_at
    return None


class ForeignRows:
    """Where the data of an image in another format are, as `qemu-img map` tells."""

    def __init__(self, name: str, format: str, force_share: bool) -> None:
        words = [*option_words(f=format, U=force_share), "--", name]
        self._rows: list[dict[str, int]] = answer("map", words, f"a map of {name} ({format})")
        self._starts = [row["start"] for row in self._rows]  # bytes
        chain = answer("info", ["--backing-chain", *words], f"a map of {name} ({format})")
        self._names = [image["filename"] for image in chain]

    def run_at(self, pos: int, length: int) -> Run:
        row = self._rows[bisect_right(self._starts, pos) - 1]
        into, depth, offset = pos - row["start"], row["depth"], row.get("offset")
        present = bool(row.get("present", row["data"] or row["zero"]))
        name = self._names[depth] if offset is not None and depth < len(self._names) else None
        return Run(
            min(length, row["length"] - into),
            depth,
            present,
            bool(row["zero"]),
            bool(row["data"]),
            None if offset is None else offset + into,
            name,
        )
