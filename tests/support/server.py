"""A real nbdkit with the QED plugin (or a qemu-nbd), started for a test and killed with it.

Readiness needs no polling: the pidfile is a FIFO, which nbdkit writes once it listens, and a pidfd tells if it
exits first.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from support.tools import PLUGIN, REPO, TIMEOUT, require, require_driver, unavailable

STACKS = Path(__file__).with_name("stacks")

# For support.tools.changed_plugin: a flush never ends.
DEADLOCK = """
import threading
from qedcore.engine.image import QEDImage

never = threading.Lock()
never.acquire()

def wait_for_ever(image):
    print("hangs", file=sys.stderr, flush=True)
    never.acquire()

QEDImage.flush = wait_for_ever
"""


class StartError(Exception):
    """The server exited instead of listening."""

    def __init__(self, rc: int | None, log: str) -> None:
        super().__init__(f"server did not start: exit code {rc}\n{log}")
        self.rc = rc
        self.log = log


def import_nbd() -> Any:
    try:
        import nbd
    except ImportError:
        unavailable("python3-libnbd is not installed")
    return nbd


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        assert isinstance(port, int)
        return port


def exited(pidfd: int, seconds: float) -> bool:
    """Wait for the end of a process."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Nbdkit:
    """One nbdkit process. Configure, then start(); kill() is always safe.

    params go to the plugin (key=value), filter_params after them; args to nbdkit itself.
    """

    def __init__(
        self,
        params: Mapping[str, object] | Sequence[str] = (),
        *,
        plugin: str | os.PathLike[str] = PLUGIN,
        read_only: bool = False,
        threads: int | None = None,
        filters: Sequence[str] = (),
        filter_params: Sequence[str] = (),
        args: Sequence[str] = (),
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        tcp: bool = False,
        daemon: bool = False,
        wrapper: Sequence[str] = (),
    ) -> None:
        require("nbdkit")
        self.params = [f"{k}={v}" for k, v in params.items()] if isinstance(params, Mapping) else list(params)
        self.plugin = os.fspath(plugin)
        self.read_only = read_only
        self.threads = threads
        self.filters = list(filters)
        self.filter_params = list(filter_params)
        self.args = list(args)
        self.cwd = cwd if cwd is not None else REPO
        path = os.pathsep.join(filter(None, (str(STACKS), os.environ.get("PYTHONPATH"))))
        self.env = {**os.environ, "PYTHONPATH": path, **(env or {})}
        self.tcp = tcp
        self.daemon = daemon
        self.wrapper = list(wrapper)
        self.expect_traceback = False
        self.port = 0
        self.pid = 0
        self.dir = Path(tempfile.mkdtemp(prefix="qedtest-"))  # short: socket paths are limited to 107 bytes
        self.socket = self.dir / "sock"
        self._log = self.dir / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.exit_code: int | None = None  # None also for a daemon, which is not our child

    def argv(self) -> list[str]:
        argv = [*self.wrapper, "nbdkit", "-P", os.fspath(self.dir / "pid")]
        if self.tcp:
            argv += ["-i", "127.0.0.1", "-p", str(self.port)]
        else:
            argv += ["-U", os.fspath(self.socket)]
        if self.daemon:
            argv += ["--log=stderr"]  # else a daemon's messages go to syslog
        else:
            argv += ["-f", "--exit-with-parent"]
        if self.read_only:
            argv.append("-r")
        if self.threads is not None:
            argv += ["-t", str(self.threads)]
        argv += [f"--filter={name}" for name in self.filters]
        return [*argv, *self.args, "python", self.plugin, *self.params, *self.filter_params]

    def start(self) -> Nbdkit:
        """Returns when the server listens; StartError if it exits first."""
        for attempt in range(5):
            if self.tcp:
                self.port = free_port()
            try:
                self._start()
                return self
            except StartError as e:
                if not self.tcp or "Address already in use" not in e.log or attempt == 4:
                    raise
        raise AssertionError("not reached")

    def _start(self) -> None:
        fifo = self.dir / "pid"
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    self.argv(), cwd=self.cwd, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self._pidfd = os.pidfd_open(self._process.pid)
            self.pid = self._process.pid
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(self._pidfd, select.POLLIN)
            ready = [n for n, _ in poll.poll(TIMEOUT * 1000)]
            if self.daemon and fd not in ready and self._process.wait(TIMEOUT) == 0:
                poll.unregister(self._pidfd)
                ready = [n for n, _ in poll.poll(TIMEOUT * 1000)]
            if fd not in ready:
                self._process.kill()
                self.exit_code = self._process.wait()
                raise StartError(self.exit_code, self.log())
            pid = int(os.read(fd, 64))
            if self.daemon:
                self._process.wait(TIMEOUT)
                os.close(self._pidfd)
                self._pidfd = os.pidfd_open(pid)
            else:
                assert pid == self._process.pid, "a wrapper must exec the server, or it outlives the test"
            self.pid = pid
        finally:
            os.close(fd)

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}" if self.tcp else f"nbd+unix:///?socket={self.socket}"

    def connect(self, *, strict: bool = True, meta: bool = False) -> Any:
        """A connected libnbd handle; strict=False lets requests through that the server must refuse."""
        nbd = import_nbd()
        handle = nbd.NBD()
        if not strict:
            handle.set_strict_mode(0)
        if meta:
            handle.add_meta_context("base:allocation")
        handle.connect_uri(self.uri)
        return handle

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def show_stacks(self) -> None:
        """Add what every thread is at to the log: Python's stacks, and what the kernel waits for."""
        before = self.log().count("most recent call first")
        waits = [_wait_of(task) for task in sorted(Path(f"/proc/{self.pid}/task").glob("*"))]
        try:
            self.send_signal(signal.SIGUSR2)
            wait_for(lambda: self.log().count("most recent call first") > before, "stacks", 5)
            time.sleep(0.5)  # faulthandler writes them one by one
        except (AssertionError, ProcessLookupError) as error:
            waits.append(f"no stacks: {error!r}")
        with self._log.open("a") as log:
            log.write("\n".join(["", "threads of the server:", *waits, ""]))

    def running(self) -> bool:
        return self._pidfd >= 0 and not exited(self._pidfd, 0)

    def send_signal(self, number: int) -> None:
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int | None:
        """Wait for the end; returns the exit code (negative: signal), None for a daemon."""
        if self._pidfd < 0:
            return self.exit_code
        if not exited(self._pidfd, TIMEOUT):
            self.show_stacks()
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"server did not exit within {TIMEOUT} s\n{self.log()}")
        if self._process is not None and not self.daemon:
            self.exit_code = self._process.wait()
        os.close(self._pidfd)
        self._pidfd = -1
        return self.exit_code

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        """Signal and wait; a foreground server must exit with 0."""
        self.send_signal(number)
        rc = self.wait()
        if not self.daemon:
            assert rc == 0, f"server exit code {rc}\n{self.log()}"
        return rc

    def kill(self) -> None:
        """End of the test: the process is gone afterwards, whatever state it was in."""
        if self._pidfd >= 0:
            try:
                self.send_signal(signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.wait()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Nbdkit:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.kill()


class Backend(Nbdkit):
    """nbdkit with another plugin; start() after kill() brings it back at the same address."""

    def __init__(self, *words: str, filters: Sequence[str] = (), args: Sequence[str] = (), tcp: bool = False) -> None:
        super().__init__((), filters=filters, args=args, tcp=tcp)
        self.words = words

    def argv(self) -> list[str]:
        argv = super().argv()
        return [*argv[: argv.index("python")], *self.words]

    def start(self) -> Nbdkit:
        self.socket.unlink(missing_ok=True)
        return super().start()


def refusal(params: Sequence[str], directory: Path) -> str:
    """The one line with which nbdkit, started in `directory`, refuses these parameters; AssertionError otherwise."""
    server = Nbdkit(params, cwd=directory)
    try:
        server.start()
    except StartError as error:
        lines = error.log.splitlines()
        assert len(lines) == 1 and lines[0].startswith("nbdkit: "), error.log
        return lines[0]
    finally:
        server.remove()
    raise AssertionError(f"nbdkit accepted {params}")


class QemuNbd:
    """qemu-nbd on a Unix socket, for comparison; --fork returns once it listens."""

    def __init__(self, image: str | os.PathLike[str], *, fmt: str = "qed", args: Sequence[str] = ()) -> None:
        require("qemu-nbd")
        require_driver(["qemu-nbd", fmt])
        self.dir = Path(tempfile.mkdtemp(prefix="qedtest-"))
        self.socket = self.dir / "sock"
        self._argv = ["qemu-nbd", "--fork", "-f", fmt, "-t", "-e", "8", "-k", os.fspath(self.socket)]
        self._argv += ["--pid-file", os.fspath(self.dir / "pid"), *args, os.fspath(image)]
        self._pidfd = -1

    def __enter__(self) -> QemuNbd:
        with open(self.dir / "log", "wb") as log:
            done = subprocess.run(self._argv, stdout=log, stderr=log, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise StartError(done.returncode, (self.dir / "log").read_text())
        self._pidfd = os.pidfd_open(int((self.dir / "pid").read_text()))
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            if not exited(self._pidfd, TIMEOUT):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
        shutil.rmtree(self.dir, ignore_errors=True)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"


def _wait_of(task: Path) -> str:
    """A thread of another process, in a line."""
    try:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        return f"thread {task.name} {(task / 'comm').read_text().strip()}: {state} in {(task / 'wchan').read_text()}"
    except OSError as error:  # it has ended, or we may not look
        return f"thread {task.name}: {error.strerror}"


def disconnect(client: Any) -> None:
    """Leave a server that is on its way out; it may have been faster."""
    try:
        client.shutdown()
    except import_nbd().Error:
        pass


def wait_for(condition: Any, what: str, seconds: float = TIMEOUT) -> None:
    """Poll for something that has no event to wait for (bytes changing in a file)."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
