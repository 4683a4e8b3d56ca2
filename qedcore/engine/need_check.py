"""The dirty period around allocations: when NEED_CHECK is set, and when it is cleared.

I1. The dirty period: NEED_CHECK is durable before the first metadata change, and is cleared only when everything
    is durable and nothing is in flight; new allocations wait until the cleared header is durable too.
I2. Once a metadata write or a flush has failed, NEED_CHECK stays: the next writable open repairs.
    Not so while a server cannot be reached, or memory is short: nothing is lost then, and the flag is cleared later.
I3. Where nothing locks the image, somebody else may write to it.  Who does so changes the header, which is read again
    when a dirty period begins and ends, and when the file grows; from then on nothing is allocated or freed.
I5. Before the first dirty period all tables were looked at once (census.py).
"""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from typing import Callable

from ..errors import CorruptImageError, ForeignWriterError, QEDError, StorageError, UnreachableError
from ..format.header import FEATURE_NEED_CHECK, HeaderUpdater
from ..locks import Rank, ranked_condition
from ..storage import Storage
from .allocator import Allocator
from .reclaim import Reclaimer

IDLE_SECONDS = 5.0  # QEMU's delay between the last allocation and the clean header


_NOTHING_LOST = (UnreachableError, MemoryError)  # the next attempt may succeed


