"""Standard output and error that are full, closed, or pipes that nobody reads any more.

An error there is no error of an image.  That of standard output is kept, and told when the command ends; what else is
printed gets lost, and the work goes on.  Only a command that does nothing but print ends early when its reader has
gone.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any

# Names of files are bytes, and are printed as such, in any locale and whatever PYTHONIOENCODING says.
_ENCODING = sys.getfilesystemencoding()
_AS_BYTES = "qed.as_bytes"


def _as_bytes(error: UnicodeError) -> tuple[bytes, int]:
    """An error handler: what the locale cannot say is the byte of a name that it stands for, or UTF-8."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    try:
        return part.encode("utf-8", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return part.encode("utf-8", "backslashreplace"), error.end


codecs.register_error(_AS_BYTES, _as_bytes)


def fill_descriptors() -> None:
    """Have descriptors 0 to 2 refer to something, so that no image gets one of these numbers: others print there.

    From what was closed nothing can be read, and to standard output nothing written.  Raises OSError.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            new = os.open(os.devnull, os.O_WRONLY if fd == 2 else os.O_RDONLY)  # the lowest that is free: this one
            assert new == fd
            os.set_inheritable(fd, True)


class _Descriptor(io.FileIO):
    """Standard output or error itself; `error` is the first one."""

    def __init__(self, fd: int, needed: bool) -> None:
        super().__init__(fd, "w", closefd=False)
        self.error: OSError | None = None
        self.needed = needed  # a command that nobody listens to need not go on

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                while True:
                    done = super().write(data)
                    if done is not None:
                        return done
                    select.select([], [self], [])  # it does not block, and whoever reads it is slow
            except OSError as error:
                self.error = error
                if error.errno == errno.EPIPE and self.needed:
                    raise
        return len(data)


class Output(io.TextIOWrapper):
    """In the place of sys.stdout."""

    def __init__(self, before: Any) -> None:
        self._descriptor = _Descriptor(1, True)
        buffer: Any = io.BufferedWriter(self._descriptor)
        terminal = self._descriptor.isatty()
        write_through = False
        if before is not None:
            before.flush()
            write_through = before.write_through
        super().__init__(buffer, _ENCODING, _AS_BYTES, line_buffering=terminal, write_through=write_through)

    def needed(self, needed: bool) -> None:
        """Whether the command is to end when nobody reads its output any more."""
        self._descriptor.needed = needed

    def lost(self) -> str | None:
        """Why something that was printed could not be written, in words; None if nothing was lost, or not missed."""
        self.flush()
        error = self._descriptor.error
        if error is None or error.errno == errno.EPIPE:
            return None
        if error.errno == errno.EBADF:
            return "standard output is closed"
        return f"cannot write to standard output: {error.strerror}"


def errors() -> io.TextIOWrapper:
    """In the place of sys.stderr: when nobody can be told, the work goes on."""
    buffer: Any = io.BufferedWriter(_Descriptor(2, False))
    return io.TextIOWrapper(buffer, _ENCODING, _AS_BYTES, line_buffering=True)
