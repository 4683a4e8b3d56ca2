"""Session: the connections to one server, all made anew when one of them is lost.

A server that lets clients share an export (multi-conn: a flush on one connection covers what was answered on all)
gets as many connections as requests run at once, one for each: to wait in libnbd takes one hand-over of the
interpreter.  They are made when they are wanted, so there are never more than threads that use them.  Any other
server gets one connection with all requests in flight on it.

    idle:  |link|link|link| <-- the last one that was given back is taken first, so that few are used
    a request:  take one, or make another, or wait;  send, wait for the answer;  give it back

I1. A link of a shared export serves one request at a time.
I2. Once one link is lost, none is taken any more (`lost`).
"""

from __future__ import annotations

import threading
from typing import Callable

from ..locks import Rank, ranked_condition
from ..units import KiB
from .nbd_link import Link, LinkLost, Request

MOST_LINKS = 8  # more were no faster, and a server may have threads for each
_COPIED = 64 * KiB  # bytes of a read up to which a copy costs less than the other way
_MORE_SECONDS = 1.0  # for another connection: a server may have a limit, and let further clients wait


class Session:
    """Owns its links.  `more` makes another one within some seconds, or raises LinkLost."""

    def __init__(self, first: Link, more: Callable[[float], Link] | None) -> None:
        self._first = first
        self.lost = False
        self._more = more
        self._most = MOST_LINKS
        self._cond = ranked_condition(Rank.STORAGE)  # protects what follows; not held across I/O
        self._links = [first]
        self._idle = [first]  # taken and given back without the lock: each is one step
        self._waiting = 0  # threads that wait for an idle one
        self._making = False  # a thread makes another one
        self._closed = False

    def call(self, request: Request) -> None:
        """Carry out a request.  Raises OSError with the server's errno, or LinkLost."""
        if self._more is None:
            return self._first.call(request.submit)
        link = self._take()
        try:
            # Only a thread that waits in Python can be interrupted: the main thread, by a signal.
            if request.size > _COPIED or threading.get_ident() == threading.main_thread().ident:
                link.call(request.submit)
            else:
                link.run(request.run)
        except LinkLost:
            self.lost = True
            raise
        finally:
            self._give_back(link)

    def _take(self) -> Link:
        """A link for one request.  Raises LinkLost."""
        try:
            if not self.lost:
                return self._idle.pop()
        except IndexError:
            pass
        with self._cond:
            self._waiting += 1  # before it looks: whoever gives one back looks in the other order
            try:
                while not self.lost:
                    if self._idle:
                        return self._idle.pop()
                    if not self._making and len(self._links) < self._most:
                        self._making = True
                        break
                    self._cond.wait()
                else:
                    raise LinkLost("another connection was lost")
            finally:
                self._waiting -= 1
        return self._make()

    def _make(self) -> Link:
        assert self._more is not None
        link = None
        try:
            link = self._more(_MORE_SECONDS)
        except LinkLost:
            pass  # it takes no more clients
        finally:
            with self._cond:
                self._making = False
                if link is None:
                    self._most = len(self._links)
                else:
                    self._links.append(link)
                self._cond.notify_all()
        if link is None:
            return self._take()
        if self.lost:
            self._give_back(link)
            raise LinkLost("another connection was lost")
        return link

    def _give_back(self, link: Link) -> None:
        self._idle.append(link)
        if self._waiting or self.lost:
            with self._cond:
                self._cond.notify_all()
            if self._closed:
                self._close_idle()

    def drain(self, seconds: float) -> None:
        """It is lost: return when no request is on its way any more.

        What a link still answers the server does not carry out later, over what comes with the next session.  After
        some seconds the connections are broken.
        """
        if self._more is None:
            return
        with self._cond:
            if not self._cond.wait_for(self._is_idle, seconds):
                for link in self._links:
                    link.cut()
                self._cond.wait_for(self._is_idle, seconds)

    def _is_idle(self) -> bool:
        return len(self._idle) == len(self._links) and not self._making

    def close(self) -> None:
        """Leave the server, once the requests in flight are answered.  A second call does nothing."""
        if self._more is None:
            self._first.close()
            return
        with self._cond:
            self._closed = self.lost = True
            self._cond.notify_all()
        self._close_idle()

    def _close_idle(self) -> None:
        """Each is taken first: another thread may be about to."""
        while True:
            try:
                link = self._idle.pop()
            except IndexError:
                return
            with self._cond:
                self._links.remove(link)
                self._cond.notify_all()
            link.close()
