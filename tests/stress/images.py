"""Images for the stress tests, and what must hold for them at the end."""

from __future__ import annotations

from pathlib import Path

from support import qemu
from support.qed_image import assert_sound

import qedcore


def make_image(directory: Path, cluster_size: int, table_size: int, size: int, base: bytes) -> Path:
    """An empty image, over a raw backing file with the content `base` unless that is empty."""
    if base:
        (directory / "base.raw").write_bytes(base)
    path = directory / "image.qed"
    qedcore.create(
        path,
        size,
        cluster_size=cluster_size,
        table_size=table_size,
        backing_file="base.raw" if base else None,
        backing_fmt="raw",
    )
    return path


def verify_metadata(path: Path, table_size: int) -> None:
    assert_sound(path)
    if table_size > 1:  # else QEMU cannot open it
        qemu.assert_check_clean(path)
