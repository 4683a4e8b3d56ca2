"""Histories of the real server: what its system calls did to the image, and what its clients were told when.

The recorder is strace, which knows nothing of the engine: the calls that it saw, made again on the image as it was,
must give the image as it is, or the recording is refused.  Clients are connections over NBD.  Both have the clock of
the machine:

    client    begin ............................................ answer
    server            pwrite (call -- return)   fdatasync (call -- return)

A call counts from its return on, a flush covers what had returned when it was called, and an answer is noted after
it has come: so each crash state is one that was possible, and no write is expected before it had to be there.
"""

from __future__ import annotations

import bisect
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from crash.engine import IMAGE, Guest, History, Setup
from crash.guest import GuestModel, Read
from support.crashes import Op
from support.server import Nbdkit, import_nbd, wait_for
from support.tools import PLUGIN, REPO, require, run, unavailable

# What changes a file or makes it durable.  Any other call on the image that is not known to be harmless is an error.
_CHANGES = ("pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "fdatasync", "fsync")
_HARMLESS = (
    "openat,close,pread64,preadv,preadv2,read,lseek,fstat,newfstatat,statx,fcntl,ioctl,fadvise64,flock,readlink,access,"
    "faccessat2,stat,lstat,readahead,getdents64,execve,getcwd,dup,mincore"
)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+).*<(\d+\.\d+)>")
_DATA = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
MIX = (45, 12, 10, 16, 9, 0)  # as in crash.engine, without the timer


class Call(NamedTuple):
    """A system call on the image that succeeded."""

    name: str
    args: str
    result: int
    called: int  # line of the log
    returned: int  # line of the log
    time: float  # seconds: when it returned

    def op(self) -> Op:
        """What it did to the image."""
        if self.name.startswith("pwrite"):
            data = b"".join(bytes.fromhex(part.replace("\\x", "")) for part in _DATA.findall(self.args))
            words = self.args.split(", ")  # fd, data..., length or how many, offset; and flags
            return Op(IMAGE, int(words[-2 if self.name == "pwritev2" else -1]), data[: self.result])
        numbers = [int(word) for word in self.args.split(", ") if word.isdigit()]
        if self.name == "ftruncate":
            return Op(IMAGE, size=numbers[1])
        if self.name == "fallocate":
            assert "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE" in self.args, self.args
            return Op(IMAGE, numbers[1], bytes(numbers[2]))
        return Op(IMAGE)


def strace_argv(log: Path, image: Path) -> list[str]:
    """In front of a command, which runs in the same process."""
    argv = ["strace", "-D", "-f", "-q", "-ttt", "-T", "-xx", "-s", "10000000", "-o", str(log), "-P", str(image)]
    return [*argv, "-e", f"trace=!{_HARMLESS}"]


def parse(log: str) -> list[Call]:
    """In the order in which they returned."""
    calls: list[Call] = []
    unfinished: dict[str, tuple[str, int]] = {}  # thread -> the start of its call, and its line
    for number, line in enumerate(log.splitlines()):
        thread, when, text = line.split(maxsplit=2)
        if text.startswith(("---", "+++")):
            continue
        if text.endswith(" <unfinished ...>"):
            unfinished[thread] = text[: -len(" <unfinished ...>")], number
            continue
        called, resumed = number, text.startswith("<... ")
        if resumed:
            start, called = unfinished.pop(thread)
            text = start + text.partition(" resumed>")[2]
        done = _CALL.fullmatch(text)
        if done is None or int(done.group(3)) < 0:
            continue  # it failed, or the process was killed in it
        name, args, result, seconds = done.groups()
        assert name in _CHANGES, f"the server calls {name}: {text[:200]}"
        calls.append(Call(name, args, int(result), called, number, float(when) + (not resumed) * float(seconds)))
    return calls


class Told:
    """What a Guest wants of a History and of its model, for threads that really run at once."""

    def __init__(self, setup: Setup) -> None:
        self._lock = threading.Lock()
        self._model = GuestModel(setup.initial, setup.sectors)
        self.events: list[tuple[float, str, tuple[Any, ...]]] = []  # with the time in seconds

    @property
    def model(self) -> Told:
        return self

    def tell(self, method: str, *args: Any) -> Any:
        with self._lock:
            self.events.append((time.time(), method, args))
            return getattr(self._model, method)(*args)

    def alone(self, number: int) -> bool:
        with self._lock:
            return self._model.alone(number)

    def begin_read(self, sectors: range) -> Read:
        with self._lock:
            return self._model.begin_read(sectors)

    def check_read(self, read: Read, found: bytes) -> None:
        with self._lock:
            self._model.check_read(read, found)


