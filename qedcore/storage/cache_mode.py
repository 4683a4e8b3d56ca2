"""The cache modes of QEMU."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import RequestError


class CacheMode(NamedTuple):
    """A cache mode with QEMU's meaning."""

    direct: bool = False  # past the page cache
    writethrough: bool = False  # every write is flushed before it is answered
    no_flush: bool = False  # flushes are ignored: a crash may lose everything


CACHE_MODES = {
    "writeback": CacheMode(),
    "writethrough": CacheMode(writethrough=True),
    "none": CacheMode(direct=True),
    "directsync": CacheMode(direct=True, writethrough=True),
    "unsafe": CacheMode(no_flush=True),
}


def cache_mode(name: str) -> CacheMode:
    """The mode called `name`; RequestError for any other name."""
    try:
        return CACHE_MODES[name]
    except KeyError:
        raise RequestError(f"cache={name} is not one of {', '.join(CACHE_MODES)}") from None
