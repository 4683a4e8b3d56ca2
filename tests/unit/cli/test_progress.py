"""What a command shows of its progress; how fast it may go."""

from __future__ import annotations

import argparse
import io
import signal
import sys
import types

import pytest

from qedcore.cli import progress as progress_module
from qedcore.cli.progress import Progress, RateLimit, ask, asked_for_progress, silently


def arguments(progress: bool = False, quiet: bool = False) -> argparse.Namespace:
    return argparse.Namespace(progress=progress, quiet=quiet)


def test_progress_prints_whole_percents(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(arguments(progress=True), 1000) as progress:
        for done in (1, 9, 10, 11, 500, 1000):
            progress.update(done)
    printed = capsys.readouterr().out
    assert printed == "".join(f"    ({n}/100%)\r" for n in ("0.00", "1.00", "50.00", "100.00")) + "\n"


@pytest.mark.parametrize("total", [0, 10])
def test_progress_ends_at_100(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(arguments(progress=True), total):
        pass
    assert capsys.readouterr().out == "    (0.00/100%)\r    (100.00/100%)\r\n"


def test_progress_that_stops_or_fails_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(arguments(progress=True), 10) as progress:
        progress.stop()
    with pytest.raises(ValueError), Progress(arguments(progress=True), 10):
        raise ValueError
    assert "100.00" not in capsys.readouterr().out


@pytest.mark.parametrize("args", [arguments(), arguments(quiet=True), arguments(progress=True, quiet=True)])
def test_progress_is_silent_in_pipes(args: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(args, 10) as progress:
        progress.update(5)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Bar:
    """Stands in for tqdm."""

    def __init__(self, **options: object) -> None:
        self.n = 0
        self.closed = False
        bars.append(self)

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.closed = True


bars: list[Bar] = []


def test_progress_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    bars.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))  # type: ignore[arg-type]
    with Progress(arguments(), 10) as progress:
        progress.update(4)
        assert bars[0].n == 4
    assert bars[0].n == 10 and bars[0].closed
    with Progress(arguments(quiet=True), 10), Progress(arguments(progress=True), 10):
        assert len(bars) == 1


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # type: ignore[arg-type]
    with Progress(arguments(), 10) as progress:
        progress.update(5)
    assert terminal.getvalue() == ""


def test_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps as long as the average needs; time that the copy itself took counts."""
    now = 100.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress_module.time, "sleep", sleep)
    limit = RateLimit(1000)
    limit.wait(500)
    now += 0.25  # the next copy
    limit.wait(500)
    now += 10  # a slow one
    limit.wait(500)
    assert slept == [0.5, 0.25, 0.0]
    RateLimit(0).wait(1 << 40)
    assert len(slept) == 3


def test_sigusr1_is_told_how_far_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    """One line each time, whatever else is printed, also by those who print no progress."""
    ask(signal.SIGUSR1)
    with Progress(arguments(quiet=True), 200) as progress:
        progress.update(50)
        ask(signal.SIGUSR1)
    rows = silently(arguments(), [(0, "a"), (5, "b")], 10)
    next(rows), next(rows)
    ask(signal.SIGUSR1)
    told = []
    with asked_for_progress(told.append):
        ask(signal.SIGUSR1)
    assert told == [signal.SIGUSR1] and list(rows) == []
    assert capfd.readouterr() == ("", "".join(f"    ({n}/100%)\n" for n in ("0.00", "25.00", "50.00")))
