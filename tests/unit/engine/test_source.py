"""Chains: which layer has the bytes, and what is read where none has."""

from __future__ import annotations

import pytest
from support.patterns import stamp

from qedcore.engine.cluster_map import FOUND, NO_CLUSTER, ZERO, Kind
from qedcore.engine.source import ZEROS, fill_zeros, find_data, find_layer, find_zeros, layers, read_chain
from unit.fakes import MemoryStorage

UNIT = 10  # bytes that one letter stands for


class Layer:
    """A source with a letter per unit: D data, H a hole of a plain file, Z zeros, - whatever is below."""

    def __init__(self, tag: int, layout: str, backing: Layer | None = None) -> None:
        self.size = len(layout) * UNIT
        self.backing = backing
        self.data = stamp(tag, 0, self.size)
        self.storage = MemoryStorage(bytes(1000) + self.data)
        self._layout = layout

    def _run(self, pos: int, length: int) -> tuple[str, int]:
        first = pos // UNIT
        rest = self._layout[first:]
        n = len(rest) - len(rest.lstrip(rest[0]))
        return rest[0], min(length, (first + n) * UNIT - pos)

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        letter, n = self._run(pos, length)
        return ({"Z": ZERO, "-": NO_CLUSTER}.get(letter, FOUND), 1000 + pos, n)

    def data_run(self, pos: int, length: int) -> tuple[bool, int]:
        letter, n = self._run(pos, length)
        return letter == "D", n


@pytest.fixture
def top() -> Layer:
    """What a guest sees of it: data of tag 1, of 2, of 3, zeros (1's), nothing, a hole, then past all of them."""
    return Layer(1, "D--Z----", Layer(2, "-D-D-", Layer(3, "DDDDDH")))


def test_layers(top: Layer) -> None:
    assert [layer.size for layer in layers(top)] == [80, 50, 60]
    assert list(layers(None)) == []


def test_who_has_the_bytes(top: Layer) -> None:
    second = top.backing
    assert second is not None
    assert find_layer(top, 3, 100) == (top, 1003, 7)
    assert find_layer(top, 10, 100) == (second, 1010, 10)
    assert find_layer(top, 25, 3) == (second.backing, 1025, 3)
    assert find_layer(top, 30, 100) == (None, 0, 10)  # a zero cluster hides what is below it
    assert find_layer(top, 50, 7) == (None, 0, 7)  # behind the end of 2, which hides the rest of 3
    assert find_data(top, 10, 100) == (second.storage, 1010, 10)
    assert find_data(top, 30, 100) == (None, 0, 10)


def test_zeros_of_the_kinds() -> None:
    plain = Layer(3, "DHD")
    assert find_zeros(Layer(1, "Z--", plain), 0, 30) == (ZERO, 10)
    assert find_zeros(Layer(1, "Z--", plain), 10, 20) == (ZERO, 10)  # a hole
    assert find_zeros(Layer(1, "Z--", plain), 20, 10) == (FOUND, 10)
    assert find_zeros(None, 5, 3) == (ZERO, 3)


def test_what_is_read(top: Layer) -> None:
    second = top.backing
    assert second is not None and second.backing is not None
    third = second.backing
    want = top.data[:10] + second.data[10:20] + third.data[20:30] + bytes(10) + third.data[40:50] + bytes(50)
    for pos in range(0, 100, 7):
        for length in (1, 10, 29, 100 - pos):
            buf = bytearray(b"?" * length)
            read_chain(top, memoryview(buf), pos)
            assert buf == want[pos : pos + length].ljust(length, b"\0")


@pytest.mark.parametrize("length", [0, 1, len(ZEROS), 2 * len(ZEROS) + 1])
def test_fill_zeros(length: int) -> None:
    buf = bytearray(b"?" * (length + 1))
    fill_zeros(memoryview(buf)[:length])
    assert buf == bytes(length) + b"?"
