"""The plugin's parameters: their names, their syntax, and which of them go together.  Nothing is opened here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

from ..backing.policy import BackingPolicy
from ..engine.chain import open_image
from ..engine.image import DEFAULT_L2_CACHE, QEDImage
from ..engine.in_flight import InFlight
from ..errors import ImageFormatError, NotQEDError, RequestError
from ..format.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR, Geometry, check_device_size, round_up
from ..storage import Storage
from ..storage.cache_mode import CacheMode, cache_mode
from ..storage.file_lock import Locking, locking
from ..units import parse_size

if TYPE_CHECKING:
    from ..trace import TraceSelection

# As nbdkit spells them.
_BOOLEANS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
_BOOLEANS.update(dict.fromkeys(("0", "false", "f", "no", "n", "off"), False))


class NewImage(NamedTuple):
    """What create=true is to make."""

    size: int | None  # bytes; None: that of the backing file
    cluster_size: int  # bytes
    table_size: int  # clusters
    backing_file: str | None
    backing_fmt: str | None  # "raw" or "qed"


class Parameters:
    """take() for each parameter, then complete(), then ask.

    `log` takes one-line notices, `trace_line` the lines of trace=.
    """

    OF_CREATE = ("size", "cluster_size", "table_size", "backing_file", "backing_fmt")
    OF_BACKING = ("backing", "backing-dir", "backing-format")
    NAMES = ("file", "dir", "cache", "l2_cache", "lock", *OF_BACKING, "affinity", "create", *OF_CREATE, "trace")

    def __init__(self, log: Callable[[str], None], trace_line: Callable[[str], None]) -> None:
        self.log = log
        self._trace_line = trace_line
        self._values: dict[str, str] = {}
        self._policy = BackingPolicy()
        self.locking = Locking.AUTO
        self.new: NewImage | None = None  # what to create, after complete()

    def take(self, name: str, value: str) -> None:
        """One parameter.  Raises RequestError if it is unknown, repeated or malformed."""
        if name not in self.NAMES:
            raise RequestError(f"unknown parameter {name!r}: use {', '.join(self.NAMES)}")
        if name in self._values:
            raise RequestError(f"parameter {name!r} is given twice")
        if name == "cache":
            cache_mode(value)
        elif name in ("l2_cache", "size", "cluster_size", "table_size"):
            parse_size(value, name)
        elif name in self.OF_BACKING:
            self._policy = self._policy.configured(name, value)
        elif name == "lock":
            self.locking = locking(value)
        elif name == "trace":
            self._selection(value)
        elif name == "affinity":
            _one_of(name, value, ("auto", "off"))
        elif name == "backing_fmt":
            _one_of(name, value, ("raw", "qed"))
        elif name == "create":
            if value.lower() not in _BOOLEANS:
                raise RequestError(f"create={value} is neither true nor false")
        elif not value:
            raise RequestError(f"{name}= needs a value")
        self._values[name] = value

    def _selection(self, text: str) -> TraceSelection:
        from ..trace import TraceSelection

        return TraceSelection(text, self._trace_line)

    def complete(self) -> None:
        """There are no more.  Raises RequestError or ImageFormatError if they do not go together."""
        values = self._values
        if "file" in values and "dir" in values:
            raise RequestError("file and dir exclude each other: serve one image, or those of a directory")
        if "file" not in values and "dir" not in values:
            raise RequestError("parameter 'file' is missing: file=IMAGE.qed, or dir=DIRECTORY")
        if _BOOLEANS[values.get("create", "false").lower()]:
            self.new = self._new_image()
        else:
            for name in self.OF_CREATE:
                if name in values:
                    raise RequestError(f"{name}= describes a new image: it needs create=true")

    def _new_image(self) -> NewImage:
        values = self._values
        if "dir" in values:
            raise RequestError("create=true needs file=: it makes one image, not those of a directory")
        if ("backing_file" in values) != ("backing_fmt" in values):
            raise RequestError("backing_file= and backing_fmt= need each other: backing_fmt=raw or backing_fmt=qed")
        if "size" not in values and "backing_file" not in values:
            raise RequestError("create=true needs size=, or a backing file whose size to take")
        new = NewImage(
            parse_size(values["size"]) if "size" in values else None,
            parse_size(values["cluster_size"]) if "cluster_size" in values else DEFAULT_CLUSTER_SIZE,
            parse_size(values["table_size"]) if "table_size" in values else DEFAULT_TABLE_SIZE,
            values.get("backing_file"),
            values.get("backing_fmt"),
        )
        geometry = Geometry(new.cluster_size, new.table_size)
        if new.size is not None:
            geometry.check_image_size(round_up(new.size, SECTOR))
            check_device_size(new.size)
        return new

    @property
    def file(self) -> str | None:
        return self._values.get("file")

    @property
    def directory(self) -> str:
        """When there is no file."""
        return self._values["dir"]

    @property
    def affinity(self) -> bool:
        return self._values.get("affinity", "auto") == "auto"

    def given(self, name: str) -> bool:
        return name in self._values

    def open_image(
        self,
        path: str,
        writable: bool,
        opener: Callable[[str, bool, CacheMode], Storage],
        in_flight: InFlight,
    ) -> QEDImage:
        """Open an image and its backing chain as the parameters say.  Raises QEDError."""
        trace = self._selection(self._values["trace"]) if "trace" in self._values else None
        try:
            return open_image(
                path,
                writable,
                cache=self._values.get("cache", "writeback"),
                l2_cache=parse_size(self._values["l2_cache"]) if "l2_cache" in self._values else DEFAULT_L2_CACHE,
                trace=trace,
                trace_dialect=trace.dialect if trace else "7.2",
                log=self.log,
                opener=opener,
                policy=self._policy,
                in_flight=in_flight,
            )
        except NotQEDError:
            raise
        except ImageFormatError as error:
            advice = "qed check -r all repairs what it can, qed salvage rescues what is left"
            raise ImageFormatError(f"{error}: {advice}") from None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name}={value} is not one of {', '.join(allowed)}")
