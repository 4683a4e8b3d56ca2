"""An image of any format that QEMU knows, through a qemu-nbd of its own.

It gets a listening socket in the way of systemd's socket activation.  Our connection waits in that already and the
socket has lost its name, so nobody else can connect.  qemu-nbd ends when its only client is gone, however that ends.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from ..errors import UnsupportedError
from .nbd import NbdStorage

_END_SECONDS = 10.0  # for a qemu-nbd whose client has left
# LISTEN_PID must be the program's own, which a shell knows that becomes it: nothing runs between fork and exec here.
_ACTIVATE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@" 3<&0 0</dev/null'


class QemuNbd:
    """A Peer: starts a qemu-nbd for each connection.  It owns `fd`, which the process inherits, if that is not -1."""

    several = False  # a new connection ends the process of the one before

    def __init__(self, words: Sequence[str], fd: int = -1) -> None:
        program = shutil.which("qemu-nbd")
        if program is None:
            raise UnsupportedError("needs qemu-nbd, which is not installed")
        self._command = ["/bin/sh", "-c", _ACTIVATE, program, *words]
        self._fd = fd
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] | None = None

    def begin(self, handle: Any) -> None:
        self._end()
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            with tempfile.TemporaryDirectory(prefix="qed-") as directory:  # mode 0700
                path = os.path.join(directory, "nbd")
                server.bind(path)
                server.listen(1)
                client.connect(path)
            self._messages = tempfile.TemporaryFile()
            self._process = subprocess.Popen(
                self._command,
                stdin=server.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                pass_fds=[] if self._fd < 0 else [self._fd],
                start_new_session=True,  # Ctrl-C is for the server, whose last requests may need it
            )
            handle.aio_connect_socket(os.dup(client.fileno()))

    def reason(self) -> str | None:
        if self._process is None or self._messages is None:
            return None
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return re.sub(r"^qemu-nbd: (Failed to blk_new_open '.*?': )?", "", lines[-1]) if lines else None

    def _end(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._messages is not None:
            self._messages.close()
            self._messages = None

    def close(self) -> None:
        self._end()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_by_qemu(
    name: str, words: Sequence[str], identity: object = None, fd: int = -1, *, writable: bool = False
) -> NbdStorage:
    """The guest's view of an image: `words` name it to qemu-nbd, `name` is for messages.

    Takes over `fd`, a descriptor that qemu-nbd inherits, if it is not -1.  Raises StorageError and UnsupportedError.
    """
    try:
        peer = QemuNbd(words if writable else ["--read-only", *words], fd)
    except UnsupportedError as error:
        if fd >= 0:
            os.close(fd)
        raise UnsupportedError(f"{name} {error}") from None
    return NbdStorage(name, peer, writable, identity=identity, patience=0.0)
