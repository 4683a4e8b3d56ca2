#!/usr/bin/env python3
"""make fuzz: the cases of fuzz.py, chosen by what they reach in the engine (libFuzzer, through atheris).

A case's random choices are read from bytes, which the fuzzer changes: other bytes are another image, other damage and
other requests, and nearly every input means something.  What reached something new is kept, unless it is slow, in
corpus.txt (a case a line, in base64); `make check` tries those again, and without atheris.

    make fuzz ARGS='--minutes 60'
    tests/fuzz/guided.py --again 'BASE64'
"""

from __future__ import annotations

import argparse
import base64
import importlib
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

from support.tools import scratch

CORPUS = Path(__file__).with_name("corpus.txt")
LONGEST = 400  # bytes of a case; after them all choices are the first ones
SEEDS = 40  # random cases to begin with
QUICK = 0.08  # seconds of CPU
# Loops over entries: to count in these takes ten times as long.
_HOT = ["qedcore.check.scan", "qedcore.format.geometry", "qedcore.format.table_runs"]


class Choices(random.Random):
    """Numbers read from bytes, and zeros after those."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, k: int) -> int:
        n = (k + 7) // 8
        part = self._data[self._at : self._at + n]
        self._at += n
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / (1 << 16)


def try_case(data: bytes, place: Path) -> str:
    """One case, in the new directory `place`; what came of it.  Raises Finding."""
    import fuzz

    place.mkdir()
    notes: list[str] = []
    try:
        return fuzz.run_case(Choices(data), place, notes)
    except (Exception, fuzz.Hang) as error:
        shown = "\n    ".join(notes)
        again = base64.b64encode(data).decode()
        raise fuzz.Finding(
            f"{type(error).__name__}: {error}\n    {shown}\nagain: tests/fuzz/guided.py --again '{again}'"
        ) from error
    finally:
        shutil.rmtree(place)


def corpus() -> list[bytes]:
    return [base64.b64decode(line) for line in CORPUS.read_text().split()] if CORPUS.exists() else []


def _fuzz(words: Sequence[str], place: Path) -> None:
    """The process that is libFuzzer's: its command line is `words`, and it ends when that wants to."""
    import atheris

    with atheris.instrument_imports(include=["qedcore"], exclude=_HOT, enable_loader_override=False):
        import qedcore

        for module in pkgutil.walk_packages(qedcore.__path__, "qedcore."):
            if module.name not in ("qedcore.__main__", "qedcore.storage.nbd"):
                importlib.import_module(module.name)
        import fuzz  # noqa: F401

    def one(data: bytes) -> None:
        try_case(data, place)

    atheris.Setup(list(words), one)
    atheris.Fuzz()


def _is_quick(data: bytes, directory: Path) -> bool:
    """Whether `make check` has time for it."""
    start = time.process_time()
    try_case(data, directory / "case")
    return time.process_time() - start < QUICK


def _guide(minutes: float, directory: Path, seed: int) -> int:
    """Fuzz for so long; then keep what reaches something new in the corpus."""
    before, after = directory / "before", directory / "after"
    for made in (before, after):
        made.mkdir()
    rng = random.Random(seed)
    for number, data in enumerate([*corpus(), *(rng.randbytes(LONGEST) for _ in range(SEEDS))]):
        (before / str(number)).write_bytes(data)
    worker = directory / "worker"  # libFuzzer runs its own command again
    worker.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} --worker "$0" "$@"\n')
    worker.chmod(0o755)
    own = [str(worker)]
    # Time and memory are limited by fuzz.limits().
    common = ["-timeout=0", "-rss_limit_mb=0", f"-max_len={LONGEST}", f"-artifact_prefix={directory}/"]
    fuzzer = [*own, f"-seed={seed}", f"-max_total_time={int(minutes * 60)}", "-print_final_stats=1", *common]
    code = subprocess.run([*fuzzer, str(before)], check=False).returncode
    if code == 0:
        subprocess.run([*own, "-merge=1", *common, str(after), str(before)], check=True)
        kept = sorted((path.read_bytes() for path in after.iterdir()), key=lambda data: (len(data), data))
        kept = [data for data in kept if _is_quick(data, directory)]
        CORPUS.write_text("".join(base64.b64encode(data).decode() + "\n" for data in kept))
        print(f"{len(kept)} cases in {CORPUS}")
    return code


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--worker"]:
        with tempfile.TemporaryDirectory(prefix="qedfuzz-", dir=scratch()) as directory:
            _fuzz(argv[1:], Path(directory) / "case")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--again", metavar="BASE64", help="this case")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="qedfuzz-") as directory:
        if args.again:
            print(try_case(base64.b64decode(args.again), Path(directory) / "case"))
            return 0
        print(f"seed {args.seed}", flush=True)
        return _guide(args.minutes, Path(directory), args.seed)


if __name__ == "__main__":
    os.environ.setdefault("QEDCORE_CHECK_LOCKS", "1")
    sys.exit(main(sys.argv[1:]))
