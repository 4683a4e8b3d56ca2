"""Which requests are running: epochs."""

from __future__ import annotations

from qedcore.engine.in_flight import Epoch, InFlight
from unit.fakes import Gate, Job


def test_oldest_request() -> None:
    running = InFlight()
    assert running.oldest() == 0
    come = Gate()

    def work() -> None:
        with running.request():
            come.stop()

    first = Job(work)
    come.reached()
    assert running.advance() == 1
    second = Job(work)
    come.reached()
    assert running.advance() == 2
    assert running.oldest() == 0
    first_over = running.enter()  # of the epoch of now
    come.open(2)
    first.result(), second.result()
    assert running.oldest() == 2
    first_over.pop()
    assert running.oldest() == 2 and not running.now


def test_who_enters_an_epoch_that_is_over_enters_again() -> None:
    """It may have been found empty, and what was freed since is looked up by those of the next one only."""
    running = InFlight()
    late = running.now
    assert running.advance() == running.oldest() == 1  # nobody was seen in it
    late.append(None)
    epoch = running.enter_again(late)
    assert epoch is running.now and not late
    assert running.advance() == 2 and running.oldest() == 1
    epoch.pop()
    assert running.oldest() == 2


def test_entering_notices_that_the_epoch_is_over() -> None:
    class Interrupted(InFlight):
        """Another thread frees something just before the request is in."""

        reads = 0

        @property
        def now(self) -> Epoch:
            found = self._now
            self.reads += 1
            if self.reads == 1:
                self.advance()
            return found

        @now.setter
        def now(self, epoch: Epoch) -> None:
            self._now = epoch

    running = Interrupted()
    with running.request():
        assert running.advance() == 2 and running.oldest() == 1


def test_failed_requests_are_over_too() -> None:
    running = InFlight()
    try:
        with running.request():
            raise KeyError
    except KeyError:
        pass
    assert not running.now


def test_epochs_that_are_over_are_forgotten() -> None:
    running = InFlight()
    for _ in range(100):
        running.advance()
    assert not running._earlier
