"""make crash: as many crash states as asked for, of random histories.

A history is known by the seed and its number, and is the same whenever it is run again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["QEDCORE_CHECK_LOCKS"] = "1"

from crash.engine import LIMITS, MIX, SHAPES, Setup, check, record  # noqa: E402
from crash.offline import KINDS, Offline  # noqa: E402
from support.tools import scratch  # noqa: E402

from qedcore.errors import QEDError  # noqa: E402

_LIMIT = 4000  # states of one history
_WEIGHTS = {"4K/1": 30, "4K/2": 30, "4K/4": 15, "64K/1": 8}  # of shapes; the others take long to look at
_OFFLINE = 0.1  # part of the histories


Result = tuple[int, str, str]  # states, what it was, and what broke ("" if nothing did)


def run(seed: str, number: int) -> Result:
    """One history."""
    rng = random.Random(f"{seed}/{number}")
    with tempfile.TemporaryDirectory(prefix="qed-crash-", dir=scratch()) as directory:
        if rng.random() < _OFFLINE:
            return offline(Path(directory), rng)
        return online(Path(directory), rng)


def online(directory: Path, rng: random.Random) -> Result:
    name = rng.choices(list(SHAPES), [_WEIGHTS.get(name, 3) for name in SHAPES])[0]
    backing = rng.random() < 0.5
    trailing = rng.choice((b"", b"trailing" * 448))
    threads, requests, phases = rng.choice((1, 2, 3, 4, 6)), rng.randint(4, 16), rng.choice((1, 2, 3))
    share = rng.choice((0.0, 0.01, 0.1, 0.3))
    mix = rng.choice((MIX, (60, 10, 5, 5, 0, 20), (30, 10, 25, 15, 20, 5)))
    what = (
        f"{name}, {'' if backing else 'no '}backing file, {phases} phases of {threads} threads with {requests} "
        f"requests each, switching in {share:.0%} of the places"
    )
    try:
        setup = Setup(directory, SHAPES[name], backing, trailing=trailing)
        history = record(setup, rng, threads, requests, phases, share, mix)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="make crash ARGS=")
    parser.add_argument("--states", type=int, default=100_000, help="how many to try at least (default %(default)s)")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(1 << 32)), help="default: random")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all processors)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this one history")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    if args.only is not None:
        states, what, broken = run(args.seed, args.only)
        print(f"history {args.only} ({what}): {broken or f'{states} states, nothing broke'}")
        return 1 if broken else 0
    start, told = time.monotonic(), 0.0
    states = histories = failed = 0
    numbers = itertools.count()
    with ProcessPoolExecutor(args.jobs) as pool:
        running: dict[Future[Result], int] = {}
        while states < args.states and not failed or running:
            while states < args.states and not failed and len(running) < 2 * args.jobs:
                number = next(numbers)
                running[pool.submit(run, args.seed, number)] = number
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(done)
                more, what, broken = done.result()
                states += more
                histories += 1
                if broken:
                    failed += 1
                    print(f"history {number} ({what}): {broken}")
                    print(f"  again: make crash ARGS='--seed {args.seed} --only {number}'")
            seconds = time.monotonic() - start
            if seconds > told + 10:
                told = seconds
                print(f"{states} states, {states / seconds:.0f}/s", flush=True)
    seconds = time.monotonic() - start
    print(f"{states} states of {histories} histories in {seconds:.0f} s: {failed or 'nothing'} broke")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
