"""Filling the holes that freeing and crashes have left in a file, when it is closed: if that is little work.

Whoever wants to open the image waits for it, hence the limits of tidying.  What is beyond them stays free inside the
file: the next writable opening uses it again, and `qed check -r leaks` gives it back.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Callable

from ..engine.image import QEDImage
from ..units import MiB
from .compact import Arrangement
from .layout import Layout, LimitError
from .move import NoSpaceError

# The limits of tidying; each is good for about a second.
TIDY_BYTES = 256 * MiB  # moved at most
TIDY_CLUSTERS = 1 << 20  # in use at most, 64 GiB at the default geometry: where each of them is has to be known
TIDY_TABLE_BYTES = 64 * MiB  # of tables read for that, at most; holes in them are not read


def tidy(image: QEDImage, stop: Callable[[], bool] = lambda: False) -> int:
    """Before closing: fill the holes in the file from its end, within the limits of tidying.

    Returns the clusters that stay free inside the file.  `stop` is asked now and then whether to leave the rest.
    No request may be in flight.  Raises CorruptImageError before anything is changed, StorageError and MemoryError.
    """
    small = image.storage.size() >> image.geometry.l2_shift <= TIDY_CLUSTERS
    holes = image.holes(search=small)
    if not holes or stop() or image.storage.in_doubt(0, image.storage.size()):
        return holes  # of those in doubt, nobody knows what will be written there
    try:
        layout = Layout(image.metadata(), max_bytes=TIDY_TABLE_BYTES, max_units=TIDY_CLUSTERS)
    except LimitError:
        return holes
    if len(layout.strays()) << image.geometry.l2_shift > TIDY_BYTES:
        return holes
    with image.maintenance() as metadata:
        arrangement = Arrangement(metadata, layout)
        with suppress(NoSpaceError):  # the rest stays where it is
            arrangement.pack(tables=False, stop=stop)
        arrangement.cut()
        metadata.reload()
    return layout.end() - layout.used
