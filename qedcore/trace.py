"""Names, arguments and printed form of the trace events; names of the fault points.

The names are QEMU's, so that old notes, scripts and eyes keep working.  Two dialects of the arguments: "7.2", the
default, and "2010", those of the original patch.  What raises them is traced.py; nothing here or there is
loaded while tracing is off.
"""

from __future__ import annotations

from typing import Callable

from .errors import RequestError

Tracer = Callable[[str, "tuple[object, ...]"], None]
FaultHook = Callable[[str], None]

# event -> its arguments in order; those named in _HEX print in hexadecimal
EVENTS_7_2 = {
    "qed_alloc_l2_cache_entry": ("l2_cache", "entry"),
    "qed_unref_l2_cache_entry": ("entry", "ref"),
    "qed_find_l2_cache_entry": ("l2_cache", "entry", "offset", "ref"),
    "qed_read_table": ("s", "offset", "table"),
    "qed_read_table_cb": ("s", "table", "ret"),
    "qed_write_table": ("s", "offset", "table", "index", "n"),
    "qed_write_table_cb": ("s", "table", "flush", "ret"),
    "qed_need_check_timer_cb": ("s",),
    "qed_start_need_check_timer": ("s",),
    "qed_cancel_need_check_timer": ("s",),
    "qed_aio_complete": ("s", "acb", "ret"),
    "qed_aio_setup": ("s", "acb", "sector_num", "nb_sectors", "opaque", "flags"),
    "qed_aio_next_io": ("s", "acb", "ret", "cur_pos"),
    "qed_aio_read_data": ("s", "acb", "ret", "offset", "len"),
    "qed_aio_write_data": ("s", "acb", "ret", "offset", "len"),
    "qed_aio_write_prefill": ("s", "acb", "start", "len", "offset"),
    "qed_aio_write_postfill": ("s", "acb", "start", "len", "offset"),
    "qed_aio_write_main": ("s", "acb", "ret", "offset", "len"),
}
EVENTS_2010 = {
    **{name: args for name, args in EVENTS_7_2.items() if "timer" not in name},
    "qed_write_table_cb": ("s", "table", "ret"),
    "qed_aio_setup": ("s", "acb", "sector_num", "nb_sectors", "opaque", "is_write"),
}
DIALECTS = {"7.2": EVENTS_7_2, "2010": EVENTS_2010}

_HEX = frozenset(("l2_cache", "entry", "s", "table", "acb", "opaque", "offset", "start", "cur_pos", "flags"))

# In the order in which a first write to an image meets them; then those of reads.
FAULT_POINTS = (
    "pwritev",
    "pwritev_zero",
    "cow_write",
    "write_aio",
    "flush_to_os",
    "flush_to_disk",
    "l2_update",
    "l1_update",
    "pwritev_done",
    "l2_load",
    "read_aio",
    "read_backing_aio",
)


class TraceSelection:
    """Which events to print, from "EVENT[,EVENT...]" or "all"; a dialect's name among them selects it."""

    def __init__(self, text: str, write: Callable[[str], None]) -> None:
        self._write = write
        words = text.split(",")
        self.dialect = "7.2"
        for word in words:
            if word in DIALECTS:
                self.dialect = word
        known = DIALECTS[self.dialect]
        names = [word for word in words if word not in DIALECTS]
        for name in names:
            if name not in known and name != "all":
                raise RequestError(f"trace={name} is not an event: use all, or {', '.join(known)}")
        self._events = {name: args for name, args in known.items() if name in names or "all" in names}

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        """Print one event, whose arguments are in the order of 7.2."""
        names = self._events.get(event)
        if names is not None:
            self._write(format_event(event, names, args))


def format_event(event: str, names: tuple[str, ...], args: tuple[object, ...]) -> str:
    """The line for an event: its name, then name and value of each argument."""
    words = [event]
    for name, value in zip(names, args):
        words.append(name)
        words.append(f"{value:#x}" if name in _HEX and isinstance(value, int) else str(value))
    return " ".join(words)
