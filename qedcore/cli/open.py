"""Opening images and their files, locked; what goes wrong is told in qemu-img's words."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..backing.policy import BackingPolicy
from ..errors import ImageFormatError, NotQEDError, QEDError, RequestError, StorageError
from ..format.header import read_header
from ..storage import Storage
from ..storage.cache_mode import CacheMode, cache_mode
from ..storage.file_lock import Locking
from ..storage.open import is_uri, open_storage
from ..storage.open import open_file as open_local
from .locate import Location, find_format
from .messages import PROGRAM, not_local, notice, open_reason

if TYPE_CHECKING:
    from ..engine.image import QEDImage
    from .images import EndPoint

# What qemu-img does with the names in images.
POLICY = BackingPolicy(follow="any", format="probe")

_tracing: dict[str, Any] = {}  # options for chain.open_image


def trace(text: str) -> None:
    """Print the events in `text` (see TraceSelection) of all images opened from now on.  Raises RequestError."""
    from ..trace import TraceSelection

    selection = TraceSelection(text.partition("=")[2] or text, lambda line: print(line, file=sys.stderr))
    _tracing.update(trace=selection, trace_dialect=selection.dialect)


def open_qed(
    where: Location,
    writable: bool = False,
    *,
    cache: str | None = None,
    force_share: bool = False,
    advise: bool = True,
    **options: Any,
) -> QEDImage:
    """Open a QED image and its backing files; `options` go to chain.open_image.

    Raises QEDError with qemu-img's message: Could not open 'NAME': ...; with `advise` a second line may tell what to
    do.
    """
    if where.place is None:
        raise not_local(where.name)
    from ..library import open_image  # here and below, because not all commands should wait for these

    options = {"log": notice, "policy": POLICY, **_tracing, **options}
    opened: list[str] = []

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        locking = Locking.AUTO if opened else where.locking
        opened.append(path)
        if is_uri(path):
            storage = open_storage(path, writable, mode)
        else:
            storage = open_local(path, writable, mode, locking=locking, share=force_share)
        if writable:
            _written.append(path)  # only now: what others use is not ours to tell of
        return storage

    try:
        image: QEDImage = open_image(where.place, writable, cache=cache or "writeback", opener=opener, **options)
        return image
    except QEDError as error:
        reason = open_reason(error, opened[-1] if opened else where.place)
        if len(opened) > 1:
            reason = f"Could not open backing file: {reason}"
        elif (
            advise and isinstance(error, ImageFormatError) and not isinstance(error, NotQEDError) and PROGRAM == "qed"
        ):
            reason += "\nqed: 'qed check -r all' repairs what it can; 'qed salvage' rescues what is left"
        raise RequestError(f"Could not open '{where.name}': {reason}") from error


def open_end_point(
    where: Location, writable: bool = False, *, cache: str | None = None, force_share: bool = False
) -> EndPoint:
    """Open a QED image or a raw file, as find_format tells.  Raises QEDError with qemu-img's message."""
    if find_format(where) == "qed":
        return open_qed(where, writable, cache=cache, force_share=force_share)
    from ..engine.raw import RawImage
    from ..format.geometry import SECTOR, round_up

    storage = open_file(where, writable, cache=cache, force_share=force_share)
    try:
        image = RawImage(storage, writable=writable)
        image.size = round_up(image.size, SECTOR)  # as in QEMU; what the file lacks of the last sector is zeros
        return image
    except StorageError:
        storage.close()
        raise


def open_file(
    where: Location, writable: bool = False, *, cache: str | None = None, force_share: bool = False
) -> Storage:
    """Open the file of an image by itself, and lock it; or an export.

    Raises RequestError with qemu-img's message.
    """
    assert where.place is not None
    try:
        mode = cache_mode(cache or "writeback")
        if where.path is None:
            return open_storage(where.place, writable, mode)
        return open_local(where.path, writable, mode, locking=where.locking, share=force_share)
    except StorageError as error:
        raise RequestError(f"Could not open '{where.name}': {open_reason(error, where.place)}") from error


_written: list[str] = []  # paths of all that open_qed has opened for writing


def to_be_checked() -> str | None:
    """The path of an image that the command has left so when it was interrupted, or failed."""
    while _written:
        path = _written.pop(0)  # it is told once
        with suppress(QEDError):
            storage = open_storage(path, writable=False)
            try:
                if read_header(storage)[0].need_check:
                    return path
            finally:
                storage.close()
    return None
