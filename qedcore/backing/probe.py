"""The format of a file, by its first bytes."""

from __future__ import annotations

from ..storage import Storage

PROBE_BYTES = 512

# (offset of the magic in the file, magic, name), for formats that must not be mistaken for raw.
_MAGICS = (
    (0, b"QED\0", "qed"),
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)


def probe(storage: Storage) -> str:
    """The format of a file by its first bytes: "qed", "raw" or another format's name."""
    data = bytearray(PROBE_BYTES)
    storage.pread_into(data, 0)
    for offset, magic, name in _MAGICS:
        if data[offset : offset + len(magic)] == magic:
            return name
    return "raw"
