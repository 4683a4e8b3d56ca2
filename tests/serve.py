#!/usr/bin/python3
"""`make run`: create FILE if it is missing and serve it on a Unix socket until Ctrl-C.

FILE, SIZE and PYTHON come from the environment.  The exit code is 0 when the server ends because
it was told to (Ctrl-C, SIGTERM, SIGHUP).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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


class Stop(Exception):
    """A signal asks the server to end."""


def stop(signum: int, frame: FrameType | None) -> None:
    raise Stop


def serve(file: Path, directory: Path) -> int:
    """Run nbdkit until it ends; its exit code."""
    socket, pidfile = directory / "sock", directory / "pid"
    terminal = foreground_terminal()
    make_group = os.getpgrp()

    # Make ends with an error when Ctrl-C reaches it.  Leave its process group, so that the
    # terminal sends Ctrl-C here only.  Ctrl-Z would stop us behind the back of make: ignore it.
    if terminal is not None:
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpid())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)

    command = ["nbdkit", "-f", "--exit-with-parent", "-U", str(socket), "-P", str(pidfile)]
    command += ["python", str(TOP / "plugin" / "qed.py"), f"file={file}"]
    server = None
    try:
        # In its own group, it is told to stop once, by us.
        server = subprocess.Popen(command, start_new_session=True)
        while not pidfile.exists() and server.poll() is None:
            time.sleep(0.05)
        if server.poll() is None:
            uri = shlex.quote(f"nbd+unix:///?socket={socket}")
            print(TRY.format(file=shlex.quote(str(file)), uri=uri), flush=True)
        return server.wait()
    except Stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        if server is None:
            return 0
        server.terminate()
        return server.wait()
    finally:
        if terminal is not None:
            os.tcsetpgrp(terminal, make_group)


def main() -> int:
    file = Path(os.environ.get("FILE") or "image.qed").absolute()
    if not file.exists():
        create(file, os.environ.get("SIZE") or "1G")
    # Not below TMPDIR: a socket's path is limited to 107 bytes, and this one goes into a URI.
    directory = Path(tempfile.mkdtemp(prefix="qed.", dir="/tmp"))
    try:
        return serve(file, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
