"""Prefetching: what NBD's cache request asks for."""

from __future__ import annotations

from .source import Source, find_data


def prefetch(source: Source, pos: int, length: int) -> None:
    """Have the system read what guest positions [pos, pos + length) need, wherever in the chain it is.

    Waits for tables only, never for data.  A hint: storages without a cache to fill ignore it.
    Raises CorruptImageError and StorageError where a table cannot be read.
    """
    while length:
        storage, offset, n = find_data(source, pos, length)
        if storage is not None:
            storage.prefetch(offset, n)
        pos += n
        length -= n
