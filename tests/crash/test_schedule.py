"""Threads that take turns between any two bytecodes really do, also in functions that run for the first time."""

from __future__ import annotations

import random
from typing import Any

import pytest
from crash.schedule import Scheduler
from support.bytecodes import before_each

import qedcore

CODE = """
def add(box):
    value = box[0]
    box[0] = value + 1

def add_twice(box):
    add(box)
    add(box)
"""


def new_functions() -> dict[str, Any]:
    """As the engine's, and never run before."""
    names: dict[str, Any] = {}
    exec(compile(CODE, qedcore.__file__, "exec"), names)
    return names


def test_before_each_bytecode() -> None:
    """The first time is like the second."""
    add_twice = new_functions()["add_twice"]
    seen: list[list[str]] = []
    for _ in range(2):
        seen.append([])
        with before_each(qedcore.__file__, lambda code, position: seen[-1].append(code.co_name)):
            add_twice([0])
    assert seen[0] == seen[1]
    assert seen[0].count("add") >= 12 and seen[0].count("add_twice") >= 6


def test_switches_at_first_use() -> None:
    """An addition that is not atomic loses one of two, in code that no thread has run yet."""
    lost = 0
    for seed in range(20):
        box, add = [0], new_functions()["add"]
        Scheduler(random.Random(seed), share=0.5).run([lambda: add(box), lambda: add(box)])  # noqa: B023
        lost += box[0] == 1
    assert 3 <= lost <= 17


def test_errors_come_through() -> None:
    def fail(code: object, position: int) -> None:
        raise KeyError(position)

    add = new_functions()["add"]
    for _ in range(2):
        with pytest.raises(KeyError), before_each(qedcore.__file__, fail):
            add([0])
    box = [0]
    add(box)
    assert box == [1]