class Device:
    """What a Guest wants of an image, over NBD."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        nbd = import_nbd()
        self._fua, self._no_hole = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE

    def pread(self, length: int, pos: int) -> bytes:
        return bytes(self._handle.pread(length, pos))

    def pwrite(self, data: bytes, pos: int, fua: bool) -> None:
        self._handle.pwrite(data, pos, self._fua if fua else 0)

    def zero(self, pos: int, length: int, fua: bool, may_trim: bool) -> None:
        self._handle.zero(length, pos, (self._fua if fua else 0) | (0 if may_trim else self._no_hole))

    def trim(self, pos: int, length: int, fua: bool) -> None:
        self._handle.trim(length, pos, self._fua if fua else 0)

    def flush(self) -> None:
        self._handle.flush()


class Recording:
    """An image, and the programs that run on it, one after the other."""

    def __init__(self, setup: Setup) -> None:
        require("strace")
        if run(["strace", "-D", "-o", os.devnull, "true"]).rc != 0:
            unavailable("strace may not trace here")
        self.setup = setup
        self._image = setup.path.with_name(IMAGE)
        self._image.write_bytes(setup.first)
        self._log = setup.path.with_name("strace")
        self._told = Told(setup)
        self.ops: list[Op] = []  # in the order in which they were over
        self._times: list[float] = []  # seconds: when each was over, in rising order
        self._tags = iter(range(1, 1 << 32))

    def serve(
        self, rng: random.Random, clients: int, requests: int, *, plugin: Path = PLUGIN, kill: bool = False
    ) -> None:
        """A life of a server, with so many requests of each client.  Raises Violation."""
        server = Nbdkit({"file": str(self._image)}, plugin=plugin, wrapper=strace_argv(self._log, self._image))
        errors: list[BaseException] = []
        try:
            server.start()
            threads = [
                threading.Thread(target=self._client, args=(server, random.Random(rng.random()), requests, errors))
                for _ in range(clients)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]
            if kill:
                server.kill()
            else:
                began = self._told.tell("begin_flush")
                server.stop()
                self._told.tell("end_flush", began)
            assert "Traceback" not in server.log(), server.log()
        finally:
            server.remove()
        self._take_calls(server.pid)

    def _client(self, server: Nbdkit, rng: random.Random, requests: int, errors: list[BaseException]) -> None:
        try:
            handle = server.connect()
            told: Any = self._told
            device: Any = Device(handle)
            Guest(self.setup, told, device, rng, self._tags).run(requests, MIX)
            handle.shutdown()
        except BaseException as error:  # noqa: BLE001 - raised by serve()
            errors.append(error)

    def command(self, *words: str) -> None:
        """`qed WORDS IMAGE`."""
        argv = [*strace_argv(self._log, self._image), sys.executable, "-m", "qedcore", *words, str(self._image)]
        with subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            out, _ = process.communicate()
        assert process.returncode == 0, out
        self._take_calls(process.pid)

    def _take_calls(self, pid: int) -> None:
        """Once strace, which may outlive the process, has written all."""
        ended = re.compile(rf"^{pid} .*\+\+\+ (exited|killed)", re.MULTILINE)
        wait_for(lambda: ended.search(self._log.read_text()), "the end of strace's log")
        calls = parse(self._log.read_text())
        self._log.unlink()
        returned = [call.returned for call in calls]
        first = len(self.ops)
        for call in calls:
            op = call.op()
            if op.is_flush:
                op = op._replace(covers=first + bisect.bisect_left(returned, call.called))
            self.ops.append(op)
            self._times.append(max(call.time, *self._times[-1:], 0.0))

    def history(self) -> History:
        """For crash.engine.check().  Raises AssertionError if the recording has missed something."""
        history = History(self.setup)
        history.world.log = self.ops
        for op in self.ops:
            op.apply(history.world.files)
        assert history.world.files[IMAGE] == self._image.read_bytes(), "the system calls do not give the image"
        history.events = self.events()
        return history

    def events(self) -> list[tuple[int, str, tuple[Any, ...]]]:
        """What the clients were told (History.events)."""
        return [(bisect.bisect_left(self._times, when), method, args) for when, method, args in self._told.events]
