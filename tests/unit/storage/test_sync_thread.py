"""Syncs of threads that are confined to one CPU."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest

from qedcore.errors import StorageError
from qedcore.storage.file import FileStorage
from qedcore.storage.sync_thread import SyncThread
from unit.fakes import Gate, Job


class Cpus:
    """Stands in for the system calls: the first thread has CPUs 0 to 2, all others are confined to CPU 1 at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[int, set[int]] = {os.getpid(): {0, 1, 2}}  # by native thread identifier
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: self.of.get(self._thread(pid), {1}))
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: self.of.update({self._thread(pid): cpus}))

    @staticmethod
    def _thread(pid: int) -> int:
        return pid or threading.get_native_id()


def has_sync_thread() -> bool:
    return "sync" in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> Cpus:
    return Cpus(monkeypatch)


def test_confined_threads_have_a_thread_that_is_not(cpus: Cpus) -> None:
    made: list[tuple[int, set[int]]] = []

    def sync() -> None:
        made.append((threading.get_native_id(), os.sched_getaffinity(0)))

    syncs = SyncThread(sync)
    syncs.sync()
    assert made == [(os.getpid(), {0, 1, 2})]  # not confined: no other thread
    modules = set(sys.modules)
    for _ in range(3):
        Job(syncs.sync).result()
    assert set(sys.modules) == modules  # no descriptor is needed: a server may have none left
    threads = {thread for thread, _ in made[1:]}
    assert len(made) == 4 and len(threads) == 1
    assert all(mask == {0, 1, 2} for _, mask in made)
    assert has_sync_thread()
    syncs.close()
    assert not has_sync_thread()
    syncs.close()


def test_error_of_the_other_thread(cpus: Cpus) -> None:
    errors: list[BaseException | None] = [StorageError("no"), MemoryError(), BaseException("odd"), None]

    def sync() -> None:
        error = errors.pop(0)
        if error is not None:
            raise error

    syncs = SyncThread(sync)
    for error in errors[:-1]:
        with pytest.raises(type(error)):  # type: ignore[arg-type]
            Job(syncs.sync).result()
    Job(syncs.sync).result()
    assert not errors
    syncs.close()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_no_more_threads(cpus: Cpus, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    made: list[int] = []
    syncs = SyncThread(lambda: made.append(threading.get_native_id()))

    def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            syncs.sync()
        assert made == [threading.get_native_id()]

    def fail(thread: threading.Thread) -> None:
        raise error

    Job(work).result()
    syncs.close()


def test_file_is_synced_there(cpus: Cpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    storage = FileStorage(tmp_path / "file", writable=True)
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: made.append((threading.current_thread().name, fd)))
    Job(storage.flush).result()
    assert made == [("sync", storage.fd)]
    storage.close()
    assert not has_sync_thread()


def test_each_waits_for_its_own_sync(cpus: Cpus) -> None:
    gate = Gate()
    syncs = SyncThread(gate.stop)
    for _ in range(3):
        job = Job(syncs.sync)
        gate.reached()
        job.join(0.05)
        assert job.is_alive(), "returned before its sync was over"
        gate.open()
        job.result()
    syncs.close()


def test_file_is_closed_after_the_last_sync(cpus: Cpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    storage = FileStorage(tmp_path / "file", writable=True)
    Job(storage.flush).result()
    close = os.close

    def closed(fd: int) -> None:
        assert not has_sync_thread()
        close(fd)

    monkeypatch.setattr(os, "close", closed)
    storage.close()


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "no"), AttributeError("sched_getaffinity"), MemoryError()])
def test_no_affinity(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A sandbox, or a system without: no other thread."""

    def fail(pid: int) -> set[int]:
        raise error

    monkeypatch.setattr(os, "sched_getaffinity", fail)
    made: list[str] = []
    SyncThread(lambda: made.append(threading.current_thread().name)).sync()
    assert made == [threading.current_thread().name]


def test_cpus_that_cannot_be_had(cpus: Cpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pid: int, mask: set[int]) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(os, "sched_setaffinity", fail)
    made: list[str] = []
    syncs = SyncThread(lambda: made.append(threading.current_thread().name))
    Job(syncs.sync).result()
    syncs.close()
    assert made == ["sync"]


def test_more_cpus_than_the_first_thread(cpus: Cpus) -> None:
    """The operator has moved that one only (taskset -p)."""
    cpus.of[os.getpid()] = {0}
    made: list[str] = []
    syncs = SyncThread(lambda: made.append(threading.current_thread().name))
    Job(syncs.sync, name="other").result()
    syncs.close()
    assert made == ["other"]
