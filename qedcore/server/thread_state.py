"""One Python thread state per server thread instead of one per request.

nbdkit wraps every callback in PyGILState_Ensure and PyGILState_Release. Its threads have no Python thread state of
their own, so CPython creates one when the callback starts and destroys it when the callback returns, which costs
several times a small request. Here the first request on a thread calls PyGILState_Ensure once more, so that the state
survives, and leaves with glibc's `__cxa_thread_atexit_impl` a list of plain C calls that give it back when the thread
ends. They run before glibc clears the thread keys under which CPython finds the state (right: references to it):

    pthread_mutex_lock(gate)                one thread at a time, and none any more once the gate is shut (I5)
    PyGILState_Ensure()           1 -> 2    takes the GIL
    PyGILState_Release(LOCKED)    2 -> 1    gives back what the first request took
    PyGILState_Release(UNLOCKED)  1 -> 0    destroys the state, releases the GIL
    pthread_mutex_unlock(gate)
    sem_post(returned)                      drain() waits for this one

I1. Nothing of ours runs in a thread that ends but these C functions: no Python code, no ctypes callback, hence
    nothing that the end of the interpreter frees under a thread which still points at it.
I2. The extra reference and the calls that give it back come in pairs: both or neither, once per thread state. The
    record of it (`this_thread`) lives in the thread state itself: it cannot outlive the state, and a later thread
    with the same identifier does not inherit it.
I3. A thread whose state Python created and destroys itself (the main thread, threading.Thread) is left alone: giving
    back a state that is gone aborts the process. The only such thread that cannot be told from a foreign one is one
    started with _thread.start_new_thread; it must not touch `this_thread`.
I4. The semaphore counts the threads that have made their last use of the interpreter, and drain() waits for every one
    of them before the interpreter ends: in cleanup(), and again through atexit in case that never ran. nbdkit joins
    the workers of a connection before it calls cleanup(), but not the thread of the connection itself, which with
    `-t 1` serves the requests and may still be ending while the interpreter is torn down.
I5. If drain() gives up, it takes the gate and keeps it: a thread that ends later sleeps until the process exits
    instead of entering an interpreter that is gone. The gate and the semaphore are never freed.
I6. Where any of this is unproven (not CPython 3.9 to 3.15, free-threaded, not Linux with glibc) enable() returns
    False and nothing changes but speed.

Lock: `_lock` guards the counters; no other lock is taken and no thread waited for while it is held.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import sys
import threading
import time
from types import CodeType
from typing import Any

# CPython versions on which tests/plugin/test_thread_state.py has run, first and last.
FIRST_VERSION = (3, 9)
LAST_VERSION = (3, 15)

# Runs a function when the calling thread ends; glibc's own, the C++ runtime uses it for thread_local objects.
THREAD_ATEXIT = "__cxa_thread_atexit_impl"

# seconds; a thread that ends needs microseconds, so only a wedged one is given up.
DRAIN_TIMEOUT = 10.0
# seconds; who holds the gate only waits for the GIL, which drain() does not hold while it waits.
GATE_TIMEOUT = 1.0

# bytes; sem_t and pthread_mutex_t take 48 at most on any glibc port.
_SYNC_SIZE = 128

# PyGILState_STATE
_LOCKED = 0
_UNLOCKED = 1


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]

    @classmethod
    def at(cls, monotonic: float) -> _Timespec:
        """The absolute time `monotonic` (seconds of CLOCK_MONOTONIC)."""
        seconds = int(monotonic)
        return cls(seconds, int((monotonic - seconds) * 1e9))


class _Native:
    """The C functions and the two C objects behind ThreadStates.

    Raises AttributeError where the C library lacks one of the functions, OSError or MemoryError where it refuses.
    """

    def __init__(self) -> None:
        quick = ctypes.PyDLL(None)  # keeps the GIL: nothing here waits
        waiting = ctypes.CDLL(None, use_errno=True)  # releases the GIL

        python = ctypes.pythonapi
        self.ensure = python.PyGILState_Ensure
        self.ensure.argtypes = []
        self.ensure.restype = ctypes.c_int

        register = quick[THREAD_ATEXIT]
        register.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        register.restype = ctypes.c_int
        self._register = register
        # Belongs to the library that must stay mapped until the calls have run: libpython.
        self._library = _address(python.Py_GetVersion)

        quick.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        quick.calloc.restype = ctypes.c_void_p
        for function in (quick.sem_init, quick.sem_getvalue, quick.sem_trywait, quick.pthread_mutex_init):
            function.restype = ctypes.c_int
        quick.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
        quick.sem_getvalue.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
        quick.sem_trywait.argtypes = [ctypes.c_void_p]
        quick.pthread_mutex_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._sem_getvalue = quick.sem_getvalue
        self._sem_trywait = quick.sem_trywait

        for function in (waiting.sem_clockwait, waiting.pthread_mutex_clocklock):
            function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec)]
            function.restype = ctypes.c_int
        self._sem_clockwait = waiting.sem_clockwait
        self._mutex_clocklock = waiting.pthread_mutex_clocklock

        unlock = _address(quick.pthread_mutex_unlock)
        lock = _address(quick.pthread_mutex_lock)
        post = _address(quick.sem_post)
        ensure = _address(python.PyGILState_Ensure)
        release = _address(python.PyGILState_Release)

        # I5: never freed.
        self._returned: int = quick.calloc(1, _SYNC_SIZE) or _out_of_memory()
        self._gate: int = quick.calloc(1, _SYNC_SIZE) or _out_of_memory()
        if quick.sem_init(self._returned, 0, 0) != 0 or quick.pthread_mutex_init(self._gate, None) != 0:
            raise OSError(errno.ENOSYS, "no semaphore or mutex")

        # (function, its argument), last to run first, as glibc wants them.
        self._at_exit = (
            (post, self._returned),
            (unlock, self._gate),
            (release, _UNLOCKED),
            (release, _LOCKED),
            (ensure, 0),
            (lock, self._gate),
        )

    def register(self) -> None:
        """Leave the calls of the module docstring with glibc, which obeys or, out of memory, ends the process."""
        for function, argument in self._at_exit:
            self._register(function, argument, self._library)

    def take_return(self) -> bool:
        """Consume the signal of one thread that has ended, if there is one."""
        return bool(self._sem_trywait(self._returned) == 0)

    def returns(self) -> int:
        """Threads that have ended and were not consumed yet."""
        value = ctypes.c_int()
        self._sem_getvalue(self._returned, ctypes.byref(value))
        return value.value

    def wait_return(self, deadline: float) -> bool:
        """Consume the signal of one thread, waiting for it until `deadline` (seconds, CLOCK_MONOTONIC)."""
        until = _Timespec.at(deadline)
        while self._sem_clockwait(self._returned, time.CLOCK_MONOTONIC, ctypes.byref(until)) != 0:
            if ctypes.get_errno() != errno.EINTR:
                return False
        return True

    def shut_gate(self) -> None:
        """From now on a thread that wants to give its state back sleeps until the process exits (I5)."""
        until = _Timespec.at(time.monotonic() + GATE_TIMEOUT)
        self._mutex_clocklock(self._gate, time.CLOCK_MONOTONIC, ctypes.byref(until))


class _ThisThread(threading.local):
    """Reading `kept` in a thread that has not done so yet runs __init__, which keeps the thread's state."""

    kept: bool
    moved: bool  # whether affinity.Crowd has moved the thread

    def __init__(self, states: ThreadStates) -> None:
        self.kept = states._keep()
        self.moved = False


