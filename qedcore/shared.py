"""SharedImage: the one image that all connections of a server use.

It is opened read-only at first, so that a bad image is reported before the server forks and nothing is changed as
long as only readers come; the first connection that may write reopens it for writing.

The lock is held while the image is opened or closed, never during requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from .affinity import Crowd
from .chain import open_image
from .errors import QEDError, RequestError
from .image import DEFAULT_L2_CACHE, QEDImage
from .in_flight import InFlight
from .locks import Rank, ranked_lock
from .sizes import parse_size
from .storage.file import CacheMode, FileStorage, cache_mode, open_storage
from .storage.lock import Locking, Use, locking

if TYPE_CHECKING:
    from .trace import TraceSelection


class Opener:
    """Opens the files of one image, which is read at first and may be written later.

    Its lock is then raised on the descriptor that has it, and only then shared with the new one: no other program can
    have written to the file since it was first read.
    """

    def __init__(self, locking: Locking) -> None:
        self._locking = locking
        self._reader: FileStorage | None = None  # the image itself, opened read-only

    def __call__(self, path: str, writable: bool, mode: CacheMode) -> FileStorage:
        if not writable or self._reader is None:
            storage = open_storage(path, writable, mode, locking=self._locking)
            self._reader = self._reader or storage
            return storage
        self._reader.lock(Use.WRITE, self._locking)
        storage = open_storage(path, writable, mode, locking=Locking.OFF)
        try:
            if not storage.share_lock(self._reader):  # the file was replaced
                storage.lock(Use.WRITE, self._locking)
        except BaseException:
            storage.close()
            raise
        return storage

    def read_only(self) -> None:
        """It could not be opened for writing: others may read it, too."""
        if self._reader is not None:
            self._reader.lock(Use.READ, self._locking)


class SharedImage:
    """Configured by parameters, opened by check(), used through `image`."""

    PARAMETERS = ("file", "cache", "l2_cache", "lock", "affinity", "trace")

    def __init__(self, log: Callable[[str], None], trace_line: Callable[[str], None]) -> None:
        self._log = log  # takes one-line notices
        self._trace_line = trace_line
        self._values: dict[str, str] = {}
        self.crowd = Crowd()
        self._in_flight = InFlight()  # also requests on the retired image
        self._lock = ranked_lock(Rank.SHARED)
        self._opener = Opener(Locking.AUTO)
        self._retired: QEDImage | None = None  # the read-only one, whose last requests may still be in flight
        self.image: QEDImage  # exists after check(); replaced once, by open()

    def configure(self, name: str, value: str) -> None:
        """Take one parameter.  Raises RequestError if it is unknown, repeated or malformed."""
        if name not in self.PARAMETERS:
            raise RequestError(f"unknown parameter {name!r}: use {', '.join(self.PARAMETERS)}")
        if name in self._values:
            raise RequestError(f"parameter {name!r} is given twice")
        if name == "cache":
            cache_mode(value)
        elif name == "l2_cache":
            parse_size(value, name)
        elif name == "lock":
            self._opener = Opener(locking(value))
        elif name == "trace":
            self._selection(value)
        elif name == "affinity":
            if value not in ("auto", "off"):
                raise RequestError(f"affinity={value} is not one of auto, off")
            self.crowd.enabled = self.crowd.enabled and value == "auto"
        elif not value:
            raise RequestError(f"{name}= needs a value")
        self._values[name] = value

    def _selection(self, text: str) -> TraceSelection:
        from .trace import TraceSelection

        return TraceSelection(text, self._trace_line)

    def configured(self) -> None:
        """There are no more parameters.  Raises RequestError if one is missing."""
        if "file" not in self._values:
            raise RequestError("parameter 'file' is missing: file=IMAGE.qed")

    def check(self) -> None:
        """Open the image read-only.  Raises QEDError."""
        self.image = self._open(writable=False)

    def _open(self, writable: bool) -> QEDImage:
        trace = self._selection(self._values["trace"]) if "trace" in self._values else None
        return open_image(
            self._values["file"],
            writable,
            cache=self._values.get("cache", "writeback"),
            l2_cache=parse_size(self._values["l2_cache"]) if "l2_cache" in self._values else DEFAULT_L2_CACHE,
            trace=trace,
            trace_dialect=trace.dialect if trace else "7.2",
            log=self._log,
            in_flight=self._in_flight,
            opener=self._opener,
        )

    def open(self, readonly: bool) -> None:
        """A connection begins.  Raises QEDError.  Not before any fork: it may start a thread."""
        with self._lock:
            if readonly or self.image.writable:
                return
            try:
                image = self._open(writable=True)
                try:
                    image.start_timer()
                except BaseException:
                    image.close()
                    raise
            except BaseException:
                self._opener.read_only()
                raise
            self._retired, self.image = self.image, image

    def close(self) -> None:
        """Close cleanly.  No requests are in flight.  Raises QEDError."""
        with self._lock:
            try:
                if hasattr(self, "image"):
                    self._tidy(self.image)
                    self.image.close()
            finally:
                if self._retired is not None:
                    self._retired.close()

    def _tidy(self, image: QEDImage) -> None:
        """An error in this is none in what clients were told."""
        if not image.writable:
            return
        from .compact import tidy

        try:
            holes = tidy(image)
        except QEDError as error:
            self._log(str(error))
        else:
            if holes:
                name = image.storage.name
                self._log(
                    f"{name}: {holes} clusters inside the file are free: give them back with qed check -r leaks"
                )
