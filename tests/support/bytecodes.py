"""A call before each bytecode of some modules, from the first time on that a function runs.

Before CPython 3.12 that is what sys.settrace() does.  From there on it turns such events on too late for a frame that
has begun, so that a function that runs for the first time is not seen, or only the rest of it: sys.monitoring is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

Call = Callable[[CodeType, int], None]  # of a function's code, and the position in it


class _Watch(NamedTuple):
    modules: str  # part of the names of their files
    call: Call


_watches: dict[int, _Watch] = {}  # thread -> what it watches
_lock = threading.Lock()


@contextmanager
def before_each(modules: str, call: Call) -> Iterator[None]:
    """`call` runs before each bytecode of this thread in files with `modules` in their names, and may raise."""
    _start(_Watch(modules, call))
    try:
        yield
    finally:
        stop(threading.get_ident())


if sys.version_info >= (3, 12):
    _TOOL = 4  # of those that no well-known kind of tool has

    def _start(watch: _Watch) -> None:
        monitoring = sys.monitoring
        with _lock:
            if not _watches:
                monitoring.use_tool_id(_TOOL, __name__)
                monitoring.register_callback(_TOOL, monitoring.events.INSTRUCTION, _instruction)
                monitoring.set_events(_TOOL, monitoring.events.INSTRUCTION)
                monitoring.restart_events()  # where they were not wanted they may be now
            _watches[threading.get_ident()] = watch

    def stop(thread: int) -> None:
        """No calls in this thread from here on: for one that hangs, and is left behind."""
        monitoring = sys.monitoring
        with _lock:
            if _watches.pop(thread, None) is not None and not _watches:
                monitoring.set_events(_TOOL, 0)
                monitoring.free_tool_id(_TOOL)

    def _instruction(code: CodeType, position: int) -> Any:
        watch = _watches.get(threading.get_ident())
        if watch is not None and watch.modules in code.co_filename:
            watch.call(code, position)
        elif not any(other.modules in code.co_filename for other in list(_watches.values())):
            return sys.monitoring.DISABLE  # here, until somebody else starts
        return None

else:

    def _start(watch: _Watch) -> None:
        def trace(frame: FrameType, event: str, arg: object) -> Any:
            if event == "call":
                if watch.modules not in frame.f_code.co_filename:
                    return None
                frame.f_trace_lines = False
                frame.f_trace_opcodes = True
            elif event == "opcode":
                watch.call(frame.f_code, frame.f_lasti)
            return trace

        sys.settrace(trace)

    def stop(thread: int) -> None:
        """No calls in this thread from here on; one that hangs can be left as it is."""
        if thread == threading.get_ident():
            sys.settrace(None)
