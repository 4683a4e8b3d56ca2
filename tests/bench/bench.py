#!/usr/bin/python3
"""Compare servers, in alternation, with fio's nbd engine.

In every round of a row each contender gets one run: a server is started, fio measures it, the
server ends.  The order rotates from round to round, so that drift of the machine hits all alike;
ratios are taken within a round and the median of them is printed.  Ratios above 1 favour the QED
plugin.

    qed                the plugin, on a QED image
    qemu-nbd           QEMU's driver, on the same image; its defaults (threads, writeback)
    qemu-nbd-io_uring  the same with --aio=io_uring
    nbdkit-file        nbdkit's file plugin, on a raw file of the same content

Reads and overwrites go to a full image in the page cache.  Allocating writes get a new, empty
image per run, 64 GiB large, so that almost every random write meets a cluster of its own; fio
writes no block twice.  Each contender's new image is removed, and the file system synced, before
the next run starts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PLUGIN = Path(__file__).resolve().parents[2] / "plugin" / "qed.py"

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

CONTENDERS = ("qed", "qemu-nbd", "qemu-nbd-io_uring", "nbdkit-file")
EMPTY_SIZE = 64 * GiB  # bytes: 32 L2 tables with QEMU's default geometry
ALLOCATION_LIMIT = 8 * GiB  # bytes of guest data per run of sequential allocating writes
START_TIMEOUT = 20  # seconds
STOP_TIMEOUT = 60  # seconds: a server may have much to flush
CPU_TICK = os.sysconf("SC_CLK_TCK")  # units of utime and stime per second


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    title: str
    rw: str  # fio's --rw
    bs: int  # bytes
    depth: int
    image: str  # "full", "empty" or "backed"

    @property
    def writes(self) -> bool:
        return self.rw.endswith("write")


ROWS = (
    Row("randread-1", "4 KiB random read, depth 1", "randread", 4 * KiB, 1, "full"),
    Row("randread-16", "4 KiB random read, depth 16", "randread", 4 * KiB, 16, "full"),
    Row("randread-64", "4 KiB random read, depth 64", "randread", 4 * KiB, 64, "full"),
    Row("overwrite", "4 KiB random overwrite, depth 16", "randwrite", 4 * KiB, 16, "full"),
    Row("randalloc", "4 KiB random allocating write, depth 16", "randwrite", 4 * KiB, 16, "empty"),
    Row("seqread", "256 KiB sequential read, depth 8", "read", 256 * KiB, 8, "full"),
    Row("seqalloc", "256 KiB sequential allocating write, depth 8", "write", 256 * KiB, 8, "empty"),
    Row("backing", "4 KiB random write over a backing file, depth 16", "randwrite", 4 * KiB, 16, "backed"),
)


@dataclasses.dataclass(frozen=True)
class Sample:
    row: str
    contender: str
    round: int
    iops: float  # requests per second
    latency_us: float  # mean completion latency, microseconds
    p99_us: float  # 99th percentile of the same
    cpu: float  # the server's CPU seconds per 100,000 requests
    rss: int  # the server's peak resident set, bytes


class BenchError(Exception):
    """One line that says why nothing could be measured."""


def run(*command: str | os.PathLike[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        text = (result.stderr or result.stdout).strip()
        raise BenchError(f"{' '.join(map(str, command))}: exit code {result.returncode}: {text}")
    return result.stdout


def require_tools(contenders: list[str]) -> None:
    """Raises BenchError if a program is missing that the contenders need."""
    needed = ["fio", "qemu-img"]
    if any(c.startswith("qemu-nbd") for c in contenders):
        needed.append("qemu-nbd")
    if {"qed", "nbdkit-file"} & set(contenders):
        needed.append("nbdkit")
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing:
        raise BenchError(f"not installed: {', '.join(missing)}")
    if "nbd" not in run("fio", "--enghelp").split():
        raise BenchError("this fio has no nbd engine (it may be a package of its own, such as fio-engine-nbd)")
    formats = run("qemu-img", "--help").rpartition("Supported formats:")[2].split()
    if "qed" not in formats:
        raise BenchError("this qemu-img has no QED driver, which makes the images and is what we compare with")


# -- servers ----------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Between fork and exec: SIGKILL when the benchmark dies, even if it cannot clean up."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Server:
    """A running server and its costs.  A context manager; leaving it ends the process."""

    def __init__(self, command: list[str], address: Path, log: Path) -> None:
        self._address = address
        self._log = log
        with open(log, "wb") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent
            )

    def __enter__(self) -> Server:
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchError(f"the server ended at once: {self.log()}")
            with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
                s.connect(str(self._address))
                if s.recv(8) == b"NBDMAGIC":
                    return
            time.sleep(0.02)
        raise BenchError(f"the server did not answer within {START_TIMEOUT} s: {self.log()}")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._address.unlink(missing_ok=True)

    def log(self) -> str:
        return self._log.read_text(errors="replace").strip() or "(no output)"

    def cpu_seconds(self) -> float:
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / CPU_TICK  # utime and stime of all threads

    def peak_rss(self) -> int:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KiB
        raise BenchError("no VmHWM in the server's status: has it ended?")


class Images:
    """The image files, all in one directory."""

    def __init__(self, directory: Path, full_size: int, backing_size: int) -> None:
        self._dir = directory
        self._full_size = full_size
        self._backing_size = backing_size

    def prepare(self, kinds: set[str]) -> None:
        """Make what is shared by all runs of these kinds of image."""
        if "full" in kinds:
            say(f"making the full image, {self._full_size // MiB} MiB")
            self._fill(self._dir / "full.raw", self._full_size)
            run("qemu-img", "convert", "-f", "raw", "-O", "qed", self._dir / "full.raw", self._dir / "full.qed")
        if "backed" in kinds:
            say(f"making the backing file, {self._backing_size // MiB} MiB")
            self._fill(self._dir / "backing.raw", self._backing_size)

    @staticmethod
    def _fill(path: Path, size: int) -> None:
        noise = os.urandom(8 * MiB)
        with open(path, "wb") as f:
            for _ in range(0, size, len(noise)):
                f.write(noise)
            f.truncate(size)
            os.fdatasync(f.fileno())

    @contextlib.contextmanager
    def for_run(self, kind: str, fmt: str) -> Iterator[Path]:
        """The image for one run; an empty one or an overlay is new, and is removed afterwards."""
        if kind == "full":
            path = self._dir / f"full.{fmt}"
            self._warm(path)
            yield path
            sync(self._dir)
            return
        path = self._dir / f"new.{fmt}"
        try:
            if kind == "empty":
                run("qemu-img", "create", "-q", "-f", fmt, path, str(EMPTY_SIZE))
            else:
                backing = self._dir / "backing.raw"
                self._warm(backing)
                run("qemu-img", "create", "-q", "-f", fmt, "-b", backing, "-F", "raw", path)
            yield path
        finally:
            path.unlink(missing_ok=True)
            sync(self._dir)

    @staticmethod
    def _warm(path: Path) -> None:
        buffer = bytearray(4 * MiB)
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def sync(directory: Path) -> None:
    """No run pays for the dirty pages of the one before it."""
    run("sync", "-f", directory)


def server_command(contender: str, image: Path, address: Path, options: argparse.Namespace) -> list[str]:
    if contender == "nbdkit-file":
        return ["nbdkit", "-f", "-U", str(address), "-t", str(options.threads), "file", str(image)]
    if contender == "qed":
        command = ["nbdkit", "-f", "-U", str(address), "-t", str(options.threads)]
        return [*command, "python", str(options.plugin), f"file={image}", *options.param]
    command = ["qemu-nbd", "-t", "-e", "64", "-f", "qed", "-k", str(address)]
    if contender == "qemu-nbd-io_uring":
        command.append("--aio=io_uring")
    return [*command, str(image)]


# -- fio --------------------------------------------------------------------------------------------


def fio(row: Row, address: Path, output: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run fio against a server; the merged result of its connections."""
    command = [
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri=nbd+unix:///?socket={address}",
        f"--rw={row.rw}",
        f"--bs={row.bs}",
        f"--iodepth={row.depth}",
        f"--numjobs={options.connections}",
        f"--runtime={options.seconds}",
        f"--randseed={seed}",
        "--group_reporting",
        "--output-format=json",
        f"--output={output}",  # fio's nbd engine talks on stdout
    ]
    if row.image == "full":
        command.append("--time_based")  # start over at the end
    elif row.rw == "write":
        command.append(f"--io_size={ALLOCATION_LIMIT // options.connections}")
    elif row.image == "backed":
        # At most a quarter of the clusters: later, a write would often meet one that it has filled before.
        limit = options.backing_size // (64 * KiB) // 4
        command.append(f"--io_size={limit * row.bs // options.connections}")
    run(*command)
    result: dict[str, Any] = json.loads(output.read_text())["jobs"][0]
    if result["error"]:
        raise BenchError(f"fio: {row.title}: {os.strerror(result['error'])}")
    direction: dict[str, Any] = result["write" if row.writes else "read"]
    return direction


