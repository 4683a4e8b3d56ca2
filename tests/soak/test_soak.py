"""A few seconds of what `make soak` does for hours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
from support.server import DEADLOCK, Nbdkit
from support.tools import changed_plugin


@pytest.fixture
def short(tmp_path: Path, rng: random.Random) -> Callable[[], soak.Soak]:
    def make() -> soak.Soak:
        made = soak.Soak(tmp_path, rng, 12 * soak.MiB, quiet=True)
        made.images = rng.randrange(len(soak.IMAGES))
        made.new_image()
        return made

    return make


def test_every_ending(short: Callable[[], soak.Soak]) -> None:
    run = short()
    for ending in ("vanish", "term-loaded", "kill", "term"):
        run.life(0.3, ending)
    run.life(0, "term")
    assert run.counts["compared with QEMU"] >= 3
    assert all(run.counts[kind] for kind in soak.KINDS)


def test_kills(short: Callable[[], soak.Soak]) -> None:
    run = short()
    soak.run_kills(run, 2)
    run.kill_while_opening()
    run.life(0, "term")
    assert run.counts["kill"] == 2 and run.counts["write"]


def test_a_lost_write_is_noticed(short: Callable[[], soak.Soak]) -> None:
    run = short()
    run.life(0.2, "term")
    run.model[5000] ^= 1
    with pytest.raises(AssertionError, match="first difference at 0x1388"):
        run.life(0, "term")


def test_a_hang_explains_itself(
    short: Callable[[], soak.Soak],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plugin = changed_plugin(tmp_path, DEADLOCK)
    monkeypatch.setattr(soak, "Nbdkit", lambda params: Nbdkit(params, plugin=plugin))
    monkeypatch.setattr(soak, "PATIENCE", 1)
    run = short()
    with pytest.raises(AssertionError, match="no answer in 1 s"):
        run.life(60, "term")
    assert "in wait_for_ever" in capsys.readouterr().err


def test_growth_is_noticed() -> None:
    figures = soak.Figures(rss=[n * soak.MiB for n in range(40)])
    figures.check(soak.LONG_LIFE / 2)
    with pytest.raises(AssertionError, match="grew by"):
        figures.check(soak.LONG_LIFE)
