#!/usr/bin/python3
"""`make run`: create FILE if it is missing and serve it on a Unix socket until Ctrl-C.

FILE, SIZE and PYTHON come from the environment.  The exit code is 0 when the server ends because
it was told to (Ctrl-C, SIGTERM, SIGHUP).
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

TOP = Path(__file__).resolve().parent.parent

TRY = """\
Serving {file}.  In another terminal:

  nbdinfo {uri}
  nbdcopy {uri} copy.raw
  nbdcopy copy.raw {uri}
  qemu-img convert -p -f raw -O qcow2 {uri} copy.qcow2

Ctrl-C ends it.
"""


def create(file: Path, size: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-m", "qedcore", "create", str(file), size]
    if subprocess.run(command, env=environ).returncode:
        sys.exit(1)


def foreground_terminal() -> int | None:
    """A descriptor of the terminal whose Ctrl-C reaches this process, or None."""
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.tcgetpgrp(fd) == os.getpgrp():
        return fd
    os.close(fd)
    return None


def serve(file: Path, directory: Path, terminal: int | None) -> int:
    """Run nbdkit until it ends, a signal comes or the terminal goes away; its exit code."""
    socket, pidfile = directory / "sock", directory / "pid"
    command = ["nbdkit", "-f", "--exit-with-parent", "-U", str(socket), "-P", str(pidfile)]
    command += ["python", str(TOP / "plugin" / "qed.py"), f"file={file}"]
    server: subprocess.Popen[bytes] | None = None
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if server is not None:
            server.terminate()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    # In a session of its own: it hears of Ctrl-C once, and from us.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        while not pidfile.exists() and server.poll() is None and not stopped:
            time.sleep(0.05)
        if server.poll() is None and not stopped:
            uri = shlex.quote(f"nbd+unix:///?socket={socket}")
            print(TRY.format(file=shlex.quote(str(file)), uri=uri), flush=True)
            # A hangup is signalled to the leader of the session only, which may be make.
            events = select.poll()
            events.register(os.pidfd_open(server.pid), select.POLLIN)
            if terminal is not None:
                events.register(terminal, 0)  # POLLHUP
            events.poll()
    finally:
        server.terminate()
        server.wait()
    return server.returncode


@contextlib.contextmanager
def own_process_group() -> Iterator[int | None]:
    """Let Ctrl-C in the terminal reach this process only: make would end with an error.  The terminal, if any."""
    terminal = foreground_terminal()
    if terminal is None:
        yield None
        return
    make_group = os.getpgrp()
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z: make would not notice, and stay in the way
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # tcsetpgrp from the background
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpid())
    try:
        yield terminal
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.tcsetpgrp(terminal, make_group)


def main() -> int:
    file = Path(os.environ.get("FILE") or "image.qed").absolute()
    if not file.exists():
        create(file, os.environ.get("SIZE") or "1G")
    # Not below TMPDIR: a socket's path is limited to 107 bytes, and this one goes into a URI.
    directory = Path(tempfile.mkdtemp(prefix="qed.", dir="/tmp"))
    try:
        with own_process_group() as terminal:
            return serve(file, directory, terminal)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
