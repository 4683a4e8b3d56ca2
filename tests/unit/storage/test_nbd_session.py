"""Session with links that know who uses them: one at a time, none after it was closed, each closed once."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qedcore.storage import nbd_session
from qedcore.storage.nbd_link import LinkLost
from qedcore.storage.nbd_session import Session
from unit.fakes import Gate, Job


class FakeLink:
    """Serves requests by calling them; raises LinkLost once it is `lost`."""

    def __init__(self) -> None:
        self.users = 0
        self.served = 0
        self.closed = 0
        self.lost = False
        self.was_cut = threading.Event()

    def run(self, work: Any) -> None:
        self.users += 1
        assert self.users == 1 and not self.closed
        try:
            if self.lost:
                raise LinkLost
            work(self)
            self.served += 1
        finally:
            assert self.users == 1 and not self.closed
            self.users -= 1

    call = run

    def close(self) -> None:
        assert not self.users
        self.closed += 1

    def cut(self) -> None:
        self.lost = True
        self.was_cut.set()


class Work:
    """A request that calls `work` with the link."""

    size = 0

    def __init__(self, work: Any = lambda link: None) -> None:
        self.run = self.submit = work


class Links:
    """Makes a session's links."""

    def __init__(self, shared: bool = True) -> None:
        self.made = [FakeLink()]
        self.fail = False
        self.session = Session(self.made[0], self.more if shared else None)  # type: ignore[arg-type]

    def more(self, seconds: float) -> Any:
        if self.fail:
            raise LinkLost("it takes no more clients")
        self.made.append(FakeLink())
        return self.made[-1]


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_the_last_one_given_back_is_taken_first() -> None:
    links, gate = Links(), Gate()
    jobs = [Job(links.session.call, Work(lambda link: gate.stop())) for _ in range(3)]
    gate.reached(3)
    gate.open(3)
    for job in jobs:
        job.result()
    assert len(links.made) == 3
    for _ in range(10):
        links.session.call(Work())
    assert sorted(link.served for link in links.made) == [1, 1, 11]


def test_one_link_for_all_is_not_closed_under_a_request() -> None:
    """It counts by itself who uses it (Link.close)."""
    links = Links(shared=False)
    links.session.call(Work())
    links.session.drain(0)
    links.session.close()
    assert [link.closed for link in links.made] == [1]


def test_no_more_links_after_one_could_not_be_made() -> None:
    links, gate = Links(), Gate()
    links.fail = True
    jobs = [Job(links.session.call, Work(lambda link: gate.stop())) for _ in range(3)]
    gate.reached()
    gate.open(3)
    for job in jobs:
        job.result()
    links.fail = False
    assert len(links.made) == 1 and links.made[0].served == 3


def test_lost_while_others_wait_and_one_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is told; the new link is not used for the old session; all is closed."""
    monkeypatch.setattr(nbd_session, "MOST_LINKS", 2)
    links, inside, making = Links(), Gate(), Gate()
    more = links.more
    links.session._more = lambda seconds: (making.stop(), more(seconds))[1]

    def fail(link: FakeLink) -> None:
        inside.stop()
        raise LinkLost

    first = Job(links.session.call, Work(fail))
    inside.reached()
    second = Job(links.session.call, Work())
    making.reached()
    third = Job(links.session.call, Work())
    inside.open()
    with pytest.raises(LinkLost):
        first.result()
    making.open()  # only now: else the new link may be used before the session is over
    for job in (second, third):
        with pytest.raises(LinkLost):
            job.result()
    links.session.close()
    links.session.drain(0)
    assert [(link.closed, link.served) for link in links.made] == [(1, 0), (1, 0)]
    with pytest.raises(LinkLost):
        links.session.call(Work())


@pytest.mark.parametrize("answers", [True, False])
def test_drain(answers: bool) -> None:
    """It waits for who is inside, and cuts the connection of one that gets no answer."""
    links, gate = Links(), Gate()

    def work(link: FakeLink) -> None:
        gate.stop()
        if not answers:
            assert link.was_cut.wait(20)
            raise LinkLost

    job = Job(links.session.call, Work(work))
    gate.reached()
    links.session.close()
    assert not links.made[0].closed
    drained = Job(links.session.drain, 20.0 if answers else 0.01)
    gate.open()
    drained.result()
    if answers:
        job.result()
    else:
        with pytest.raises(LinkLost):
            job.result()
    assert [link.closed for link in links.made] == [1]
    assert links.made[0].was_cut.is_set() is not answers


@pytest.mark.parametrize("n", range(5))
def test_many_threads_and_a_loss(seed: str, n: int, busy_switching: None) -> None:
    """Sixteen threads for eight links; one is lost, or the session is closed, in the middle.  FakeLink looks on."""
    rng = random.Random(f"{seed}{n}")
    links = Links()
    calls = rng.randrange(200, 1500)
    left = iter(range(calls))

    def work(link: FakeLink) -> None:
        if next(left, None) is None:
            link.lost = True
            raise LinkLost

    def requests() -> None:
        with pytest.raises(LinkLost):
            while True:
                links.session.call(Work(work))
        links.session.close()

    for job in [Job(requests) for _ in range(16)]:
        job.result()
    links.session.drain(20)
    assert sum(link.served for link in links.made) == calls
    assert len(links.made) <= nbd_session.MOST_LINKS
    assert all(link.closed == 1 for link in links.made)
