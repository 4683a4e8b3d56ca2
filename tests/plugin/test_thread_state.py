"""qedcore.server.thread_state under the real nbdkit, and in every libpython at hand.

The plugin below serves a RAM disk. Some offsets are commands: a read there raises, reports, or stays in flight until
the test lets it go. Nothing sleeps: such a request announces itself on a pipe, and one byte on another ends them all.

QED_THREAD_STATE_RUNS: how often the start-and-stop test starts a server (default 30).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from qedcore.server import thread_state
from qedcore.server.thread_state import ThreadStates

CHECKOUT = Path(__file__).resolve().parents[2]
RUNS = int(os.environ.get("QED_THREAD_STATE_RUNS", "30"))

NBDKIT = shutil.which("nbdkit")
CC = shutil.which("cc") or shutil.which("gcc")
LIMIT = 60  # seconds; for what must end by itself: a hang is a failure, not a stuck test run

SECTOR = 512  # bytes
DATA_END = 1 << 20  # bytes; the RAM disk, then one sector per command
RAISE_OSERROR, RAISE_VALUEERROR, HOLD, REPORT, SHUTDOWN = (DATA_END + i * SECTOR for i in range(5))
DISK_SIZE = DATA_END + 5 * SECTOR

COUNT_STATES = '''
def count_states():
    """Thread states of this interpreter; the GIL, held throughout, keeps the list together."""
    api = ctypes.pythonapi
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    api.PyInterpreterState_ThreadHead.argtypes = [ctypes.c_void_p]
    api.PyInterpreterState_ThreadHead.restype = ctypes.c_void_p
    api.PyThreadState_Next.argtypes = [ctypes.c_void_p]
    api.PyThreadState_Next.restype = ctypes.c_void_p
    count = 0
    state = api.PyInterpreterState_ThreadHead(api.PyInterpreterState_Get())
    while state:
        count += 1
        state = api.PyThreadState_Next(state)
    return count
'''

PLUGIN = (
    f"CHECKOUT = {str(CHECKOUT)!r}\n"
    f"DATA_END, DISK_SIZE = {DATA_END}, {DISK_SIZE}\n"
    f"RAISE_OSERROR, RAISE_VALUEERROR, HOLD = {RAISE_OSERROR}, {RAISE_VALUEERROR}, {HOLD}\n"
    f"REPORT, SHUTDOWN = {REPORT}, {SHUTDOWN}\n"
    + COUNT_STATES
    + """
import ctypes, errno, json, os, select, sys
sys.path.insert(0, CHECKOUT)
import nbdkit
from qedcore.server import thread_state

API_VERSION = 2
open_file = open
if os.environ.get("NO_SYMBOL"):
    thread_state.THREAD_ATEXIT = "no_such_symbol"
disk = bytearray(DATA_END)
states = thread_state.ThreadStates()
this_thread = states.this_thread
enabled = None
arrived = int(os.environ["ARRIVED_FD"])
let_go = int(os.environ["LET_GO_FD"])

