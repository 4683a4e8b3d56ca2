"""Many requests in flight on one libnbd handle, and which of them were acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from support.patterns import Op, Reader, stamp
from support.server import disconnect, import_nbd


class Flight:
    """Issues ops without waiting; acked and failed tell their fate. One thread per Flight."""

    def __init__(self, client: Any) -> None:
        self.nbd = import_nbd()
        self.client = client
        self.acked: list[Op] = []
        self.failed: list[tuple[Op, int]] = []
        self._buffers: list[Any] = []

    def issue(self, ops: Iterable[Op]) -> None:
        for op in ops:
            done = self._completion(op)
            if op.kind == "zero":
                self.client.aio_zero(op.length, op.pos, completion=done)
            elif op.kind == "flush":
                self.client.aio_flush(completion=done)
            else:
                buffer = bytearray(op.data)  # libnbd 1.14 never frees an nbd.Buffer
                self._buffers.append(buffer)  # must live until the request completes
                self.client.aio_pwrite(buffer, op.pos, completion=done)

    def _completion(self, op: Op) -> Callable[[Any], int]:
        def done(error: Any) -> int:  # a ctypes integer
            if error.value:
                self.failed.append((op, error.value))
            else:
                self.acked.append(op)
            return 1  # retire the command

        return done

    def poll_until(self, condition: Callable[[], bool]) -> None:
        """Run the connection until condition holds or the server is gone."""
        while not condition() and not self.gone():
            try:
                self.client.poll(10_000)
            except self.nbd.Error:
                return

    def gone(self) -> bool:
        return bool(self.client.aio_is_dead() or self.client.aio_is_closed())

    def close(self) -> None:
        """Disconnect; nbdkit waits for idle clients to do so before it exits."""
        if self.client is not None and not self.gone():
            disconnect(self.client)

    def abandon(self) -> None:
        """Drop the connection without a word, whatever is in flight."""
        self.client = None

    def drain(self) -> None:
        self.poll_until(lambda: self.client.aio_in_flight() == 0)


def check_fates(flight: Flight, ops: Iterable[Op], read: Reader, before: Reader) -> None:
    """Disjoint writes: acknowledged ones are there; of any other, each sector is old or new."""
    acked = set(flight.acked)
    for op in ops:
        got = read(op.pos, op.length)
        new = stamp(op.tag, op.pos, op.length)
        if op in acked:
            assert got == new, f"acknowledged write at {op.pos:#x} is lost"
            continue
        old = before(op.pos, op.length)
        for at in range(0, op.length, 512):
            sector = slice(at, at + 512)
            assert got[sector] in (new[sector], old[sector]), f"neither old nor new at {op.pos + at:#x}"
