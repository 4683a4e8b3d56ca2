"""Images in other formats, which QEMU reads for us."""

from __future__ import annotations

import fcntl
import os
import stat

from ..errors import StorageError, UnsupportedError
from ..storage import Storage
from ..storage.cache_mode import CacheMode
from .probe import PROBE_BYTES

# Formats that QEMU reads without a secret, besides raw and QED.
FOREIGN_FORMATS = ("bochs", "cloop", "dmg", "parallels", "qcow", "qcow2", "vdi", "vhdx", "vmdk", "vpc")


def refers_to_files(storage: Storage, format: str) -> bool:
    """Whether the header of an image in this format names other files, or may: those of vmdk are not read."""
    header = bytearray(PROBE_BYTES)
    storage.pread_into(header, 0)
    if format in ("qcow", "qcow2"):
        version, backing = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:16], "big")
        return backing != 0 or (version >= 3 and bool(header[79] & 4))  # incompatible feature: data file
    return format == "vmdk"


def open_foreign(
    target: str, format: str, mode: CacheMode, identity: object, confined: str | None = None, name: str | None = None
) -> Storage:
    """The guest's view of an image in another format, through qemu-nbd: `target` names it to QEMU.

    With `confined`, the path of that very file, QEMU opens nothing but this.  Raises StorageError, UnsupportedError.
    """
    from ..storage.qemu_nbd import open_by_qemu

    words = ["--cache=none"] if mode.direct else []
    name = name or target
    if confined is None:
        return open_by_qemu(name, [*words, "-f", format, "--", target], identity)
    fd = _open_same(confined, identity)
    driver = "file" if stat.S_ISREG(os.fstat(fd).st_mode) else "host_device"
    opened = f'{{"driver":"{driver}","filename":"/proc/self/fd/{fd}"}}'
    return open_by_qemu(name, [*words, f'json:{{"driver":"{format}","backing":null,"file":{opened}}}'], identity, fd)


def _open_same(path: str, identity: object) -> int:
    """A descriptor of the file at `path`, which must have this identity; the low ones are left for a child's use."""
    try:
        low = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(low)
            if identity != (info.st_dev, info.st_ino):
                raise UnsupportedError(f"{path} is being replaced")
            return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10)
        finally:
            os.close(low)
    except OSError as error:
        raise StorageError(f"cannot open {path}", error) from None
