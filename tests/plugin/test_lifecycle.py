"""The server's life: signals, kills and disconnects with requests in flight, restart, the idle timer."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.flight import Flight, check_fates
from support.patterns import KiB, MiB, Op, assert_same, device, stamp
from support.qed_image import Built, Geometry, QedFile, assert_sound, read_header
from support.server import Nbdkit, StartError, disconnect, import_nbd, wait_for
from support.tools import PYTHON, REPO, changed_plugin, run

from qedcore.backing.names import json_name

Serve = Callable[..., Nbdkit]
CS = 64 * KiB
NEED_CHECK = 2


def scattered(rng: random.Random, size: int, count: int, length: int = 4 * KiB) -> list[Op]:
    """Disjoint writes all over the device, none aligned to a cluster."""
    slots = rng.sample(range(size // (2 * length)), count)
    return [Op("write", slot * 2 * length + 512, length, i % 127 + 1) for i, slot in enumerate(slots)]


VARIANTS: dict[str, tuple[Geometry, bool]] = {
    "4K_2": (Geometry(4 * KiB, 2), False),
    "64K_4": (Geometry(64 * KiB, 4), False),
    "64K_4 backing": (Geometry(64 * KiB, 4), True),
    "1M_2": (Geometry(MiB, 2), False),
}


def build_variant(tmp_path: Path, image: Callable[..., Built], name: str) -> Built:
    geometry, backing = VARIANTS[name]
    (tmp_path / "base.raw").write_bytes(stamp(120, 0, 20 * MiB))
    return image(
        size=64 * MiB,
        cluster_size=geometry.cluster_size,
        table_size=geometry.table_size,
        layout={0: "data", 3: "zero", 9: "data"},
        backing="base.raw" if backing else None,
        no_probe=backing,
    )


def before(tmp_path: Path, built: Built) -> Callable[[int, int], bytes]:
    """What the guest read before any write."""
    if built.spec.backing is None:
        return built.read
    base = (tmp_path / "base.raw").read_bytes()
    return lambda pos, length: built.read(pos, length, lambda p, n: base[p : p + n].ljust(n, b"\0"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", VARIANTS)
def test_signal_with_requests_in_flight(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, rng: random.Random, name: str, number: int
) -> None:
    built = build_variant(tmp_path, image, name)
    server = serve(built.path, threads=16)
    flights = [Flight(server.connect()) for _ in range(2)]
    ops = scattered(rng, built.spec.size, 1000)
    for i, flight in enumerate(flights):
        flight.issue(ops[i::2])
    flights[0].poll_until(lambda: len(flights[0].acked) >= 20)
    server.send_signal(number)
    for flight in flights:
        flight.drain()
        flight.close()
    assert server.wait() == 0, server.log()
    assert_sound(built.path)
    qemu.assert_check_clean(built.path)
    with QedFile(built.path) as oracle:
        for i, flight in enumerate(flights):
            check_fates(flight, ops[i::2], oracle.read, before(tmp_path, built))


@pytest.mark.parametrize("name", VARIANTS)
def test_kill_with_writes_in_flight_and_restart(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, rng: random.Random, name: str
) -> None:
    built = build_variant(tmp_path, image, name)
    ops = scattered(rng, built.spec.size, 900)
    flights: list[tuple[Flight, list[Op]]] = []
    for start in range(0, 900, 300):  # each kill hits what the last repair left
        server = serve(built.path, threads=16)
        share = ops[start : start + 300]
        flight = Flight(server.connect())
        flight.issue(share)
        flight.poll_until(lambda flight=flight: len(flight.acked) >= 50)
        server.send_signal(signal.SIGKILL)
        flight.drain()
        assert server.wait() == -signal.SIGKILL
        flights.append((flight, share))
        assert len(flight.acked) >= 50
    server = serve(built.path)
    client = server.connect()

    for flight, share in flights:
        check_fates(flight, share, device(client), before(tmp_path, built))
    client.pwrite(stamp(99, 0, 4 * KiB), 0)
    client.shutdown()
    server.stop()
    assert_sound(built.path, leaks=None)  # clusters lost between others stay: only the tail is given back
    with QedFile(built.path) as oracle:
        assert_same(oracle.read(0, 4 * KiB), stamp(99, 0, 4 * KiB))
        for flight, share in flights:
            untouched = [op for op in share if op.pos >= 4 * KiB]
            check_fates(flight, untouched, oracle.read, before(tmp_path, built))


# nbdkit before 1.34 may abort when a client hangs up while several threads answer it (its release notes: "rare
# assertion failure ... clients hanging up early"). No plugin can help that; to us it is one more kill.
HANGUP_ABORT = "raw_send_socket: Assertion"


def test_client_that_disconnects_in_flight(image: Callable[..., Built], serve: Serve, rng: random.Random) -> None:
    built = image(size=64 * MiB, cluster_size=4 * KiB, table_size=2)
    server = serve(built.path)
    stays = server.connect()
    stays.pwrite(stamp(1, 0, 512), 0)  # the others start at 512
    ops = scattered(rng, built.spec.size, 1000)
    acked: list[Op] = []
    aborted = False
    for start in range(0, 1000, 200):
        try:
            flight = Flight(server.connect())
            flight.issue(ops[start : start + 200])
            flight.poll_until(lambda flight=flight: len(flight.acked) >= 5)
            acked += flight.acked
            flight.abandon()
            assert_same(stays.pread(512, 0), stamp(1, 0, 512))
        except import_nbd().Error:  # of this client's going, or of the one before
            assert server.wait() == -signal.SIGABRT and HANGUP_ABORT in server.log()
            aborted = True
            server = serve(built.path)
            stays = server.connect()
    disconnect(stays)
    server.send_signal(signal.SIGTERM)
    if server.wait() != 0:  # the last ones to leave may have aborted it, too
        assert HANGUP_ABORT in server.log()
    elif aborted:
        assert_sound(built.path, leaks=None)
    else:
        qemu.assert_check_clean(built.path)
    client = serve(built.path).connect()
    for op in acked:
        assert_same(client.pread(op.length, op.pos), op.data, op.pos)
    disconnect(client)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("clients", [0, 3])
def test_signal_to_an_idle_server(image: Callable[..., Built], serve: Serve, clients: int, number: int) -> None:
    built = image(layout="D", size=MiB)
    server = serve(built.path)
    handles = [server.connect() for _ in range(clients)]
    for handle in handles:
        handle.pwrite(stamp(2, 5 * CS, 512), 5 * CS)
    server.send_signal(number)
    for handle in handles:
        disconnect(handle)  # nbdkit itself waits for idle clients to leave
    assert server.wait() == 0
    assert server.log() == ""
    assert_sound(built.path)
    qemu.assert_check_clean(built.path)


def test_repeated_start_and_stop(image: Callable[..., Built], serve: Serve) -> None:
    built = image(size=4 * MiB)
    for n in range(10):
        server = serve(built.path)
        client = server.connect()
        if n:
            assert_same(client.pread(4096, (n - 1) * CS), stamp(n, (n - 1) * CS, 4096))
        client.pwrite(stamp(n + 1, n * CS, 4096), n * CS)
        if n % 2:
            server.send_signal(signal.SIGTERM)
        disconnect(client)
        server.stop()
        assert_sound(built.path)


# NEED_CHECK


def features(path: Path) -> int:
    return read_header(path)["features"]


def test_need_check_is_set_by_the_first_allocating_write(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="DZ", size=MiB)
    server = serve(built.path)
    client = server.connect()
    client.pread(MiB, 0)
    client.pwrite(b"i" * 4096, 0)
    assert not features(built.path) & NEED_CHECK  # in place: no metadata changes
    client.pwrite(b"a" * 512, 5 * CS)
    assert features(built.path) & NEED_CHECK
    client.shutdown()
    server.stop()
    assert not features(built.path) & NEED_CHECK


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "disconnected"])
def test_idle_timer_clears_need_check(image: Callable[..., Built], serve: Serve, connected: bool) -> None:
    """Five idle seconds after the last allocating write, on disk, in the running server."""
    built = image(size=MiB)
    server = serve(built.path)
    client = server.connect()
    client.pwrite(stamp(1, 0, 4096), 0)
    assert features(built.path) & NEED_CHECK
    if not connected:
        client.shutdown()
    wait_for(lambda: not features(built.path) & NEED_CHECK, "NEED_CHECK cleared", 15)
    assert server.running()
    server.send_signal(signal.SIGKILL)  # clean already: nothing may depend on close
    server.wait()
    assert_sound(built.path)
    qemu.assert_check_clean(built.path)
    with QedFile(built.path) as oracle:
        assert_same(oracle.read(0, 4096), stamp(1, 0, 4096))


def test_dirty_image_is_repaired_and_told(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="D", features=NEED_CHECK, entries={1: lambda b: b.end}, leaks=3)
    server = serve(built.path)
    client = server.connect()
    assert_same(client.pread(2 * CS, 0), built.read(0, 2 * CS))
    client.shutdown()
    server.stop()
    assert server.log().strip() and "Traceback" not in server.log()
    qemu.assert_check_clean(built.path)


def test_read_only_server_of_a_dirty_image(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="D", features=NEED_CHECK, leaks=3)
    content = built.path.read_bytes()
    server = serve(built.path, read_only=True)
    client: Any = server.connect()
    assert_same(client.pread(CS, 0), built.read(0, CS))
    client.shutdown()
    server.stop()
    assert built.path.read_bytes() == content


@pytest.mark.parametrize("as_directory", [False, True])
def test_an_image_that_may_only_be_read(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, as_directory: bool
) -> None:
    """No permission to write, or a medium without: clients are served as readers; the log tells, once."""
    built = image(layout="D")
    # As root writes to everything here, opening files for writing is made to fail.
    plugin = changed_plugin(
        tmp_path,
        "import errno, os\nreally = os.open\n"
        "def deny(path, flags, *rest, **more):\n"
        "    if flags & os.O_ACCMODE and str(path).endswith('.qed'):\n"
        "        raise OSError(errno.EROFS, os.strerror(errno.EROFS))\n"
        "    return really(path, flags, *rest, **more)\n"
        "os.open = deny",
    )
    server = serve(dir=tmp_path, plugin=plugin) if as_directory else serve(built.path, plugin=plugin)
    for _ in range(2):
        client = server.connect()
        assert client.is_read_only() and client.pread(KiB, 0) == stamp(1, 0, KiB)
        client.shutdown()
    assert server.log().count("served read-only") == 1


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    """The format of what is served by mistake; and what to do about a damaged image."""
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", tmp_path / "x", "1M")
    with pytest.raises(StartError, match="not in QED format.*: it is a qcow2 image"):
        Nbdkit({"file": tmp_path / "x"}).start()


def test_info_of_an_image_in_use(image: Callable[..., Built], serve: Serve) -> None:
    """It has the mark of an unclean close, and nothing is wrong with it."""
    built = image(layout="-")
    server = serve(built.path)
    client = server.connect()
    client.pwrite(stamp(1, 0, KiB), 0)
    command = [PYTHON, "-m", "qedcore", "info", "-U", built.path]
    said = run(command, env={"PYTHONPATH": str(REPO)}).out
    assert "another program is writing to it" in said and "not closed cleanly" not in said
    client.shutdown()
    server.stop()


def test_a_name_that_is_not_utf_8(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    """nbdkit hands over only UTF-8: json:{...} can say the rest, and who does not know is told."""
    built = image(layout="D")
    name = os.fsencode(tmp_path) + b"/caf\xe9.qed"
    os.rename(built.path, name)
    with pytest.raises(StartError) as refused:
        Nbdkit([f"file={os.fsdecode(name)}"]).start()
    assert refused.value.log.count("\n") == 1 and json_name(os.fsdecode(name)) in refused.value.log
    client = serve(json_name(os.fsdecode(name))).connect()
    assert client.pread(KiB, 0) == stamp(1, 0, KiB)
    client.shutdown()
