"""Sizes as people write them: 64k, 1.5G.  The suffixes count in powers of 1024, as in QEMU and nbdkit."""

from __future__ import annotations

import re

from .errors import RequestError

KiB = 1024  # bytes
MiB = 1024 * KiB
GiB = 1024 * MiB

_SUFFIXES = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}


class SizeRangeError(RequestError):
    """It is a size, but larger than any there can be."""


def parse_size(text: str, name: str = "size") -> int:
    """Bytes.  Raises RequestError, naming `name`, for anything else than a number with an optional suffix."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([bkmgtpe]?)", text.lower(), re.ASCII)
    if match is None:
        raise RequestError(f"{name}={text} is not a size: use a number with an optional suffix k, M, G, T, P or E")
    from fractions import Fraction  # here, because few commands need it

    value = Fraction(match[1]) * 1024 ** _SUFFIXES[match[2]]
    if value >= 2**64:
        raise SizeRangeError(f"{name}={text} is too large: sizes are less than 2^64 bytes")
    return int(value)


def format_size(size: int) -> str:
    """A size in the largest unit that keeps it at 1 or more, with three significant digits, as qemu-img prints it."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def parse_qemu_size(text: str) -> int:
    """Bytes, from what qemu-img takes for a size: also hexadecimal, and after spaces and a plus sign; but no fraction
    without a suffix.

    Raises RequestError without saying which size it was.
    """
    text = text.lstrip().removeprefix("+")
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text, re.ASCII):
        size = int(text, 16)
    elif re.fullmatch(r"[0-9]+\.[0-9]+[bB]?", text, re.ASCII):
        raise RequestError(f"{text} is not a whole number of bytes")
    else:
        return parse_size(text)
    if size >= 2**64:
        raise SizeRangeError(f"{text} is too large: sizes are less than 2^64 bytes")
    return size
