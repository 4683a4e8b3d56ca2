"""SharedImage: the one image that all connections of a server use.

It is opened read-only at first, so that a bad image is reported before the server forks and nothing is changed as
long as only readers come; the first connection that may write reopens it for writing.

The lock is held while the image is opened or closed, never during requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from .affinity import Crowd
from .backing import BackingPolicy
from .chain import open_image
from .errors import RequestError
from .image import DEFAULT_L2_CACHE, QEDImage
from .locks import Rank, ranked_lock
from .sizes import parse_size
from .storage.file import cache_mode

if TYPE_CHECKING:
    from .trace import TraceSelection


class SharedImage:
    """Configured by parameters, opened by check(), used through `image`."""

    PARAMETERS = ("file", "cache", "l2_cache", "affinity", "trace", "backing", "backing-dir", "backing-format")

    def __init__(self, log: Callable[[str], None], trace_line: Callable[[str], None]) -> None:
        self._log = log  # takes one-line notices
        self._trace_line = trace_line
        self._values: dict[str, str] = {}
        self._policy = BackingPolicy()
        self.crowd = Crowd()
        self._lock = ranked_lock(Rank.SHARED)
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
        elif name == "trace":
            self._selection(value)
        elif name == "affinity":
            if value not in ("auto", "off"):
                raise RequestError(f"affinity={value} is not one of auto, off")
            self.crowd.enabled = self.crowd.enabled and value == "auto"
        elif name.startswith("backing"):
            self._policy = self._policy.configured(name, value)
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
            policy=self._policy,
        )

    def open(self, readonly: bool) -> None:
        """A connection begins.  Raises QEDError.  Not before any fork: it may start a thread."""
        with self._lock:
            if readonly or self.image.writable:
                return
            image = self._open(writable=True)
            try:
                image.start_timer()
            except BaseException:
                image.close()
                raise
            self._retired, self.image = self.image, image

    def close(self) -> None:
        """Close cleanly.  No requests are in flight.  Raises QEDError."""
        with self._lock:
            try:
                if hasattr(self, "image"):
                    self.image.close()
            finally:
                if self._retired is not None:
                    self._retired.close()
