"""Leaks for images to be built with (ImageSpec.litter): sound images, in which nothing may take them for anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from support.patterns import stamp

Litter = Callable[[str], Sequence[bytes]]
_WORDS = ("hole", "zeros", "garbage", "table", "hole zeros", "hole zeros garbage table")


def littering(rng: random.Random, cluster_size: int, table_size: int) -> Litter:
    """Clusters that nothing refers to: holes, zeros, garbage, and what looks like tables; some only behind tables."""
    often = rng.choice((0.2, 0.9, 1.0))
    kinds = rng.choice(_WORDS).split()
    where = rng.choice((("table",), ("data",), ("table", "data")))
    numbers = rng.choice(((1, 1, 2, 5), (table_size,), (3 * table_size,)))

    def content() -> bytes:
        kind = rng.choice(kinds)
        if kind == "hole":
            return b""
        if kind == "zeros":
            return bytes(cluster_size)
        if kind == "garbage":
            return stamp(99, rng.randrange(1 << 20), cluster_size)
        entries = [rng.randrange(1, 40) * cluster_size if rng.random() < 0.1 else 0 for _ in range(cluster_size // 8)]
        return b"".join(entry.to_bytes(8, "little") for entry in entries)

    def litter(behind: str) -> list[bytes]:
        return [content() for _ in range(rng.choice(numbers))] if behind in where and rng.random() < often else []

    return litter
