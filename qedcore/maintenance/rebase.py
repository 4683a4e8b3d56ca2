"""Putting an image onto another backing file, or onto none.

I1. The guest's content stays: what the old and the new backing file have differently is copied into the image and
    made durable before the name changes (rebase).  change_name() trusts its caller that there is no difference.
I2. The name changes at once, also in a crash (HeaderUpdater.set_backing), and never makes the image unopenable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from typing import Callable

from ..backing.policy import BackingPolicy
from ..engine.chain import open_source
from ..engine.cluster_map import FOUND, ZERO
from ..engine.image import QEDImage
from ..engine.source import Source, find_run, layers, read_chain
from ..errors import RequestError
from ..format.geometry import DEFAULT_CLUSTER_SIZE, round_up
from ..format.header import HeaderUpdater, place_for_name, read_header
from ..storage import Storage
from ..storage.cache_mode import CacheMode
from ..storage.file_lock import LockedError
from ..storage.open import open_storage
from ..units import MiB

COMPARE_STEP = 1 * MiB  # bytes compared at once, at least one cluster; larger buffers cost more in page faults


class LoopError(RequestError):
    """A backing file that leads back to the image."""

    def __init__(self, name: str | None) -> None:
        super().__init__(f"Backing file '{name}' creates an infinite loop.")


def open_base(
    image: QEDImage,
    path: str,
    format: str | None,
    name: str,
    *,
    cache: str = "writeback",
    opener: Callable[[str, bool, CacheMode], Storage] = open_storage,
    policy: BackingPolicy = BackingPolicy(),
) -> Source:
    """Open the chain that `image`, which is open for writing, is to be put onto: open_source.

    Raises LoopError besides.
    """

    def open_file(path: str, writable: bool, mode: CacheMode) -> Storage:
        try:
            return opener(path, writable, mode)
        except LockedError as error:
            if error.identity == image.storage.identity():  # locked by ourselves
                raise LoopError(name) from None
            raise

    return open_source(path, format, cache=cache, opener=open_file, policy=policy)


def rebase(
    image: QEDImage,
    name: str | None,
    new: Source | None,
    raw: bool = False,
    progress: Callable[[int], None] = lambda pos: None,
) -> None:
    """Put `image` onto the chain `new`, under `name` and with `raw` as in HeaderUpdater.set_backing.

    No other request may be in flight; the image is to be closed next, because it still reads from its old chain.
    `progress` is told guest positions.  Raises RequestError and UnsupportedError before anything is changed: when the
    name does not fit and when the new chain leads back to the image; else QEDError.
    """
    if name:
        place_for_name(image.header, len(os.fsencode(name)))
    if any(layer.storage.identity() == image.storage.identity() for layer in layers(new)):
        raise LoopError(name)
    for kind, pos, data in _differences(image, new, progress):
        if kind is ZERO:
            image.add_zero_clusters(pos, len(data))
        else:
            image.pwrite(data, pos)
    for layer in layers(new):
        layer.storage.flush()  # perhaps just copied: what was found there is relied on from here on
    image.flush()  # the copies, before the name that they stand in for (I1)
    with image.maintenance() as metadata:
        metadata.header.set_backing(name, raw)


def _differences(
    image: QEDImage, new: Source | None, progress: Callable[[int], None]
) -> Iterator[tuple[object, int, memoryview]]:
    """(FOUND or ZERO, pos, old content) of the runs of clusters that are only below the image and differ in `new`."""
    old, size = image.backing, image.geometry.cluster_size
    pos = 0
    while pos < image.size:
        progress(pos)
        kind, _, length = image.lookup(pos, image.size - pos)
        if kind in (FOUND, ZERO):
            pos += length
            continue
        same, n = _same_place(old, new, pos, length)
        if same and n < length:
            n = image.geometry.start_of_cluster(n)
        if not same or not n:
            n = min(round_up(max(n, 1), size), length, max(size, COMPARE_STEP))
            before, after = bytearray(n), bytearray(n)
            read_chain(old, memoryview(before), pos)
            read_chain(new, memoryview(after), pos)
            if before != after:
                yield from _runs(before, after, pos, size)
        pos += n


def _same_place(old: Source | None, new: Source | None, pos: int, length: int) -> tuple[bool, int]:
    """(True, bytes) where the chains cannot differ: zeros, or the same bytes of one file; else (False, bytes)."""
    result, done = False, 0
    while done < length:
        here, at, n = _find_below(old, pos + done, length - done)
        there, other, n = _find_below(new, pos + done, n)
        if here is None or there is None:
            same = here is there
        else:
            # Not the file's bytes on one side and, by another format's name, what it shows a guest on the other.
            same = at == other and here.identity() == there.identity() and type(here) is type(there)
        if done and same is not result:
            break
        result = same
        done += n
        if not same and done >= COMPARE_STEP:
            break  # no more is compared at once
    return result, done


def _find_below(source: Source | None, pos: int, length: int) -> tuple[Storage | None, int, int]:
    """(storage, offset in it, bytes) of the data at pos; None where there are zeros, as in holes of plain files."""
    if source is None:
        return None, 0, length
    _, storage, offset, n = find_run(source, pos, length)
    return storage, offset, n


def _runs(
    before: bytearray, after: bytearray, pos: int, cluster_size: int
) -> Iterator[tuple[object, int, memoryview]]:
    """_differences of one stretch of whole clusters."""
    zeros = bytes(cluster_size)

    def kind_of(at: int) -> object:
        cluster = before[at : at + cluster_size]
        if cluster == after[at : at + cluster_size]:
            return None
        return ZERO if cluster == zeros[: len(cluster)] else FOUND

    kinds = [kind_of(at) for at in range(0, len(before), cluster_size)]
    for i, kind in enumerate(kinds):
        beside = kinds[max(i - 1, 0) : i] + kinds[i + 1 : i + 2]
        if kind is ZERO and cluster_size <= DEFAULT_CLUSTER_SIZE and FOUND in beside and ZERO not in beside:
            kinds[i] = FOUND  # one small cluster: data in one piece are worth more than its space
    start = 0
    for kind, group in groupby(kinds):
        end = start + len(list(group)) * cluster_size
        if kind is not None:
            yield kind, pos + start, memoryview(before)[start:end]
        start = end


def change_name(
    path: str,
    name: str | None,
    raw: bool = False,
    *,
    opener: Callable[[str, bool, CacheMode], Storage] = open_storage,
) -> None:
    """Change the name of the backing file and nothing else; neither the old nor the new one need exist.

    The name may also be one that leads back to the image now, as when files are about to be renamed.
    Raises RequestError when the name does not fit, UnsupportedError, and StorageError.
    """
    storage = opener(path, True, CacheMode())
    try:
        header, _, _ = read_header(storage)
        updater = HeaderUpdater(storage, header)
        if name:
            place_for_name(header, len(os.fsencode(name)))
        updater.clear_unknown_autoclear()
        updater.set_backing(name, raw)
    finally:
        storage.close()