def measure(row: Row, contender: str, round_: int, images: Images, options: argparse.Namespace, tmp: Path) -> Sample:
    address = tmp / "sock"
    fmt = "raw" if contender == "nbdkit-file" else "qed"
    with images.for_run(row.image, fmt) as image:
        command = server_command(contender, image, address, options)
        with Server(command, address, tmp / "log") as server:
            cpu = server.cpu_seconds()
            try:
                result = fio(row, address, tmp / "fio.json", options, seed=round_ + 1)
                cpu = server.cpu_seconds() - cpu
                rss = server.peak_rss()
            except (BenchError, OSError) as e:
                raise BenchError(f"{contender}: {e}; the server's log: {server.log()}") from e
    return Sample(
        row=row.name,
        contender=contender,
        round=round_,
        iops=result["iops"],
        latency_us=result["clat_ns"]["mean"] / 1000,
        p99_us=result["clat_ns"]["percentile"]["99.000000"] / 1000,
        cpu=cpu * 100_000 / max(1, result["total_ios"]),
        rss=rss,
    )


# -- report -----------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(rows: list[Row], contenders: list[str], samples: list[Sample]) -> None:
    """One line per row and contender: medians, and the median of the ratios within each round."""
    print(f"\n{'':18} {'requests/s':>10} {'MiB/s':>7} {'p99 us':>8} {'CPU s/100k':>10} {'RSS MiB':>8} {'qed is':>8}")
    for row in rows:
        found = {c: [s for s in samples if s.row == row.name and s.contender == c] for c in contenders}
        if not any(found.values()):
            continue
        print(row.title)
        for contender, mine in found.items():
            if not mine:
                continue
            iops = statistics.median(s.iops for s in mine)
            ratio = ""
            if contender != "qed" and found.get("qed"):
                ours = {s.round: s.iops for s in found["qed"]}
                ratios = [ours[s.round] / s.iops for s in mine if s.round in ours]
                ratio = f"{statistics.median(ratios):7.2f}x" if ratios else ""
            print(
                f"  {contender:16} {iops:10,.0f} {iops * row.bs / MiB:7,.0f}"
                f" {statistics.median(s.p99_us for s in mine):8,.0f}"
                f" {statistics.median(s.cpu for s in mine):10.2f}"
                f" {max(s.rss for s in mine) / MiB:8.0f} {ratio:>8}"
            )


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    versions = {
        "fio": run("fio", "--version").strip(),
        "nbdkit": run("nbdkit", "--version").strip() if shutil.which("nbdkit") else "none",
        "qemu": run("qemu-img", "--version").splitlines()[0],
    }
    return {**versions, "kernel": platform.release(), "machine": platform.machine(), "cpus": str(os.cpu_count())}