class NeedCheckGate:
    """The dirty period (I1, I2).  Every allocating request runs inside `with gate:`.

    The condition protects `_dirty`, `_unsure`, `_changing` and `_closed`; it is not held across I/O: `_changing`
    keeps the others waiting.  The gate is opened under it only, but may be shut without, when another writer is
    noticed.
    `inside` and `open` are for requests that must be fast: they do these steps of __enter__() themselves.
    I4. A request that finds the gate open takes no lock: it notes itself in `inside`, then looks at `open`.  Who
        shuts the gate clears `open`, then looks at `inside`.  So one of them sees the other; each step is one call
        or store, atomic under the interpreter's lock.
    `clock` counts seconds.
    """

    def __init__(
        self,
        storage: Storage,
        header: HeaderUpdater,
        allocator: Allocator,
        reclaimer: Reclaimer,
        clock: Callable[[], float],
    ) -> None:
        self._storage = storage
        self._header = header
        self._allocator = allocator
        self._reclaimer = reclaimer
        self._clock = clock
        self._cond = ranked_condition(Rank.GATE)
        self._dirty = header.header.need_check  # NEED_CHECK is set and durable
        self._unsure = False  # not dirty, but NEED_CHECK may be set: an attempt to change it has not ended
        self._changing = False  # a thread is setting or clearing it
        self.open = self._dirty  # dirty, and nobody is changing that
        self.inside: list[None] = []  # an item per allocating request
        self._failed = False  # I4
        self._census: Callable[[], None] | None = None  # taken before anybody is let in
        self._refusal: QEDError | None = None  # why nobody is let in any more: damage, or another writer (I3)
        self._last_use = clock()  # seconds
        self._closed = False
        self._timer: threading.Thread | None = None
        allocator.before_growth = self.refuse_others

    def __enter__(self) -> None:
        self.inside.append(None)
        if not self.open:
            self.inside.pop()
            self._begin()

    def leave(self, *_: object) -> None:
        """The request that is noted in `inside` is over."""
        self._last_use = self._clock()
        self.inside.pop()

    __exit__ = leave

    def expect_census(self, census: Callable[[], None]) -> None:
        """Have `census` look at all tables before anybody is let in; nobody is inside now.

        It raises CorruptImageError if nobody ever may be, and other errors if it should be tried again.
        """
        self._census = census
        self.open = False

    def take_census(self) -> None:
        """Have it taken now, if it was not yet: without a dirty period.  Raises as __enter__."""
        self._begin(enter=False)

    def _begin(self, enter: bool = True) -> None:
        """Take the census, if it is still to be taken; `enter` when the gate is open: begin the dirty period."""
        with self._cond:
            while self._changing:
                self._cond.wait()
            if self._refusal is not None:
                raise type(self._refusal)(str(self._refusal))
            dirty, unsure = self._dirty, self._unsure
            if self._census is None and (dirty or not enter):
                if enter:
                    self.inside.append(None)
                return
            self._changing = True
        try:
            if self._census is not None:
                self._census()
                self._census = None
            if enter and not dirty:
                self.refuse_others()
                self._header.set_features(set=FEATURE_NEED_CHECK)
                # Durable before any metadata change: else a crash could leave changed tables in an image that looks
                # clean, and the next allocation would reuse what they point at.
                self._storage.flush()
        except BaseException as error:
            if isinstance(error, CorruptImageError):
                self._refusal = error
            self._settle(dirty, unsure or (not dirty and isinstance(error, _NOTHING_LOST)))
            raise
        if enter:
            self.inside.append(None)
        self._settle(dirty or enter, unsure and not enter)

    def _settle(self, dirty: bool, unsure: bool = False) -> None:
        with self._cond:
            self._dirty = dirty
            self._unsure = unsure
            self.open = dirty and self._refusal is None and self._census is None
            self._changing = False
            self._last_use = self._clock()
            self._cond.notify_all()

    def _shut(self, idle: float) -> bool:
        """Let nobody in any more, if nobody is inside and has been for `idle` seconds; _settle() ends it."""
        with self._cond:
            was_open = self.open
            if not was_open and not self._unsure or self._changing or self._clock() - self._last_use < idle:
                return False
            self.open = False
            # In this order: who is inside says without a lock that it has failed, and then leaves (I2).  Not with
            # "or", which would look at the list twice.
            self._changing = not self.inside and not self._failed
            if not self._changing:
                self.open = was_open
                if self._refusal is not None:  # somebody inside has noticed meanwhile (I3)
                    self.open = False
            return self._changing

    def fail(self) -> None:
        """A metadata write failed, or an image is damaged: keep NEED_CHECK until it was repaired (I2).

        Takes no lock, because its caller holds a table's: the flag only ever goes up.
        """
        self._failed = True

    def mark_for_check(self) -> None:
        """A flush has failed: set NEED_CHECK for the next writable opening, which then reads from the disk (I2).

        That opening finds the mark in the system's cache, where the mark is needed: it need not be durable.
        """
        self.fail()
        if not self._header.header.need_check:
            with suppress(StorageError):
                self._header.set_features(set=FEATURE_NEED_CHECK)

    def refuse_others(self) -> None:
        """Raises StorageError if somebody else has written to the image, for good (I3)."""
        try:
            self._header.refuse_others(mark=self._dirty)
        except ForeignWriterError as error:
            self._refusal = error
            self.open = False
            self._reclaimer.give_up()
            self.fail()
            raise

    @property
    def refused(self) -> bool:
        """Somebody else was seen to have written to the image (I3)."""
        return self._refusal is not None

    def settled(self) -> None:
        """The flag on disk was cleared, durably, by the repair at open."""
        self._settle(dirty=False)

    def clear(self, idle: float = 0.0) -> bool:
        """Clear NEED_CHECK if nothing was allocated for `idle` seconds; True if it was cleared.

        Raises StorageError; NEED_CHECK then stays on disk, or is set again by the next allocation.
        """
        if not self._shut(idle):
            return False
        dirty, unsure = self._dirty, False  # nobody else changes it now
        try:
            self.refuse_others()
            if self._reclaimer.pending:
                self._reclaimer.flush()
            self._allocator.trim_tail()  # and flush everything that the flag stands for, before the flag
        except BaseException as error:
            if not isinstance(error, _NOTHING_LOST):
                self.fail()
            self._settle(dirty, unsure=not dirty)
            raise
        try:
            self._header.set_features(clear=FEATURE_NEED_CHECK)
            # Durable before the next allocation may set it again: else the set could be lost and the clear kept.
            try:
                self._storage.flush()
            except StorageError as error:
                if not isinstance(error, UnreachableError):
                    self.mark_for_check()
                raise
        except _NOTHING_LOST:
            unsure = True
            raise
        finally:
            self._settle(dirty=False, unsure=unsure)  # after an error the flag may be either: the next period sets it
        return True

    def start_timer(self, report: Callable[[QEDError], None]) -> None:
        """Start the thread that ends idle dirty periods; `report` is told of its errors.  After any fork."""
        assert self._timer is None
        self._timer = threading.Thread(target=self._run_timer, args=(report,), name="need-check", daemon=True)
        self._timer.start()

    def _run_timer(self, report: Callable[[QEDError], None]) -> None:
        while True:
            with self._cond:
                if self._closed:
                    return
                if not (self._dirty or self._unsure) or self._failed:
                    self._cond.wait()
                    continue
                # Not woken by each allocation: it looks again when the oldest possible deadline is over.
                remaining = self._last_use + IDLE_SECONDS - self._clock()
                if self.inside or self._changing or remaining > 0:
                    self._cond.wait(max(remaining, 0.1))
                    continue
            try:
                self.clear(IDLE_SECONDS)
            except QEDError as error:
                report(error)
            except MemoryError:
                report(StorageError("NEED_CHECK stays set: out of memory", code=errno.ENOMEM))

    def close(self) -> None:
        """End the dirty period for good.  Nothing may be in flight.  Raises StorageError (NEED_CHECK then stays)."""
        with self._cond:
            self._closed = True
            self._cond.notify_all()
        if self._timer is not None:
            self._timer.join()
            self._timer = None
        self.clear()
