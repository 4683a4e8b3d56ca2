"""Claims under threads that take turns between any two bytecodes, and that this would notice a mistake in them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
from crash.schedule import Scheduler

import qedcore.engine.cluster_locks
from qedcore.engine.cluster_locks import Claims


def contend(seed: str | int, threads: int = 4, claimed: Callable[[], dict[int, int]] = dict) -> None:
    """Threads claim runs of a few clusters; raises AssertionError if two have one, or one waits for ever."""
    rng = random.Random(seed)
    scheduler = Scheduler(random.Random(rng.random()), share=0.3)
    with scheduler.locks():
        claims = Claims()
    claims.claimed = claimed()
    owners: dict[int, int] = {}

    def work(rng: random.Random) -> None:
        me = threading.get_ident()
        for _ in range(5):
            first = rng.randrange(4)
            end = first + rng.randint(1, 3)
            try:
                claims.take(first, end)
                for cluster in range(first, end):
                    assert owners.setdefault(cluster, me) == me, "claimed by two"
                scheduler.pause()
                for cluster in range(first, end):
                    del owners[cluster]
            finally:
                claims.give_up(first, end)

    seeds = [rng.random() for _ in range(threads)]
    scheduler.run([lambda seed=seed: work(random.Random(seed)) for seed in seeds])  # type: ignore[misc]
    assert not claims.claimed
    assert not claims.waiting


def test_a_cluster_has_one_claim_and_nobody_waits_for_ever(seed: str) -> None:
    for n in range(30):
        contend(f"{seed} {n}")


def test_give_up_takes_nothing_from_others() -> None:
    claims = Claims()
    claims.take(3, 5)
    claims.claimed[5] = -1  # another thread's
    claims.give_up(2, 7)
    assert claims.claimed == {5: -1}


def as_the_engines(function: Callable[..., Any]) -> Callable[..., Any]:
    """Others may go on between any two of its bytecodes."""
    code = function.__code__.replace(co_filename=qedcore.engine.cluster_locks.__file__)
    return FunctionType(code, function.__globals__, function.__name__)


def claim_in_two_steps(claimed: dict[int, int], cluster: int, thread: int) -> int:
    if cluster not in claimed:
        claimed[cluster] = thread
        return thread
    return claimed.get(cluster, 0)


def wait_without_a_second_look(claims: Claims, cluster: int) -> None:
    with claims._lock:
        claims.waiting += 1
        claims._given_up.wait()
        claims.waiting -= 1


def look_for_who_waits_before_giving_up(claims: Claims, first: int, end: int) -> None:
    waiting = claims.waiting
    for cluster in range(first, end):
        if claims.claimed.get(cluster) == threading.get_ident():
            del claims.claimed[cluster]
    if waiting:
        claims.wake()


@pytest.mark.parametrize("hazard", [wait_without_a_second_look, look_for_who_waits_before_giving_up])
def test_lost_wakeups_are_found(monkeypatch: pytest.MonkeyPatch, hazard: Callable[..., None]) -> None:
    method = "_wait" if hazard is wait_without_a_second_look else "give_up"
    monkeypatch.setattr(Claims, method, as_the_engines(hazard))
    with pytest.raises(AssertionError, match="wait for each other"):
        for seed in range(200):
            contend(seed)


def test_a_claim_in_two_steps_is_found() -> None:
    hasty = type("Hasty", (dict,), {"setdefault": as_the_engines(claim_in_two_steps)})
    with pytest.raises(AssertionError, match="claimed by two"):
        for seed in range(200):
            contend(seed, claimed=hasty)
