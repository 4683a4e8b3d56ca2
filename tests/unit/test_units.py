"""Sizes in text."""

from __future__ import annotations

import errno
import random

import pytest
from support.patterns import GiB, KiB, MiB, TiB

from qedcore.errors import RequestError
from qedcore.units import format_size, parse_size

GOOD = {
    "0": 0,
    "1": 1,
    "512b": 512,
    "512B": 512,
    "1k": KiB,
    "64K": 64 * KiB,
    "1.5k": 1536,
    "1.5G": 3 * GiB // 2,
    "0.5b": 0,
    "007": 7,
    "1m": MiB,
    "1M": MiB,
    "2T": 2 * TiB,
    "1p": 1 << 50,
    "1E": 1 << 60,
    "15.5E": 31 << 59,
    "18446744073709551615": 2**64 - 1,
    "18014398509481983.9990234375k": 2**64 - 1,  # exact: no floats on the way
    "9007199254740993": 2**53 + 1,
}
MALFORMED = (
    "", " ", "k", "-1", "+1", "1 k", " 1", "1 ", "1\n", "1kb", "1kib", "1x", "0x10", "1e3", "1_000",
    "1,5k", ".5k", "1.", "1.k", "1..5", "1.5.5", "\u0661", "1\u00b2", "nan", "inf", "None",
)  # fmt: skip
TOO_LARGE = ("16E", "18446744073709551616", "16384P", "9" * 400 + "k", "99999999999E")


@pytest.mark.parametrize("text", GOOD)
def test_parse(text: str) -> None:
    assert parse_size(text) == GOOD[text]


@pytest.mark.parametrize("text", MALFORMED, ids=repr)
def test_malformed(text: str) -> None:
    with pytest.raises(RequestError, match="(?s)cluster_size=.*not a size") as caught:
        parse_size(text, "cluster_size")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("text", TOO_LARGE, ids=lambda text: text[:20])
def test_too_large(text: str) -> None:
    with pytest.raises(RequestError, match="size=.*too large"):
        parse_size(text)


FORMATTED = {
    0: "0 B",
    1: "1 B",
    999: "999 B",
    1000: "0.977 KiB",
    1024: "1 KiB",
    1536: "1.5 KiB",
    64 * KiB: "64 KiB",
    260 * KiB: "260 KiB",
    1000 * KiB: "0.977 MiB",
    MiB: "1 MiB",
    GiB: "1 GiB",
    10 * GiB + 300 * MiB: "10.3 GiB",
    64 * TiB: "64 TiB",
    1 << 60: "1 EiB",
    2**63 - 512: "8 EiB",
}


@pytest.mark.parametrize("size", FORMATTED)
def test_format(size: int) -> None:
    assert format_size(size) == FORMATTED[size]


def test_formatted_sizes_are_close(rng: random.Random) -> None:
    for _ in range(500):
        size = rng.randrange(1 << rng.randrange(1, 63))
        number, unit = format_size(size).split()
        back = float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].index(unit)
        assert abs(back - size) <= 0.005 * size
