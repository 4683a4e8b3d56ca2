"""Changing the size of the guest device.

I1. What a grown device shows past its old end is zeros: nothing that a backing file has there, and nothing that the
    image itself had there before it was shrunk.
I2. A crash leaves the old size with the old content, or the new size with the new content.
"""

from __future__ import annotations

from ..engine.cluster_map import FOUND
from ..engine.image import Metadata, QEDImage
from ..format.geometry import check_device_size
from .compact import clear_past_end, pack
from .layout import Layout


def resize(image: QEDImage, size: int) -> None:
    """Make the device `size` bytes long.  No request may be in flight.

    Data past the new end is lost, and the file gets shorter by it.  The present size finishes a shrink that was
    interrupted.  Raises ImageFormatError for a size that the
    format does not allow, CorruptImageError if the image is too damaged to free clusters, both before anything is
    changed, UnsupportedError and StorageError.
    """
    image.geometry.check_image_size(size)
    check_device_size(size)
    with image.maintenance() as metadata:
        if size > image.size:
            _grow(metadata, size)
        else:
            _shrink(metadata, size)


def _grow(metadata: Metadata, size: int) -> None:
    storage, requests, old_size = metadata.storage, metadata.requests, metadata.requests.size
    if clear_past_end(metadata, old_size, only_look=True):
        Layout(metadata)  # refuses a damaged image
        clear_past_end(metadata, old_size)
        storage.flush()  # the entries, before their clusters are used for something else
        pack(metadata)
    # In memory the device grows first, so that requests can prepare what the header then reveals.
    requests.size = size
    try:
        metadata.reload()
        requests.zero(old_size, size - old_size)
        storage.flush()  # the zeros before the size that shows them (I1)
        metadata.header.set_image_size(size)
        storage.flush()
    except BaseException:
        requests.size = old_size
        raise


def _shrink(metadata: Metadata, size: int) -> None:
    storage = metadata.storage
    Layout(metadata)  # refuses a damaged image
    metadata.header.set_image_size(size)
    # The size before what is behind it goes (I2).  A crash leaves leftovers there, for the next resize to clear.
    storage.flush()
    _zero_tail(metadata, size)
    clear_past_end(metadata, size)
    storage.flush()  # the entries, before their clusters are used for something else
    metadata.requests.size = size
    pack(metadata)


def _zero_tail(metadata: Metadata, size: int) -> None:
    """Let the rest of the last cluster, past the end of the device, be zeros."""
    into = size & metadata.geometry.cluster_mask
    if into:
        kind, offset, n = metadata.clusters.lookup(size, metadata.geometry.cluster_size - into)
        if kind is FOUND:
            storage = metadata.storage
            storage.pwrite(bytes(n), offset)
