"""The contenders: how each is started, and what it costs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.rows import CLUSTER, FLOOR, OURS, PLAIN, QEMU, QEMU_IO_URING, QEMU_THREADS, RAW, KiB, Row

START_TIMEOUT = 20  # seconds
STOP_TIMEOUT = 60  # seconds: a server may have much to flush
POLL = 0.001  # seconds
CPU_TICK = os.sysconf("SC_CLK_TCK")  # units of utime and stime per second

_libc = ctypes.CDLL(None)


class BenchError(Exception):
    """One line that says why something could not be measured."""


class NotHere(BenchError):
    """This machine lacks what it takes: trying again would not help."""


def die_with_parent() -> None:
    """Between fork and exec: SIGKILL when the benchmark dies, even if it cannot clean up."""
    pr_set_pdeathsig = 1
    _libc.prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(*command: str | os.PathLike[str], accept: Sequence[int] = (0,)) -> str:
    """Run a program to its end; its standard output."""
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=die_with_parent)
    if result.returncode not in accept:
        text = (result.stderr or result.stdout).strip()
        raise BenchError(f"{command[0]}: exit code {result.returncode}: {text}")
    return result.stdout


def command(
    contender: str,
    row: Row,
    image: Path | str,
    size: int,
    address: Path,
    threads: int,
    plugin: Path,
    params: Sequence[str],
) -> list[str]:
    """The server's command line.  image: a path, or a URI in remote rows; size: bytes of the device, for those
    without an image."""
    nbdkit = ["nbdkit", "-f", "-U", str(address), "-t", str(threads)]
    qemu_nbd = ["qemu-nbd", "-t", "-e", "64", "-f", "qed", "-k", str(address)]
    if contender == OURS:
        return [*nbdkit, "python", str(plugin), f"file={image}", *params]
    if contender == RAW:
        return [*nbdkit, "nbd", f"uri={image}"] if row.remote else [*nbdkit, "file", str(image)]
    if contender == PLAIN:
        return [*nbdkit, "python", str(Path(__file__).with_name("plain.py")), f"file={image}"]
    if contender == FLOOR:
        return [*nbdkit, *floor(row, size)]
    aio = {QEMU: [], QEMU_THREADS: ["--aio=threads"], QEMU_IO_URING: ["--aio=io_uring"]}[contender]
    return [*qemu_nbd, *aio, str(image)]


def floor(row: Row, size: int) -> list[str]:
    """The plugin in C that has the least to do for a row, with its parameters."""
    if row.image == "half":  # as many extents
        return ["sparse-random", f"size={size}", "percent=50", f"runlength={16 * CLUSTER}"]
    if row.image == "sparse":  # not 1 %: its runs begin anywhere, and nbdcopy reads the aligned 256 KiB around each
        return ["sparse-random", f"size={size}", "percent=0.8", f"runlength={CLUSTER}"]
    return ["null", f"size={size}"]


class Server:
    """A running server and its costs.  A context manager; leaving it ends the process."""

    def __init__(self, command: Sequence[str], address: Path, log: Path) -> None:
        self.address = address
        self._log = log
        with open(log, "wb") as out:
            self.started = time.perf_counter()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self.address.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.address}"

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
                s.settimeout(START_TIMEOUT)
                s.connect(str(self.address))
                if s.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGICIHAVEOPT":
                    client_flags, option_abort = struct.pack(">I", 1), struct.pack(">8sII", b"IHAVEOPT", 2, 0)
                    s.sendall(client_flags + option_abort)
                    return
            if self._process.poll() is not None:
                raise BenchError("the server ended at once")
            time.sleep(POLL)
        raise BenchError(f"the server did not answer within {START_TIMEOUT} s")

    def log(self) -> str:
        return self._log.read_text(errors="replace").strip() or "(no output)"

    def cpu_seconds(self) -> float:
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / CPU_TICK  # utime and stime of all threads

    def peak_rss(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KiB
        raise BenchError("no VmHWM in the server's status: has it ended?")
