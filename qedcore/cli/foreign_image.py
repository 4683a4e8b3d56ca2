"""Images in other formats in chains, as sources and as targets: qemu-img tells of them, and qemu-nbd shows them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from ..backing.foreign import open_foreign
from ..engine.cluster_map import FOUND, NO_CLUSTER, ZERO, Kind
from ..engine.raw import RawImage
from ..engine.source import Source
from ..storage import Storage
from ..storage.cache_mode import cache_mode
from ..storage.qemu_nbd import open_by_qemu
from .creation import new_file
from .locate import Location
from .messages import not_local
from .qemu_img import answer, must_succeed, needed, option_words, run_signed, virtual_size


class ForeignImage:
    """The top image of a chain in another format (Source): `storage` has the guest's view of the whole chain.

    `rows` are those of `qemu-img map`.  What the top image lacks is found in `backing`, by the same view.
    """

    def __init__(self, storage: Storage, rows: Sequence[dict[str, object]], has_backing: bool) -> None:
        self.storage = storage
        self.size = storage.size()  # bytes
        self.backing: Source | None = RawImage(storage) if has_backing else None
        self._starts = [int(str(row["start"])) for row in rows]  # bytes
        self._kinds = [_kind(row) for row in rows]

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        at = bisect_right(self._starts, pos) - 1
        end = self._starts[at + 1] if at + 1 < len(self._starts) else self.size
        return self._kinds[at], pos, min(length, end - pos)

    def data_run(self, pos: int, length: int) -> tuple[bool, int]:
        return True, length

    def close(self) -> None:
        self.storage.close()


def _kind(row: dict[str, object]) -> Kind:
    if row["depth"] or not row.get("present", True):
        return NO_CLUSTER
    return FOUND if row["data"] else ZERO


def open_foreign_image(where: Location, format: str, cache: str | None, force_share: bool) -> ForeignImage:
    """Raises RequestError, UnsupportedError and StorageError."""
    if where.path is None:
        raise not_local(where.name)
    what = f"converting {where.name} ({format})"
    words = [*option_words(f=format, U=force_share), "--", where.path]
    rows = answer("map", words, what)
    has_backing = "backing-filename" in answer("info", words, what)
    info = os.stat(where.path)
    target = os.path.abspath(where.path)
    storage = open_foreign(target, format, cache_mode(cache or "writeback"), (info.st_dev, info.st_ino))
    return ForeignImage(storage, rows, has_backing)


@contextmanager
def new_foreign_image(
    prefix: str, where: Location, size: int, words: Sequence[str], cache: str | None
) -> Iterator[tuple[RawImage, int]]:
    """A new image of `size` bytes over a backing file, as `words` tell qemu-img: (its guest's view, bytes of that).

    Raises QEDError, and ToldError when qemu-img does not make it.
    """
    assert where.path is not None and where.format is not None
    what = f"converting to {where.format}"
    # A VMDK image records its own name, and finds its backing file from where it is.
    made = nullcontext(where.path) if where.format == "vmdk" else new_file(prefix, where, cache=cache)
    with made as place:
        must_succeed(run_signed([needed(what), "create", "-q", "-f", where.format, *words, "--", place, str(size)]))
        facts = answer("info", ["-f", where.format, "--", place], what)
        below = [*option_words(f=facts.get("backing-filename-format")), "--", facts["full-backing-filename"]]
        storage = open_by_qemu(
            where.name, ["--cache=unsafe", "--discard=unmap", "-f", where.format, "--", place], writable=True
        )
        with RawImage(storage, writable=True) as image:
            yield image, virtual_size(below, what)
            image.flush()
