"""What a guest may find: in each sector, values of writes that nothing newer has replaced for certain.

crash:  a write that began after another had ended, and which a later flush or FUA covers, replaces it    P1, P2
kill:   a write that began after another had ended, and which was answered, replaces it                   P3
read:   as after a kill when the read begins, and what was written meanwhile
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

SECTOR = 512  # bytes
_NEVER = 1 << 62


class Write:
    """A write of whole sectors; times are counted by the model."""

    def __init__(self, began: int, values: dict[int, bytes], certain: bool) -> None:
        self.began = began
        self.ended = _NEVER
        self.values = values  # sector -> content
        self.certain = certain  # False: it may do nothing in some of them


Choice = tuple[bytes, Write]


class Violation(AssertionError):
    """A promise was broken."""


class Read(NamedTuple):
    """A read under way."""

    sectors: range
    began: int
    before: list[list[Choice]]  # what each sector may have shown then


class GuestModel:
    """`initial(sector)` is what a sector may hold before the first write, of `size` sectors.  One thread at a time.

    Writes are known by their number.
    """

    def __init__(self, initial: Callable[[int], Sequence[bytes]], size: int) -> None:
        self._initial = initial
        self._size = size
        self._clock = 0
        self._before = Write(-1, {}, True)
        self._before.ended = 0
        self._writes: list[Write] = []
        self._undurable: list[Write] = []
        self.after_crash: dict[int, list[Choice]] = {}
        self.after_kill: dict[int, list[Choice]] = {}

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def watch(self, sectors: Iterable[int]) -> None:
        """Also look at these, which nobody may write."""
        for sector in sectors:
            if sector not in self.after_crash and 0 <= sector < self._size:
                self.after_crash[sector] = [(value, self._before) for value in self._initial(sector)]
                self.after_kill[sector] = list(self.after_crash[sector])

    def begin(self, first: int, data: bytes, certain: bool = True) -> int:
        """A write is issued; if not `certain` it may do nothing in some sectors."""
        values = {first + i: data[i * SECTOR : (i + 1) * SECTOR] for i in range(len(data) // SECTOR)}
        self.watch(range(first - 1, first + len(values) + 1))  # with its neighbours
        write = Write(self._tick(), values, certain)
        self._writes.append(write)
        self._undurable.append(write)
        for sector, value in values.items():
            self.after_crash[sector].append((value, write))
            self.after_kill[sector].append((value, write))
        return len(self._writes) - 1

    def end(self, number: int) -> None:
        write = self._writes[number]
        write.ended = self._tick()
        if write.certain:
            self._replace(self.after_kill, write)

    def fail(self, number: int) -> None:
        """A write ended with an error: it was done in some of its sectors, or in none."""
        write = self._writes[number]
        write.ended = self._tick()
        write.certain = False

    def lose(self) -> None:
        """The image is opened again after a failed flush: what is not durable may be lost, also without a crash."""
        for write in self._undurable:
            write.certain = False
            for sector in write.values:
                shown = self.after_kill[sector]
                shown += [choice for choice in self.after_crash[sector] if choice not in shown]

    def lose_by_server(self) -> None:
        """The server of the file is gone, with some of what is not durable; whoever wrote it will write it again.

        Until then, the death of that program shows it.
        """
        for write in self._undurable:
            for sector in write.values:
                shown = self.after_kill[sector]
                shown += [choice for choice in self.after_crash[sector] if choice not in shown]

    def begin_flush(self) -> int:
        return self._tick()

    def end_flush(self, began: int) -> None:
        """What had ended when the flush began is durable."""
        for write in self._undurable:
            if write.ended < began and write.certain:
                self._replace(self.after_crash, write)
                self._replace(self.after_kill, write)
        self._undurable = [write for write in self._undurable if write.ended >= began]

    def end_fua(self, number: int) -> None:
        """The end of a write that is durable, with all that had ended when it began."""
        write = self._writes[number]
        self.end(number)
        self.end_flush(write.began)
        self._undurable.remove(write)
        if write.certain:
            self._replace(self.after_crash, write)

    def settle(self, number: int, found: bytes, durable: bool = False) -> None:
        """An uncertain write is over, nothing else wrote there, and this is what is there now."""
        write = self._writes[number]
        for i, sector in enumerate(list(write.values)):
            if found[i * SECTOR : (i + 1) * SECTOR] != write.values[sector]:  # it did nothing there
                for choices in (self.after_crash, self.after_kill):
                    choices[sector] = [choice for choice in choices[sector] if choice[1] is not write]
                del write.values[sector]
        write.certain = True
        self._replace(self.after_kill, write)
        if durable:
            self._replace(self.after_crash, write)

    def alone(self, number: int) -> bool:
        """No other write touched its sectors since it began, or was under way then."""
        write = self._writes[number]
        return not any(
            other is not write and other.ended > write.began
            for sector in write.values
            for _, other in self.after_kill[sector]
        )

    @staticmethod
    def _replace(choices: dict[int, list[Choice]], write: Write) -> None:
        for sector in write.values:
            choices[sector] = [choice for choice in choices[sector] if choice[1].ended >= write.began]

    def begin_read(self, sectors: range) -> Read:
        self.watch(sectors)
        return Read(sectors, self._clock, [list(self.after_kill[sector]) for sector in sectors])

    def check_read(self, read: Read, found: bytes) -> None:
        """A read is over.  Raises Violation."""
        late = [write for write in self._writes if write.began > read.began]
        for i, sector in enumerate(read.sectors):
            value = found[i * SECTOR : (i + 1) * SECTOR]
            if any(value == choice for choice, _ in read.before[i]):
                continue
            if not any(value == write.values.get(sector) for write in late):
                raise Violation(f"a read of sector {sector} gave {value[:8].hex()}, which it may not")
