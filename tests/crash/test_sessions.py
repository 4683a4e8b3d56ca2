"""The promises over several openings: guests, QEMU and maintenance, one after the other; P8 and P9."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crash.commands import COMMANDS, Case
from crash.damage import Damaged
from crash.engine import SHAPES, Setup, check, record
from crash.exports import EVENTS, REFUSALS, record_export
from crash.sessions import MEDIA, play
from support.crashes import Medium


@pytest.mark.parametrize("number", range(6))
def test_lives(tmp_path: Path, seed: str, number: int) -> None:
    states = 0
    for n in range(8):
        (tmp_path / str(n)).mkdir()
        states += play(tmp_path / str(n), random.Random(f"{seed}/{n}"))
    assert states > 100, "hardly anything was tried"


@pytest.mark.parametrize("medium", sorted(set(MEDIA[3:])), ids=str)
def test_power_loss_of_other_storages(tmp_path: Path, seed: str, medium: Medium) -> None:
    rng = random.Random(seed)
    for backing in (False, True):
        (tmp_path / str(backing)).mkdir()
        setup = Setup(tmp_path / str(backing), SHAPES["4K/1"], backing, medium=medium)
        history = record(setup, rng, requests=6)
        assert check(setup, history, rng, subsets=1, part=0.2, limit=200) > 20, "hardly anything was tried"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(tmp_path: Path, seed: str, command: str) -> None:
    for n in range(4):
        (tmp_path / str(n)).mkdir()
        Case(tmp_path / str(n), random.Random(f"{seed}/{n}"), command).run()


def test_damage(tmp_path: Path, seed: str) -> None:
    for n in range(60):
        (tmp_path / str(n)).mkdir()
        Damaged(tmp_path / str(n), random.Random(f"{seed}/{n}")).run()


@pytest.mark.parametrize("event", (*EVENTS, *REFUSALS))
def test_exports(tmp_path: Path, seed: str, event: str) -> None:
    rng = random.Random(seed)
    setup = Setup(tmp_path, SHAPES["4K/1"], rng.random() < 0.5, medium=Medium(fixed=True))
    history = record_export(setup, tmp_path, rng, events=(event, rng.choice(EVENTS)))
    assert check(setup, history, rng, subsets=1, part=0.2, limit=150) > 5, "hardly anything was tried"
