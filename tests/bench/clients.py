"""What the servers are measured with, and the proof that a run did what its row says."""

from __future__ import annotations

import filecmp
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.qed_image import QedFile

from bench.images import Images
from bench.rows import CLUSTER, FLOOR, OURS, QEMUS, GiB, Measured, Row
from bench.servers import START_TIMEOUT, BenchError, NotHere, Server, die_with_parent, run

SEQUENTIAL_LIMIT = (
    2 * GiB
)  # bytes of a run of sequential allocating writes: the kernel does not start to write them out
LONG_LIMIT = 16 * GiB  # bytes of clusters
MAX_SLICES = 40
MOST_PER_SECOND = 300_000  # requests
PYTHON = os.environ.get("PYTHON", "/usr/bin/python3")  # what nbdkit embeds, for `qed check`


@dataclass
class Client:
    """The settings of a run."""

    row: Row
    contender: str
    images: Images
    tmp: Path  # a directory for small files
    target: Path  # where copies go
    plugin: Path
    seconds: float  # at most, for fio
    round: int

    # -- with a server

    def measure(self, server: Server) -> Measured:
        """The server answers already, except for "open"."""
        works: dict[str, Callable[[Server], Measured]] = {
            "fio": self._fio,
            "copy-out": lambda server: self._timed("nbdcopy", server.uri, "null:"),
            "copy-in": lambda server: self._timed("nbdcopy", self.images.shared("full", "raw"), server.uri),
            "convert": lambda server: self._timed(
                "qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, self.target
            ),
            "map": self._map,
            "open": self._open,
        }
        return works[self.row.work](server)

    def _timed(self, *command: str | os.PathLike[str], stdout: int | Any = subprocess.DEVNULL) -> Measured:
        self.target.unlink(missing_ok=True)
        start = time.perf_counter()
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise BenchError(f"{command[0]}: exit code {done.returncode}: {done.stderr.strip()}")
        return Measured(seconds, bytes=self._copied() if self.row.work != "map" else 0)

    def _copied(self) -> int:
        """Bytes of data that a copy moves."""
        if self.row.image == "sparse":
            return len(self.images.sparse_clusters()) * CLUSTER
        return self.images.size(self.row)

    def _map(self, server: Server) -> Measured:
        with open(self.tmp / "map", "wb") as out:
            return self._timed("nbdinfo", "--map", server.uri, stdout=out)

    def _open(self, server: Server) -> Measured:
        """From exec of the server to the answer to the first read."""
        nbd = import_nbd()
        deadline = server.started + START_TIMEOUT
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_unix(str(server.address))
                break
            except nbd.Error:
                if time.perf_counter() > deadline:
                    raise BenchError(f"the server did not answer within {START_TIMEOUT} s") from None
                time.sleep(0.0005)
        data = handle.pread(512, 0)
        seconds = time.perf_counter() - server.started
        if self.row.image == "full" and self.contender != FLOOR:
            with open(self.images.shared("full", "raw"), "rb") as f:
                if data != f.read(512):
                    raise BenchError("the first sector is not what was written there")
        handle.shutdown()
        return Measured(seconds)

    # -- fio

    def _fio(self, server: Server) -> Measured:
        row = self.row
        output = self.tmp / "fio.json"
        command = [
            "fio",
            "--name=bench",
            "--ioengine=nbd",
            f"--uri={server.uri}",
            f"--rw={row.rw}",
            f"--bs={row.bs}",
            f"--iodepth={row.depth}",
            f"--numjobs={row.connections}",
            f"--runtime={round(self.seconds * 1000)}ms",
            f"--randseed={self.round + 1}",
            "--group_reporting",
            "--output-format=json",
            f"--output={output}",  # fio's nbd engine talks on stdout
        ]
        if not row.allocates:
            command.append("--time_based")  # start over at the end
        limit = self._write_limit()
        if limit and not row.flush_every:
            command.append(f"--io_size={limit * row.bs // row.connections}")
        if row.zones:
            zones = ":".join(f"{share}/{length}" for share, length in row.zones)
            command.append(f"--random_distribution=zoned_abs:{zones}")
        if row.size:  # may be huge: no map of all blocks, so now and then one is met again
            command += ["--norandommap", "--random_generator=tausworthe64"]
        if row.fio_fsync:
            command.append(f"--fsync={row.fio_fsync}")
        if row.flush_every:
            command += [f"--read_iolog={self._requests()}", "--replay_no_stall=1"]
        if row.slices:
            every = max(1, round(self.seconds * 1000 / MAX_SLICES))
            command += [f"--write_iops_log={self.tmp / 'fio'}", f"--log_avg_msec={every}"]
        run(*command)
        result: dict[str, Any] = json.loads(output.read_text())["jobs"][0]
        if result["error"]:
            raise BenchError(f"fio: {os.strerror(result['error'])}")
        part = result["write" if row.writes else "read"]
        if not part["total_ios"] or not part["runtime"]:
            raise BenchError("fio: no request was completed in the time given")
        percentile = part["clat_ns"]["percentile"]
        return Measured(
            seconds=part["runtime"] / 1000,
            requests=part["total_ios"],
            bytes=part["io_bytes"],
            p50_us=percentile["50.000000"] / 1000,
            p99_us=percentile["99.000000"] / 1000,
            flushes=result["sync"]["total_ios"],
            slices=self._slices() if row.slices else (),
        )

    def _write_limit(self) -> int:
        """Requests, after which a run of allocating writes would no longer meet free clusters only; 0: never."""
        row = self.row
        if not row.allocates:
            return 0
        size = self.images.size(row)
        if row.slices:  # QEMU writes whole clusters, which may be more than the disk holds
            return LONG_LIMIT // CLUSTER if self.contender in QEMUS else 0
        if row.rw == "write":
            return min(size, SEQUENTIAL_LIMIT) // row.bs
        if row.zones:
            size = sum(length for share, length in row.zones if share)
        return size // CLUSTER // 4

    def _requests(self) -> Path:
        """A file for fio: writes to clusters in random order, with a flush after every few of them.

        More than there is time for: at the end of the file fio leaves without waiting for answers.
        """
        path = self.tmp / f"requests.{self.round}"
        if path.exists():  # of another contender
            return path
        clusters = self.images.size(self.row) // CLUSTER
        order = random.Random(self.round).sample(
            range(clusters), min(clusters, round(self.seconds * MOST_PER_SECOND))
        )
        lines = ["fio version 2 iolog", "bench add", "bench open"]
        for n, cluster in enumerate(order, 1):
            lines.append(f"bench write {cluster * CLUSTER} {self.row.bs}")
            if n % self.row.flush_every == 0:
                lines.append("bench sync 0 0")
        path.write_text("\n".join([*lines, ""]))
        return path

    def _slices(self) -> tuple[float, ...]:
        """Each line: milliseconds, requests per second since the line before, direction, ..."""
        lines = (self.tmp / "fio_iops.1.log").read_text().splitlines()
        return tuple(float(line.split(",")[1]) for line in lines)

    # -- without a server

    def check(self, image: Path) -> tuple[Measured, float, int]:
        """Also the CPU seconds and the peak resident set (bytes) of the process."""
        command = [PYTHON, "-m", "qedcore"] if self.contender == OURS else ["qemu-img"]
        output = self.tmp / "check.json"
        # It reports what its only child took: ours would count what this process had before exec.
        script = Path(__file__).with_name("timed.py")
        environ = {**os.environ, "PYTHONPATH": str(self.plugin.parents[1])}
        done = subprocess.run(
            [sys.executable, "-ISE", script, output, *command, "check", "--output=json", "-f", "qed", image],
            capture_output=True,
            text=True,
            env=environ,
            preexec_fn=die_with_parent,
        )
        if done.returncode:
            raise BenchError(f"{command[0]}: {done.stderr.strip()}")
        took = json.loads(done.stdout)
        # QEMU reports leaks that an image so large does not have, with exit code 3.
        if took["rc"] not in (0, 3):
            raise BenchError(f"{' '.join(command)} check: exit code {took['rc']}: {done.stderr.strip()}")
        found = json.loads(output.read_text())
        clusters = self.images.sizes.huge // CLUSTER
        if found["allocated-clusters"] != clusters or found["check-errors"]:
            raise BenchError(f"{' '.join(command)} check: {found}, and there are {clusters} clusters")
        return Measured(took["seconds"]), took["cpu"], took["rss"]

    # -- proofs

    def prove_served(self, server: Server) -> None:
        """While the server still runs.  Raises BenchError if the run was not what its row says."""
        if self.row.work == "map":
            self._prove_map()
        elif self.row.image == "sparse":
            totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", server.uri))
            data = sum(part["size"] for part in totals if part["type"] == 0)
            expect(data, self._copied(), "bytes of data in the sparse image")
        elif self.row.work == "copy-out":
            self._timed("nbdcopy", server.uri, self.target)
        if self.row.work in ("copy-out", "convert") and self.row.image == "full":
            if not filecmp.cmp(self.target, self.images.shared("full", "raw"), shallow=False):
                raise BenchError("the copy differs from the image")

    def _prove_map(self) -> None:
        runs = self.images.half_runs()
        with open(self.tmp / "map", encoding="ascii") as f:
            data = ((int(words[0]), int(words[1])) for words in map(str.split, f) if words[2] == "0")
            wanted = ((first * CLUSTER, n * CLUSTER) for first, n in runs)
            for n, (ours, found) in enumerate(itertools.zip_longest(wanted, data)):
                expect(found, ours, f"run {n} of allocated clusters")

    def prove_image(self, path: Path, measured: Measured, before: int) -> None:
        """When the server has ended.  before: clusters that were allocated at first, or bytes in a raw file."""
        row = self.row
        if row.work == "copy-in":
            full = self.images.shared("full", "raw")
            fmt = path.suffix[1:]
            run("qemu-img", "compare", "-f", fmt, "-F", "raw", path, full)
        elif row.writes:
            if row.flush_every and abs(measured.flushes - measured.requests // row.flush_every) > 1:
                raise BenchError(f"{measured.flushes} flushes in {measured.requests} writes")
            grown = allocated(path) - before
            if not row.allocates:
                expect(grown, 0, "allocated by overwrites")
            elif row.rw == "write" and path.suffix == ".qed":
                expect(grown, math.ceil(measured.bytes / CLUSTER), "clusters allocated by sequential writes")
            elif path.suffix == ".qed":
                self._prove_random(grown, measured)
            elif grown < measured.bytes * 0.9:
                raise BenchError(f"{measured.bytes} bytes were written, but only {grown} allocated")

    def _prove_random(self, grown: int, measured: Measured) -> None:
        clusters = self.images.size(self.row) // CLUSTER
        if self.row.zones:
            clusters = sum(length for share, length in self.row.zones if share) // CLUSTER
        likely = clusters * (1 - math.exp(-measured.requests / clusters))
        if not 0.9 * likely - 10 <= grown <= measured.requests:
            text = f"{measured.requests} random writes into {clusters} clusters allocated {grown}"
            raise BenchError(f"{text}; about {likely:.0f} were expected")


def allocated(path: Path) -> int:
    """Clusters of a QED image, bytes of a raw file."""
    if path.suffix == ".qed":
        with QedFile(path) as image:
            return sum(entry > 1 for entry in image.entries().values())
    return path.stat().st_blocks * 512


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise BenchError(f"{what}: {found}, not {wanted}")


def import_nbd() -> Any:
    try:
        import nbd
    except ImportError as e:
        raise NotHere(f"libnbd's Python module is missing: {e}") from e
    return nbd
