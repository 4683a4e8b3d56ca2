"""Formats by their first bytes."""

from __future__ import annotations

import pytest

from qedcore.backing.probe import probe
from unit.fakes import MemoryStorage

# First bytes (at offset) -> format.  Written from the formats' own documents, not from the engine's table.
MAGICS: dict[str, tuple[int, bytes, str]] = {
    "qed": (0, b"QED\0", "qed"),
    "qcow2": (0, b"QFI\xfb\0\0\0\3", "qcow2"),
    "qcow": (0, b"QFI\xfb\0\0\0\1", "qcow"),
    "vmdk sparse": (0, b"KDMV", "vmdk"),
    "vmdk ESX": (0, b"COWD", "vmdk"),
    "vmdk descriptor": (0, b"# Disk DescriptorFile\n", "vmdk"),
    "vhdx": (0, b"vhdxfile", "vhdx"),
    "vpc": (0, b"conectix", "vpc"),
    "luks": (0, b"LUKS\xba\xbe\0\2", "luks"),
    "parallels": (0, b"WithoutFreeSpace", "parallels"),
    "parallels ext": (0, b"WithouFreSpacExt", "parallels"),
    "vdi": (64, b"\x7f\x10\xda\xbe", "vdi"),
    "zeros": (0, bytes(16), "raw"),
    "nothing": (0, b"", "raw"),
    "boot sector": (510, b"\x55\xaa", "raw"),
    "QED without its NUL": (0, b"QED1", "raw"),
    "short QED": (0, b"QE", "raw"),
    "magic elsewhere": (1, b"QED\0QFI\xfb", "raw"),
    "vdi magic elsewhere": (0, b"\x7f\x10\xda\xbe", "raw"),
}


@pytest.mark.parametrize("name", MAGICS)
@pytest.mark.parametrize("size", [0, 600])
def test_probe(name: str, size: int) -> None:
    at, magic, want = MAGICS[name]
    data = bytearray(max(size, at + len(magic)))
    data[at : at + len(magic)] = magic
    assert probe(MemoryStorage(bytes(data))) == want
