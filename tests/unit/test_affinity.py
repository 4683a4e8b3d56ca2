"""Crowd: who is moved to one CPU, and who is not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qedcore.affinity import SMALL, Crowd, current_cpu


class Moves:
    """Stands in for the system call; remembers which thread went where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.seen: list[tuple[str, set[int]]] = []
        self.error = error
        monkeypatch.setattr(os, "sched_setaffinity", self.call)

    def call(self, pid: int, cpus: set[int]) -> None:
        assert pid == 0
        if self.error:
            raise self.error
        self.seen.append((threading.current_thread().name, cpus))


@contextmanager
def request(crowd: Crowd, length: int) -> Iterator[None]:
    """The steps that the plugin's callbacks have."""
    crowd.inside.append(None)
    if len(crowd.inside) > 1 and not crowd.member.moved:
        crowd.meet(length)
    yield
    crowd.inside.pop()


def in_thread(crowd: Crowd, length: int, times: int = 1) -> None:
    """Requests, one after the other, on another thread."""

    def work() -> None:
        for _ in range(times):
            with request(crowd, length):
                pass

    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join()


def test_one_at_a_time_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, crowd = Moves(monkeypatch), Crowd()
    for _ in range(5):
        with request(crowd, 512):
            pass
        in_thread(crowd, 512)
    assert moves.seen == []


def test_who_meets_another_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, crowd = Moves(monkeypatch), Crowd()
    with request(crowd, 512):
        in_thread(crowd, SMALL, times=3)
    assert [name for name, _ in moves.seen] == ["other"]
    with request(crowd, 512), request(crowd, 512):  # this thread, now: all go to the same CPU
        pass
    assert len(moves.seen) == 2 and moves.seen[0][1] == moves.seen[1][1]
    assert len(moves.seen[0][1]) == 1 and moves.seen[0][1] <= os.sched_getaffinity(0)


def test_large_requests_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, crowd = Moves(monkeypatch), Crowd()
    with request(crowd, 512):
        in_thread(crowd, SMALL + 1)
    assert moves.seen == []


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, crowd = Moves(monkeypatch), Crowd()
    crowd.enabled = False
    with request(crowd, 512):
        in_thread(crowd, 512)
    assert moves.seen == []


def test_forbidden_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Moves(monkeypatch, PermissionError(1, "not here"))
    crowd = Crowd()
    with request(crowd, 512):
        in_thread(crowd, 512)
    assert not crowd.enabled


def test_current_cpu() -> None:
    assert current_cpu() in range(os.cpu_count() or 1)