# -- command line -----------------------------------------------------------------------------------


def size(text: str) -> int:
    units = {"K": KiB, "M": MiB, "G": GiB}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    value = int(number) * unit
    if value <= 0 or value % MiB:
        raise ValueError
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    rows = ", ".join(row.name for row in ROWS)
    parser.add_argument("--rows", type=names, metavar="NAME,...", help=f"some of: {rows} (default: all)")
    parser.add_argument("--only", type=names, metavar="NAME,...", help="only these contenders")
    parser.add_argument("--rounds", type=positive, default=5, help="runs of each contender per row (default 5)")
    parser.add_argument("--seconds", type=positive, default=4, help="at most, per run (default 4)")
    parser.add_argument("--connections", type=positive, default=1, help="connections of fio (default 1)")
    parser.add_argument("--threads", type=positive, default=16, help="nbdkit's -t (default 16, as nbdkit's)")
    parser.add_argument("--plugin", type=Path, default=PLUGIN, help="another plugin/qed.py to measure")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="plugin parameter")
    parser.add_argument("--image-size", type=size, default=GiB, metavar="SIZE", help="of the full image (default 1G)")
    parser.add_argument("--backing-size", type=size, default=4 * GiB, metavar="SIZE", help="default 4G")
    parser.add_argument("--dir", type=Path, help="where the images go (default: the temporary directory)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every sample to this file")
    options = parser.parse_args(argv)
    for given, known in ((options.rows, [row.name for row in ROWS]), (options.only, CONTENDERS)):
        for name in given or ():
            if name not in known:
                parser.error(f"{name}: not one of {', '.join(known)}")
    return options


def terminated(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def finish(rows: list[Row], contenders: list[str], samples: list[Sample], options: argparse.Namespace) -> None:
    if not samples:
        return
    report(rows, contenders, samples)
    if options.json:
        settings = {k: getattr(options, k) for k in ("rounds", "seconds", "connections", "threads", "param")}
        document = {
            "environment": environment(),
            "settings": settings,
            "samples": [dataclasses.asdict(sample) for sample in samples],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def bench(options: argparse.Namespace) -> None:
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    contenders = [c for c in CONTENDERS if not options.only or c in options.only]
    require_tools(contenders)
    samples: list[Sample] = []
    broken: set[str] = set()  # contenders that do not work here, such as io_uring where it is forbidden
    with contextlib.ExitStack() as stack:
        # The socket's path must be short; the images may want another file system.
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qedbench.", dir="/tmp")))
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qedbench.", dir=options.dir)))
        images = Images(data, options.image_size, options.backing_size)
        images.prepare({row.image for row in rows})
        stack.callback(finish, rows, contenders, samples, options)  # also after an error or Ctrl-C
        for row in rows:
            taking_part = [c for c in contenders if not (c == "nbdkit-file" and row.image == "backed")]
            for round_ in range(options.rounds):
                say(f"{row.title}: round {round_ + 1} of {options.rounds}")
                start = round_ % len(taking_part) if taking_part else 0
                for contender in taking_part[start:] + taking_part[:start]:
                    if contender in broken:
                        continue
                    try:
                        samples.append(measure(row, contender, round_, images, options, tmp))
                    except BenchError as e:
                        if contender != "qemu-nbd-io_uring":
                            raise
                        say(f"leaving out {contender}: {e}")
                        broken.add(contender)


def main(argv: list[str]) -> int:
    options = parse(argv)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, terminated)
    try:
        bench(options)
    except BenchError as e:
        say(f"bench: {e}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