class ThreadStates:
    """Keeps the thread state of every foreign thread that reads an attribute of `this_thread` until it ends.

    One object per process, made and enabled in the main thread. Reading `this_thread.kept` or `.moved` belongs at the
    start of every callback that serves a request: about 25 ns (a method would cost 40). `kept` is True where the
    state of the calling thread outlives the callback.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._native: _Native | None = None  # set once by enable()
        self._open = False  # _lock; False before enable() and after drain()
        self._kept = 0  # threads; _lock; those whose return was not consumed
        self.this_thread = _ThisThread(self)

    def enable(self) -> bool:
        """Start keeping thread states; False where that is not known to be safe. Raises nothing."""
        if self._native is not None:
            return self._open
        if not _supported():
            return False
        try:
            native = _Native()
        except (AttributeError, OSError, MemoryError):
            return False
        with self._lock:
            self._native = native
            self._open = True
        atexit.register(self.drain)
        return True

    @property
    def live(self) -> int:
        """Threads whose state is kept and that have not ended."""
        native = self._native
        if native is None:
            return 0
        with self._lock:
            return self._kept - native.returns()

    def drain(self, timeout: float = DRAIN_TIMEOUT) -> bool:
        """Keep no more states and wait until every thread has given its own back; False after `timeout` seconds.

        To be called by one thread, whose own state is not kept. Releases the GIL while it waits. Harmless twice.
        """
        native = self._native
        if native is None:
            return True
        with self._lock:
            was_open, self._open = self._open, False
        deadline = time.monotonic() + timeout
        while self._kept:
            if not native.wait_return(deadline if was_open else 0.0):
                if was_open:
                    native.shut_gate()
                return False
            with self._lock:
                self._kept -= 1
        return True

    def _keep(self) -> bool:
        """Keep the calling thread's state if it is a foreign thread; called once per thread state."""
        native = self._native
        if native is None or not _foreign_thread():
            return False
        with self._lock:
            if not self._open:
                return False
            # Bounds the semaphore by the threads alive at once, not by all threads ever.
            while native.take_return():
                self._kept -= 1
            self._kept += 1
            native.register()
            native.ensure()
        return True


def _supported() -> bool:
    return (
        sys.implementation.name == "cpython"
        and FIRST_VERSION <= sys.version_info[:2] <= LAST_VERSION
        and sys.platform == "linux"
        and "t" not in sys.abiflags  # free-threaded
        and _BOOTSTRAP is not None
    )


def _foreign_thread() -> bool:
    """True if neither the interpreter nor the threading module started the calling thread (I3)."""
    if threading.get_native_id() == os.getpid() or threading.get_ident() == threading.main_thread().ident:
        return False
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code is not _BOOTSTRAP


# The outermost frame of every threading.Thread.
_BOOTSTRAP: CodeType | None = getattr(getattr(threading.Thread, "_bootstrap", None), "__code__", None)


def _address(function: Any) -> int:
    """Address of a C function."""
    address: int | None = ctypes.cast(function, ctypes.c_void_p).value
    if address is None:
        raise AttributeError("symbol without an address")
    return address


def _out_of_memory() -> int:
    raise MemoryError
