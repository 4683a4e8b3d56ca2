"""The promises over several openings: guests, QEMU and maintenance, one after the other; P8 and P9."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash.commands import COMMANDS, Case
from crash.damage import Damaged
from crash.engine import SHAPES, Setup, check, record
from crash.exports import EVENTS, REFUSALS, record_export
from crash.sessions import MEDIA, play
from support.crashes import Medium
from support.litter import littering
from support.patterns import KiB, MiB, Model, check_model, device, random_ops, stamp, zeros
from support.qed_image import Built, QedFile, assert_sound, raw_reader
from support.qemu import assert_check_clean
from support.server import Nbdkit

import qedcore

Image = Callable[..., Built]
Serve = Callable[..., Nbdkit]


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


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_kills_of_a_server_lose_no_space(
    tmp_path: Path, image: Image, serve: Serve, seed: str, backing: bool
) -> None:
    """kill -9, once more a server that is stopped: QEMU finds nothing, and each answered write is there."""
    rng = random.Random(seed)
    (tmp_path / "base").write_bytes(stamp(9, 0, 8 * MiB))
    spec: dict[str, Any] = {"backing": "base", "no_probe": True} if backing else {}
    built = image(size=16 * MiB, layout="DDDD", litter=littering(rng, 64 * KiB, 4), **spec)
    options = {"backing": "any"} if backing else {}
    below = raw_reader(tmp_path / "base") if backing else zeros
    model = Model(16 * MiB, lambda pos, length: built.read(pos, length, below))
    for _ in range(3):
        server = serve(built.path, **options)
        client = server.connect()
        for n, op in enumerate(random_ops(rng, 16 * MiB, 64 * KiB, 30)):
            if op.kind == "zero":
                client.zero(op.length, op.pos)
            else:
                client.pwrite(op.data, op.pos)
            op.apply(model)
            if n % 7 == 3:
                client.flush()
        server.kill()
        server = serve(built.path, **options)
        client = server.connect()
        check_model(model, device(client))
        client.shutdown()
        server.stop()
        assert_check_clean(built.path)


@pytest.mark.parametrize("number", range(4))
def test_leaks_are_used_while_an_image_is_open(image: Image, rng: random.Random, number: int) -> None:
    """As many clusters as have leaked are written: the file is no longer than before."""
    built = image(size=2 * MiB, cluster_size=4096, table_size=1, layout="DD", litter=littering(rng, 4096, 1), leaks=5)
    with QedFile(built.path) as file:
        leaks = len(file.verify().leaks)
    size = built.path.stat().st_size
    with qedcore.open_image(built.path, cache="unsafe") as opened:
        for n in range(leaks):
            opened.pwrite(stamp(7, (10 + n) * 4096, 4096), (10 + n) * 4096)
        assert opened.storage.size() == size
    assert_sound(built.path)
