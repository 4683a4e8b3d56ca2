"""A chain of images, from the top down: which layer has the bytes, and reading them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..storage import ZEROS, Storage
from .cluster_map import FOUND, NO_CLUSTER, ZERO, Kind


def fill_zeros(view: memoryview) -> None:
    while view:
        n = min(len(view), len(ZEROS))
        view[:n] = ZEROS[:n]
        view = view[n:]


class Source(Protocol):
    """A layer of a backing chain: where bytes are, and what lies below."""

    size: int  # bytes
    storage: Storage
    backing: Source | None

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        """The run at pos, as ClusterMap.lookup gives it."""
        ...

    def data_run(self, pos: int, length: int) -> tuple[bool, int]:
        """(it may have data, bytes) of the first part of a FOUND run: what is no data is zeros."""
        ...


def layers(source: Source | None) -> Iterator[Source]:
    """A chain, from `source` down."""
    while source is not None:
        yield source
        source = source.backing


def find_layer(layer: Source | None, pos: int, length: int) -> tuple[Source | None, int, int]:
    """Who has the bytes at pos, from `layer` down: (layer, offset in its storage, bytes); (None, 0, bytes) for zeros.

    A loop, not a recursion: a chain may be longer than Python's stack.
    """
    while layer is not None and pos < layer.size:
        kind, offset, length = layer.lookup(pos, min(length, layer.size - pos))
        if kind is FOUND:
            return layer, offset, length
        if kind is ZERO:
            break
        layer = layer.backing
    return None, 0, length


def find_data(layer: Source | None, pos: int, length: int) -> tuple[Storage | None, int, int]:
    """Where the bytes at pos are: (storage, offset in it, bytes), or (None, 0, bytes) for zeros."""
    found, offset, length = find_layer(layer, pos, length)
    return None if found is None else found.storage, offset, length


def find_zeros(layer: Source | None, pos: int, length: int) -> tuple[Kind, int]:
    """(FOUND or ZERO, bytes) of the run at pos; holes of plain files are zeros, too."""
    found, _, length = find_layer(layer, pos, length)
    if found is None:
        return ZERO, length
    has_data, length = found.data_run(pos, length)
    return FOUND if has_data else ZERO, length


def find_run(
    top: Source, pos: int, length: int, above: Source | None = None
) -> tuple[Kind, Storage | None, int, int]:
    """What `top`, and what is below it, have at pos: (kind, storage, offset in it, bytes).

    FOUND is data in that storage; holes of plain files are ZERO, too.  With `above`, a layer of the chain, only what
    hides that one is looked at: NO_CLUSTER where nothing does.  Raises CorruptImageError and StorageError.
    """
    layer: Source | None = top
    while layer is not None and layer is not above:
        if pos >= layer.size:
            return ZERO, None, 0, length  # a shorter layer: zeros past its end
        kind, offset, length = layer.lookup(pos, min(length, layer.size - pos))
        if kind is FOUND:
            has_data, length = layer.data_run(pos, length)
            return (FOUND, layer.storage, offset, length) if has_data else (ZERO, None, 0, length)
        if kind is ZERO:
            return ZERO, None, 0, length
        layer = layer.backing
    return (ZERO if above is None else NO_CLUSTER), None, 0, length


def read_chain(layer: Source | None, view: memoryview, pos: int) -> None:
    """Fill `view` from `layer` and what is below it; past the end of each layer there are zeros."""
    while view:
        storage, offset, n = find_data(layer, pos, len(view))
        if storage is None:
            fill_zeros(view[:n])
        else:
            storage.pread_into(view[:n], offset)
        view = view[n:]
        pos += n