def rss_kib():
    with open_file("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)

def report(**more):
    return json.dumps(dict(enabled=enabled, live=states.live, states=count_states(), rss_kib=rss_kib(), **more))

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def config(key, value):
    global report_path
    report_path = value

def config_complete():
    global enabled
    enabled = states.enable()

def cleanup():
    drained = states.drain()
    with open_file(report_path, "w") as out:
        out.write(report(drained=drained))

def open(readonly):
    return object()

def get_size(h):
    return DISK_SIZE

def pread(h, buf, offset, flags):
    kept = this_thread.kept
    if offset < DATA_END:
        buf[:] = disk[offset:offset + len(buf)]
    elif offset == RAISE_OSERROR:
        nbdkit.set_error(errno.ENOSPC)
        raise OSError(errno.ENOSPC, "asked for")
    elif offset == RAISE_VALUEERROR:
        raise ValueError("asked for")
    elif offset == HOLD:
        os.write(arrived, b"x")
        select.select([let_go], [], [])
        os.write(arrived, b"x")
    elif offset == REPORT:
        buf[:] = report(kept=kept).encode().ljust(len(buf))
    elif offset == SHUTDOWN:
        nbdkit.shutdown()

def pwrite(h, buf, offset, flags):
    this_thread.kept
    disk[offset:offset + len(buf)] = buf

def flush(h, flags):
    this_thread.kept
"""
)


class Server:
    """One nbdkit, ready for connections when the constructor returns, dead when the `with` block ends."""

    def __init__(self, directory: Path, threads: int = 16, daemon: bool = False, no_symbol: bool = False) -> None:
        assert NBDKIT is not None
        self._files: list[int] = []
        self._daemon = daemon
        self._ended = False
        script = directory / "ram.py"
        script.write_text(PLUGIN)
        self._report_path = directory / "report.json"
        self._report_path.unlink(missing_ok=True)
        self.socket_path = directory / "socket"
        self.socket_path.unlink(missing_ok=True)
        self._stderr_path = directory / "stderr"
        self._pid_path = directory / "pid"
        arrived_r, arrived_w = self._pipe()
        let_go_r, let_go_w = self._pipe()
        self._arrived, self._let_go, self._let_go_back = arrived_r, let_go_w, let_go_r
        env = dict(os.environ, PYTHONFAULTHANDLER="1", ARRIVED_FD=str(arrived_w), LET_GO_FD=str(let_go_r))
        if no_symbol:
            env["NO_SYMBOL"] = "1"
        command = [NBDKIT, "-t", str(threads), "python", str(script), f"report={self._report_path}"]
        passed = [arrived_w, let_go_r]
        listener: socket.socket | None = None
        if daemon:
            command[1:1] = ["-U", str(self.socket_path), "-P", str(self._pid_path)]
        else:
            # Socket activation: the socket accepts from the start, so there is nothing to wait for. It goes from
            # stdin to descriptor 3, where nbdkit expects it.
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.socket_path))
            listener.listen(128)
            activate = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            command = ["/bin/sh", "-c", activate, "sh", *command]
        with open(self._stderr_path, "wb") as stderr:
            self._process = subprocess.Popen(
                command,
                env=env,
                pass_fds=passed,
                stdin=subprocess.DEVNULL if listener is None else listener.fileno(),
                stderr=stderr,
            )
        self._close(arrived_w)
        if listener is not None:
            listener.close()
        if daemon:
            assert self._process.wait(LIMIT) == 0, self._stderr_path.read_text()

    def _pipe(self) -> tuple[int, int]:
        """Reading and writing end, out of the way of descriptor 3."""
        low = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in low]
        for fd in low:
            os.close(fd)
        self._files += high
        return high[0], high[1]

    def _close(self, fd: int) -> None:
        self._files.remove(fd)
        os.close(fd)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._daemon and not self._ended:
            os.kill(int(self._pid_path.read_text()), signal.SIGKILL)
        while self._files:
            self._close(self._files[-1])

    def connect(self) -> Any:
        client = nbd.NBD()
        client.connect_unix(str(self.socket_path))
        return client

    def wait_holds(self, n: int) -> None:
        """Return when `n` more reads of HOLD have started, or after let_go() have ended."""
        while n:
            got = len(os.read(self._arrived, n))
            assert got, "server died: " + self._stderr_path.read_text()
            n -= got

    def let_go(self) -> None:
        """End all reads of HOLD, started or not, until hold_again()."""
        os.write(self._let_go, b"x")

    def hold_again(self) -> None:
        os.read(self._let_go_back, 1)

    def report(self) -> dict[str, Any]:
        client = self.connect()
        answer = json.loads(bytes(client.pread(SECTOR, REPORT)))
        client.shutdown()
        assert isinstance(answer, dict)
        return answer

    def report_at_rest(self) -> dict[str, Any]:
        """Report once earlier connections have ended, so that no states but those of 16 workers are kept."""
        client = self.connect()
        deadline = time.monotonic() + LIMIT
        while True:
            answer = json.loads(bytes(client.pread(SECTOR, REPORT)))
            assert isinstance(answer, dict)
            if answer["live"] <= 16:
                client.shutdown()
                return answer
            assert time.monotonic() < deadline, answer

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the server; what cleanup() reported. Fails unless it ended in peace."""
        if self._daemon:  # not our child, but the last to hold this pipe
            while os.read(self._arrived, 4096):
                pass
        else:
            assert self._process.wait(LIMIT) == 0, self._stderr_path.read_text()
        self._ended = True
        stderr = self._stderr_path.read_text()
        assert "Fatal" not in stderr, stderr
        assert "most recent call first" not in stderr, stderr  # faulthandler
        answer = json.loads(self._report_path.read_text())
        assert isinstance(answer, dict)
        return answer

    def stop(self) -> dict[str, Any]:
        self.terminate()
        return self.finish()


try:
    import nbd
except ImportError:
    nbd = None

needs_nbdkit = pytest.mark.skipif(NBDKIT is None or nbd is None, reason="needs nbdkit and python3-libnbd")


def start_reads(client: Any, offsets: list[int]) -> list[tuple[Any, int]]:
    buffers = [nbd.Buffer(SECTOR) for _ in offsets]
    return [(buffer, client.aio_pread(buffer, offset)) for buffer, offset in zip(buffers, offsets)]


def finish_reads(client: Any, reads: list[tuple[Any, int]]) -> list[str | None]:
    """Wait for the reads; per read None or the name of its errno."""
    results: list[str | None] = []
    for _, cookie in reads:
        try:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
            results.append(None)
        except nbd.Error as error:
            results.append(error.errno)
    return results


def drop(client: Any) -> None:
    """Close the connection under the server's feet.

    Not with more than one request in flight: when two replies fail, nbdkit 1.32.4 to 1.33.9 itself aborts, whatever
    the plugin ("raw_send_socket: Assertion `sock >= 0' failed"; its commit 9d82aa4f repairs that).
    """
    with socket.socket(fileno=os.dup(client.aio_get_fd())) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def hang_up(client: Any) -> None:
    """Close our half of the connection: the server sees its end while it still works on requests."""
    with socket.socket(fileno=os.dup(client.aio_get_fd())) as sock:
        sock.shutdown(socket.SHUT_WR)


@needs_nbdkit
def test_thousand_connections_leave_nothing_behind(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        warm: dict[str, Any] = {}
        for i in range(1000):
            if i == 200:
                warm = server.report_at_rest()
            client = server.connect()
            client.pwrite(bytes([i % 255 + 1]) * SECTOR, 0)
            reads = start_reads(client, [0] * 6 + [RAISE_OSERROR, RAISE_VALUEERROR])
            assert finish_reads(client, reads) == [None] * 6 + ["ENOSPC", "EIO"]
            assert all(bytes(buffer.to_bytearray()) == bytes([i % 255 + 1]) * SECTOR for buffer, _ in reads[:6])
            if i % 4 == 0:
                client.aio_pread(nbd.Buffer(SECTOR), 0)
                drop(client)
            elif i % 4 == 1:
                reads = start_reads(client, [0] * 8)
                hang_up(client)
                # nbdkit works on what it has started and refuses the rest.
                assert set(finish_reads(client, reads)) <= {None, "ESHUTDOWN"}
            elif i % 4 == 2:
                drop(client)
            else:
                client.shutdown()
        last = server.report_at_rest()
        assert last["enabled"] and last["kept"]
        # Eleven states and 57 KB per connection is what keeping without giving back costs: 45 MB here.
        assert last["rss_kib"] - warm["rss_kib"] < 6 * 1024
        final = server.stop()
    assert (final["drained"], final["live"], final["states"]) == (True, 0, 1)


@needs_nbdkit
def test_state_survives_between_requests_of_a_thread(tmp_path: Path) -> None:
    """One worker (here the thread of the connection itself): its state is kept by the first request, once."""
    with Server(tmp_path, threads=1) as server:
        client = server.connect()
        for _ in range(100):
            client.pread(SECTOR, 0)
        answer = json.loads(bytes(client.pread(SECTOR, REPORT)))
        assert (answer["kept"], answer["live"], answer["states"]) == (True, 1, 2)
        client.shutdown()
        final = server.stop()
    assert (final["drained"], final["live"], final["states"]) == (True, 0, 1)


@needs_nbdkit
@pytest.mark.parametrize("threads", [1, 16])
def test_disconnect_with_requests_in_flight(tmp_path: Path, threads: int) -> None:
    in_flight = min(threads, 8)
    with Server(tmp_path, threads=threads) as server:
        for _ in range(20):
            gone = [server.connect() for _ in range(8)]
            for client in gone:
                start_reads(client, [HOLD])
            leaving = [server.connect() for _ in range(3)]
            held = [start_reads(client, [HOLD] * in_flight) for client in leaving]
            server.wait_holds(8 + 3 * in_flight)
            for client in gone:
                drop(client)
            for client in leaving:
                hang_up(client)
            server.report()  # others are served meanwhile
            server.let_go()
            server.wait_holds(8 + 3 * in_flight)
            server.hold_again()
            for client, reads in zip(leaving, held):
                assert finish_reads(client, reads) == [None] * in_flight
        final = server.stop()
    assert (final["drained"], final["live"], final["states"]) == (True, 0, 1)


@needs_nbdkit
@pytest.mark.parametrize("run", range(RUNS))
def test_start_and_stop(tmp_path: Path, run: int) -> None:
    """SIGTERM with requests in flight, right behind a disconnect, on idle and on worked-out threads."""
    threads = (16, 1, 2)[run % 3]
    in_flight = min(threads, 6)
    way = run // 3 % 3
    with Server(tmp_path, threads=threads) as server:
        clients = [server.connect() for _ in range(3)]
        for client in clients:
            finish_reads(client, start_reads(client, [0] * 4 + [RAISE_OSERROR]))
        if way == 0:  # requests in flight, which end after the signal; the clients stay until they are answered
            held = [start_reads(client, [HOLD] * in_flight) for client in clients]
            server.wait_holds(3 * in_flight)
            server.terminate()
            server.let_go()
            for client, reads in zip(clients, held):
                finish_reads(client, reads)
                drop(client)
        elif way == 1:  # requests in flight of clients that are gone
            for client in clients:
                start_reads(client, [HOLD])
            server.wait_holds(3)
            for client in clients:
                drop(client)
            server.terminate()
            server.let_go()
        else:  # connections that are just ending: their threads race with the end of the interpreter
            for client in clients:
                client.shutdown()
            server.terminate()
        final = server.finish()
    assert (final["drained"], final["live"], final["states"]) == (True, 0, 1)


@needs_nbdkit
def test_daemon(tmp_path: Path) -> None:
    """enable() ran before nbdkit forked into the background."""
    with Server(tmp_path, daemon=True) as server:
        client = server.connect()
        finish_reads(client, start_reads(client, [0] * 16))
        assert json.loads(bytes(client.pread(SECTOR, REPORT)))["kept"]
        client.pread(SECTOR, SHUTDOWN)
        drop(client)
        final = server.finish()
    assert (final["drained"], final["live"], final["states"]) == (True, 0, 1)


@needs_nbdkit
def test_served_the_slow_way_without_the_symbol(tmp_path: Path) -> None:
    with Server(tmp_path, no_symbol=True) as server:
        for _ in range(10):
            client = server.connect()
            client.pwrite(b"5" * SECTOR, SECTOR)
            assert bytes(client.pread(SECTOR, SECTOR)) == b"5" * SECTOR
            assert finish_reads(client, start_reads(client, [0] * 15 + [RAISE_OSERROR])) == [None] * 15 + ["ENOSPC"]
            client.shutdown()
        answer = server.report()
        assert (answer["enabled"], answer["kept"], answer["live"]) == (False, False, 0)
        final = server.stop()
    assert (final["drained"], final["live"], final["states"]) == (True, 0, 1)


@pytest.mark.parametrize("name", ["THREAD_ATEXIT", "_supported"])
def test_enable_refuses_where_it_is_unproven(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(thread_state, name, {"THREAD_ATEXIT": "no_such_symbol", "_supported": lambda: False}[name])
    states = ThreadStates()
    assert states.enable() is False
    assert states.enable() is False
    assert states.this_thread.kept is False
    assert states.live == 0
    assert states.drain(timeout=0) is True


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (sys.implementation, "name", "pypy"),
        (sys, "version_info", (3, 8, 18)),
        (sys, "version_info", (3, 16, 0)),
        (sys, "platform", "freebsd14"),
        (sys, "abiflags", "t"),
    ],
)
def test_unsupported(monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object) -> None:
    monkeypatch.setattr(module, name, value)
    assert thread_state._supported() is False


def test_threads_of_python_are_not_foreign() -> None:
    answers = [thread_state._foreign_thread()]
    thread = threading.Thread(target=lambda: answers.append(thread_state._foreign_thread()))
    thread.start()
    thread.join()
    assert answers == [False, False]


def test_before_enable_nothing_is_kept() -> None:
    states = ThreadStates()
    assert states.this_thread.kept is False
    assert states.drain(timeout=0) is True


# A server in small: threads without a Python thread state, which call request() with PyGILState_Ensure and Release
# around each call as nbdkit's do, then the end of the interpreter. Workers are joined before cleanup(); connections
# have made their last call by then but have not ended.
EMBED = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

void Py_Initialize(void);
int Py_FinalizeEx(void);
int PyRun_SimpleString(const char *);
void *PyEval_SaveThread(void);
void PyEval_RestoreThread(void *);
int PyGILState_Ensure(void);
void PyGILState_Release(int);

static int calls, let_go[2];
static pthread_barrier_t counted_out;

static void call(const char *code)
{
  int state = PyGILState_Ensure();
  if (PyRun_SimpleString(code) != 0) _exit(3);
  PyGILState_Release(state);
}

static void *worker(void *unused)
{
  for (int i = 0; i < calls; i++) call("request()");
  return unused;
}

static void *connection(void *unused)
{
  char byte;
  worker(NULL);
  pthread_barrier_wait(&counted_out);
  if (read(let_go[0], &byte, 1) != 0) _exit(4);   /* ends when the writing side is closed */
  return unused;
}

int main(int argc, char **argv)
{
  const char *mode = argv[1];
  int threads = atoi(argv[2]);
  pthread_t *ids = calloc(threads, sizeof *ids);
  char assign[64];

  calls = atoi(argv[3]);
  Py_Initialize();
  if (PyRun_SimpleString(argv[4]) != 0) return 2;
  if (pipe(let_go) != 0) return 2;
  snprintf(assign, sizeof assign, "let_go = %d", let_go[1]);
  PyRun_SimpleString(assign);
  void *main_state = PyEval_SaveThread();

  if (strcmp(mode, "workers") == 0) {
    for (int round = 0; round < 5; round++) {
      for (int i = 0; i < threads; i++) if (pthread_create(&ids[i], NULL, worker, NULL) != 0) return 2;
      for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    }
  } else {
    pthread_barrier_init(&counted_out, NULL, threads + 1);
    for (int i = 0; i < threads; i++) if (pthread_create(&ids[i], NULL, connection, NULL) != 0) return 2;
    pthread_barrier_wait(&counted_out);
  }
  call("cleanup()");
  if (strcmp(mode, "workers") == 0) {
    if (pthread_create(&ids[0], NULL, worker, NULL) != 0) return 2;
    pthread_join(ids[0], NULL);
    call("assert not kept[-1]");
  }
  PyEval_RestoreThread(main_state);
  if (Py_FinalizeEx() != 0) return 5;
  if (strcmp(mode, "stuck") == 0) {
    /* drain() gave up: these must now sleep, not end in an interpreter that is gone. */
    struct timespec until;
    close(let_go[1]);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 200 * 1000 * 1000;
    if (until.tv_nsec >= 1000000000) { until.tv_nsec -= 1000000000; until.tv_sec++; }
    for (int i = 0; i < threads; i++) if (pthread_timedjoin_np(ids[i], NULL, &until) == 0) return 6;
  }
  puts("ended");
  return 0;
}
"""

EMBEDDED_SCRIPT = (
    f"CHECKOUT = {str(CHECKOUT)!r}\n"
    + COUNT_STATES
    + """
import ctypes, faulthandler, os, sys, threading
faulthandler.enable()
sys.path.insert(0, CHECKOUT)
from qedcore.server.thread_state import ThreadStates

states = ThreadStates()
assert states.enable() is True
kept = []

def request():
    kept.append(states.this_thread.kept)
    if len(kept) % 7 == 0:
        try:
            raise ValueError("an error path")
        except ValueError:
            pass

def check_python_threads():
    # Their states are Python's own: not kept, and each thread ends as it always does.
    mine = []
    threads = [threading.Thread(target=lambda: mine.append(states.this_thread.kept)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mine == [False] * 5, mine
    assert states.this_thread.kept is False
"""
)

CLEANUP = {
    "workers": """
def cleanup():
    check_python_threads()
    assert kept == [True] * CALLS, kept
    assert states.live == 0
    assert count_states() == 1
    assert states.drain(timeout=0) is True
""",
    # The threads end only once drain() waits, or at least has been called.
    "connections": """
def cleanup():
    assert kept == [True] * CALLS, kept
    assert states.live == THREADS
    assert count_states() == 1 + THREADS
    threading.Thread(target=os.close, args=[let_go]).start()
    assert states.drain() is True
    assert states.live == 0
    assert states.drain(timeout=0) is True
    states.this_thread.kept
""",
    # No drain(): atexit has to do it.
    "forgotten": """
def cleanup():
    assert states.live == THREADS
    os.close(let_go)
""",
    "stuck": """
def cleanup():
    assert states.drain(timeout=0) is False
    assert states.drain() is False
    assert states.live == THREADS
""",
}


def interpreters() -> Iterator[Any]:
    """One per minor version: the running interpreter, the distribution's and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in range(thread_state.FIRST_VERSION[1], thread_state.LAST_VERSION[1] + 1):
        version = f"3.{minor}"
        places = [Path(f"/usr/bin/python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python3"))]
        if sys.version_info[:2] == (3, minor):
            places.insert(0, Path(sys.executable))
        for path in places:
            if path.exists():
                yield pytest.param(str(path), id=version)
                break


@pytest.fixture(scope="module", params=interpreters())
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EMBED linked with the libpython of one interpreter."""
    if CC is None:
        pytest.skip("needs a C compiler")
    ask = "import sysconfig as s; print(s.get_config_var('LIBDIR')); print(s.get_config_var('INSTSONAME'))"
    libdir, name = subprocess.run(
        [request.param, "-c", ask], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    if not name.startswith("libpython") or ".so" not in name:
        pytest.skip(f"{request.param} has no shared libpython")
    library = next((d / name for d in (Path(libdir), *Path(libdir).glob("*-linux-gnu")) if (d / name).exists()), None)
    if library is None:
        pytest.skip(f"{name} not found")
    directory = tmp_path_factory.mktemp("embed")
    (directory / "embed.c").write_text(EMBED)
    program = directory / "embed"
    subprocess.run(
        [CC, "-pthread", "-o", program, directory / "embed.c", library, f"-Wl,-rpath,{library.parent}"], check=True
    )
    return program


@pytest.mark.parametrize("mode", ["workers", "connections", "forgotten", "stuck"])
def test_embedded(embedder: Path, mode: str) -> None:
    threads, calls = 20, 10
    counts = f"THREADS, CALLS = {threads}, {threads * calls * (5 if mode == 'workers' else 1)}\n"
    result = subprocess.run(
        [embedder, mode, str(threads), str(calls), counts + EMBEDDED_SCRIPT + CLEANUP[mode]],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "ended\n", "")
