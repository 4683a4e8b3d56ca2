"""Trace events as text, and their selection."""

from __future__ import annotations

import pytest

from qedcore.errors import RequestError
from qedcore.trace import DIALECTS, EVENTS_7_2, EVENTS_2010, TraceSelection, format_event

# name -> arguments, of QEMU 7.2 and of the patch of 2010 (None: no such event)
COUNTS: dict[str, tuple[int, int | None]] = {
    "qed_alloc_l2_cache_entry": (2, 2),
    "qed_unref_l2_cache_entry": (2, 2),
    "qed_find_l2_cache_entry": (4, 4),
    "qed_read_table": (3, 3),
    "qed_read_table_cb": (3, 3),
    "qed_write_table": (5, 5),
    "qed_write_table_cb": (4, 3),
    "qed_need_check_timer_cb": (1, None),
    "qed_start_need_check_timer": (1, None),
    "qed_cancel_need_check_timer": (1, None),
    "qed_aio_complete": (3, 3),
    "qed_aio_setup": (6, 6),
    "qed_aio_next_io": (4, 4),
    "qed_aio_read_data": (5, 5),
    "qed_aio_write_data": (5, 5),
    "qed_aio_write_prefill": (5, 5),
    "qed_aio_write_postfill": (5, 5),
    "qed_aio_write_main": (5, 5),
}


def test_tables_of_events() -> None:
    assert {name: len(args) for name, args in EVENTS_7_2.items()} == {n: c for n, (c, _) in COUNTS.items()}
    assert {name: len(args) for name, args in EVENTS_2010.items()} == {n: c for n, (_, c) in COUNTS.items() if c}
    assert DIALECTS == {"7.2": EVENTS_7_2, "2010": EVENTS_2010}


@pytest.mark.parametrize(
    ("event", "args", "line"),
    [
        ("aio_setup", (255, 16, 8, 4, None, 1), "s 0xff acb 0x10 sector_num 8 nb_sectors 4 opaque None flags 0x1"),
        ("aio_complete", (255, 16, -5), "s 0xff acb 0x10 ret -5"),
        ("write_table", (1, 65536, 2, 3, 64), "s 0x1 offset 0x10000 table 0x2 index 3 n 64"),
        ("aio_write_prefill", (1, 2, 0, 4096, 327680), "s 0x1 acb 0x2 start 0x0 len 4096 offset 0x50000"),
    ],
)
def test_format(event: str, args: tuple[object, ...], line: str) -> None:
    event = f"qed_{event}"
    assert format_event(event, EVENTS_7_2[event], args) == f"{event} {line}"


# selection -> (dialect, events that are printed)
SELECTIONS = {
    "all": ("7.2", set(EVENTS_7_2)),
    "qed_aio_setup": ("7.2", {"qed_aio_setup"}),
    "qed_aio_setup,qed_aio_complete": ("7.2", {"qed_aio_setup", "qed_aio_complete"}),
    "2010,all": ("2010", set(EVENTS_2010)),
    "all,2010": ("2010", set(EVENTS_2010)),
    "7.2,qed_aio_next_io": ("7.2", {"qed_aio_next_io"}),
    "all,qed_aio_setup": ("7.2", set(EVENTS_7_2)),
}


@pytest.mark.parametrize("text", SELECTIONS)
def test_selection(text: str) -> None:
    dialect, events = SELECTIONS[text]
    lines: list[str] = []
    selection = TraceSelection(text, lines.append)
    assert selection.dialect == dialect
    for name, args in EVENTS_7_2.items():
        selection(name, tuple(range(len(args))))
    assert {line.split()[0] for line in lines} == events


@pytest.mark.parametrize("text", ["", "x", "qed_aio", "all,x", "2011,all", "2010,qed_need_check_timer_cb", "all,"])
def test_bad_selection(text: str) -> None:
    with pytest.raises(RequestError, match="trace=.*is not an event"):
        TraceSelection(text, print)
