"""make crash: as many crash states as asked for, of random histories of all kinds, and some of real servers.

A history is known by the seed and its number, and is the same whenever it is run again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["QEDCORE_CHECK_LOCKS"] = "1"

from crash.commands import COMMANDS, Case  # noqa: E402
from crash.damage import Damaged  # noqa: E402
from crash.engine import LIMITS, MIX, SHAPES, History, Setup, check, record  # noqa: E402
from crash.exports import record_export  # noqa: E402
from crash.offline import KINDS, Offline  # noqa: E402
from crash.sessions import MEDIA, play  # noqa: E402
from crash.syscalls import Recording  # noqa: E402
from support.crashes import Medium  # noqa: E402
from support.tools import changed_plugin, scratch  # noqa: E402

from qedcore.errors import QEDError  # noqa: E402

_LIMIT = 4000  # states of one history
_WEIGHTS = {"4K/1": 30, "4K/2": 30, "4K/4": 15, "64K/1": 8}  # of shapes; the others take long to look at
_GROWTH_STEP = 64 << 10  # bytes: smaller files are looked at faster


Result = tuple[int, str, str]  # states, what it was, and what broke ("" if nothing did)


def run(seed: str, number: int) -> Result:
    """One history."""
    rng = random.Random(f"{seed}/{number}")
    with tempfile.TemporaryDirectory(prefix="qed-crash-", dir=scratch()) as directory:
        kind = rng.choices(list(KINDS_OF_HISTORIES), list(KINDS_OF_HISTORIES.values()))[0]
        try:
            return kind(Path(directory), rng)
        except (AssertionError, QEDError) as error:
            return 0, kind.__name__, str(error) or repr(error)


def online(directory: Path, rng: random.Random) -> Result:
    name = rng.choices(list(SHAPES), [_WEIGHTS.get(name, 3) for name in SHAPES])[0]
    backing = rng.random() < 0.5
    trailing = rng.choice((b"", b"trailing" * 448))
    threads, requests, phases = rng.choice((1, 2, 3, 4, 6)), rng.randint(4, 16), rng.choice((1, 2, 3))
    share = rng.choice((0.0, 0.01, 0.1, 0.3))
    mix = rng.choice((MIX, (60, 10, 5, 5, 0, 20), (30, 10, 25, 15, 20, 5), (40, 0, 20, 10, 0, 30)))
    errors = rng.choice((0.0, 0.0, 0.01, 0.1))
    medium = rng.choice(MEDIA)
    what = (
        f"{name}, {'' if backing else 'no '}backing file, {phases} phases of {threads} threads with {requests} "
        f"requests each, switching in {share:.0%} of the places, {errors:.0%} of the calls fail, {medium}"
    )
    try:
        spec = {} if medium.fixed else {"trailing": trailing}
        setup = Setup(directory, SHAPES[name], backing, medium=medium, **spec)
        history = record(setup, rng, threads, requests, phases, share, mix, errors)
        return check(setup, history, rng, limit=4 * LIMITS.get(name, _LIMIT // 4)), what, ""
    except (AssertionError, QEDError) as error:
        return 0, what, str(error) or repr(error)


def offline(directory: Path, rng: random.Random) -> Result:
    what = kind = rng.choice(KINDS)
    try:
        case = Offline(directory, rng, kind)
        what = f"{kind} {case.spec}"
        return case.check(subsets=4), what, ""
    except (AssertionError, QEDError) as error:
        return 0, what, str(error) or repr(error)


def sessions(directory: Path, rng: random.Random) -> Result:
    """Several openings, by the engine, QEMU and commands."""
    return play(directory, rng), "sessions", ""


def commands(directory: Path, rng: random.Random) -> Result:
    name = rng.choice(list(COMMANDS))
    Case(directory, rng, name).run()
    return 1, name, ""


def damaged(directory: Path, rng: random.Random) -> Result:
    return 1, Damaged(directory, rng).run(), ""


def exported(directory: Path, rng: random.Random) -> Result:
    """An image on an NBD server."""
    shape = rng.choice(("4K/1", "4K/1", "4K/2"))
    setup = Setup(directory, SHAPES[shape], rng.random() < 0.5, medium=Medium(fixed=True))
    history = record_export(setup, directory, rng)
    return check(setup, history, rng, subsets=2, part=0.3, limit=_LIMIT // 4), f"exported, {shape}", ""


# With their weights.
KINDS_OF_HISTORIES: dict[Callable[[Path, random.Random], Result], int] = {
    online: 40,
    offline: 8,
    sessions: 30,
    commands: 10,
    damaged: 6,
    exported: 6,
}


def served(seed: str, number: int) -> Result:
    """A real server, recorded.  Its threads run as they like: what breaks is kept, because no seed brings it back."""
    rng = random.Random(f"{seed}/served {number}")
    shape, backing = rng.choice(("4K/1", "4K/2", "64K/1")), rng.random() < 0.5
    what = f"served, {shape}, {'' if backing else 'no '}backing file"
    with tempfile.TemporaryDirectory(prefix="qed-crash-", dir=scratch()) as directory:
        recording = Recording(Setup(Path(directory), SHAPES[shape], backing))
        small_steps = f"from qedcore.engine import allocator\nallocator.GROWTH_STEP = {_GROWTH_STEP}"
        plugin = changed_plugin(Path(directory), small_steps)
        try:
            for _ in range(3):
                recording.serve(
                    rng, rng.choice((1, 3, 5)), rng.randint(4, 16), plugin=plugin, kill=rng.random() < 0.5
                )
                if words := rng.choice(((), (), ("check", "-r", "all"), ("check", "-r", "leaks"), ("compact",))):
                    recording.command(*words)
            history = recording.history()
            return check(recording.setup, history, rng, part=0.2, limit=_LIMIT), what, ""
        except (AssertionError, QEDError) as error:
            with tempfile.NamedTemporaryFile("wb", prefix="qed-crash-", suffix=".recording", delete=False) as file:
                pickle.dump((shape, backing, recording.ops, recording.events()), file)
            return 0, f"{what}, recorded in {file.name}", str(error) or repr(error)


def recorded(path: str) -> Result:
    """All the states of what served() has kept."""
    with open(path, "rb") as file:
        shape, backing, ops, events = pickle.load(file)
    with tempfile.TemporaryDirectory(prefix="qed-crash-", dir=scratch()) as directory:
        setup = Setup(Path(directory), SHAPES[shape], backing)
        history = History(setup)
        history.world.log, history.events = ops, events
        try:
            return check(setup, history, random.Random(0)), path, ""
        except (AssertionError, QEDError) as error:
            return 0, path, str(error) or repr(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="make crash ARGS=")
    parser.add_argument("--states", type=int, default=100_000, help="how many to try at least (default %(default)s)")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(1 << 32)), help="default: random")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all processors)")
    parser.add_argument("--served", type=int, default=10, help="servers to record besides (default %(default)s)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this one history")
    parser.add_argument("--recorded", metavar="FILE", help="a server whose recording was kept")
    args = parser.parse_args()
    if args.recorded or args.only is not None:
        states, what, broken = recorded(args.recorded) if args.recorded else run(args.seed, args.only)
        print(f"{what}: {broken or f'{states} states, nothing broke'}")
        return 1 if broken else 0
    print(f"seed {args.seed}", flush=True)
    start, told = time.monotonic(), 0.0
    states = histories = failed = 0
    todo: Iterator[tuple[Callable[[str, int], Result], int]] = itertools.chain(
        ((served, number) for number in range(args.served)), ((run, number) for number in itertools.count())
    )
    with ProcessPoolExecutor(args.jobs) as pool:
        running: dict[Future[Result], int] = {}
        while (states < args.states and not failed) or running:
            while states < args.states and not failed and len(running) < 2 * args.jobs:
                job, number = next(todo)
                running[pool.submit(job, args.seed, number)] = number
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(done)
                more, what, broken = done.result()
                states += more
                histories += 1
                if broken:
                    failed += 1
                    print(f"history {number} ({what}): {broken}")
                    kept = "recorded in" in what
                    again = f"--recorded {what.split()[-1]}" if kept else f"--seed {args.seed} --only {number}"
                    print(f"  again: make crash ARGS='{again}'")
            seconds = time.monotonic() - start
            if seconds > told + 10:
                told = seconds
                print(f"{states} states, {states / seconds:.0f}/s", flush=True)
    seconds = time.monotonic() - start
    print(f"{states} states of {histories} histories in {seconds:.0f} s: {failed or 'nothing'} broke")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
