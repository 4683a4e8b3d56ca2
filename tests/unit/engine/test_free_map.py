"""The map of free clusters, against a plain model; and which requests are running."""

from __future__ import annotations

import random

from qedcore.engine.free_map import CLEAN, USED, FreeMap
from qedcore.engine.in_flight import Epoch, InFlight
from unit.fakes import Gate, Job


def test_against_a_model(rng: random.Random) -> None:
    free, model = FreeMap(), dict[int, int]()
    space = 20_000  # several chunks
    for _ in range(3000):
        action = rng.random()
        start = rng.randrange(space)
        if action < 0.5:
            n = 0
            while n < rng.choice((1, 3, 9000)) and start + n not in model and start + n < space:
                n += 1
            state = rng.choice((CLEAN, USED))
            free.add(start, n, state)
            model.update((cluster, state) for cluster in range(start, start + n))
        elif action < 0.9:
            wanted = rng.choice((1, 2, 5000))
            found = free.take(wanted)
            if not model:
                assert found is None
                continue
            assert found is not None
            first, n, state = found
            assert first == min(model) and 0 < n <= wanted
            assert all(model.pop(cluster) == state for cluster in range(first, first + n))
            if n < wanted and first % 4096 + n < 4096:
                assert model.get(first + n) != state, "the run goes on"
        else:
            end = start
            assert free.end_of_used(end) == next((c + 1 for c in range(end - 1, -1, -1) if c not in model), 0)
            if action > 0.98:
                free.cut(end)
                model = {cluster: state for cluster, state in model.items() if cluster < end}
        assert free.n == len(model)
    free.clear()
    assert free.take(1) is None and free.n == 0


def test_memory_follows_what_is_free() -> None:
    free = FreeMap()
    for cluster in range(0, 1 << 40, 1 << 36):
        free.add(cluster, 1, CLEAN)
    assert len(free._chunks) == 16
    while free.take(1):
        pass
    assert not free._chunks


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
