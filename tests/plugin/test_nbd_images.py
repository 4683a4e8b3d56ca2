"""The image on another NBD server: file=nbd://..., against the servers that there are."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, Model, assert_same, check_model, device, stamp, write_at_random
from support.qed_image import Built, assert_sound, raw_reader
from support.server import Backend, Nbdkit, QemuNbd, StartError, disconnect, import_nbd
from support.tools import REPO, require, run_ok

from qedcore.errors import StorageError
from qedcore.storage.nbd import NbdStorage, open_uri

Serve = Callable[..., Nbdkit]
CS = 64 * KiB
CAPACITY = 24 * MiB


@pytest.fixture
def backend() -> Iterator[Callable[..., Backend]]:
    import_nbd()
    started: list[Backend] = []

    def start(*words: str, **options: Any) -> Backend:
        started.append(Backend(*words, **options))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.remove()


def export(tmp_path: Path, built: Built, capacity: int = CAPACITY) -> Path:
    """The image at the start of a larger file with other contents."""
    path = tmp_path / "export"
    path.write_bytes(built.path.read_bytes().ljust(capacity, b"\xee"))
    return path


# What the storage promises, on all kinds of servers

SERVERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "memory": (["memory", "2M"], {}),
    "tcp": (["memory", "2M"], {"tcp": True}),
    "sectors": (
        ["memory", "2M", "blocksize-minimum=512", "blocksize-maximum=64K", "blocksize-error-policy=error"],
        {"filters": ["blocksize-policy"]},
    ),
    "pages": (
        ["memory", "2M", "blocksize-minimum=4K", "blocksize-preferred=4K", "blocksize-error-policy=error"],
        {"filters": ["blocksize-policy"]},
    ),
    "no zeroes": (["memory", "2M"], {"filters": ["nozero"]}),
    "no parallel": (["memory", "2M"], {"filters": ["noparallel"]}),
}


def check_contract(storage: NbdStorage, rng: random.Random) -> None:
    size = storage.size()
    model = bytearray(size)
    for n in range(300):
        length = rng.choice([1, 511, 512, 513, 4096, 100000])
        offset = rng.randrange(0, size - length)
        if n % 2:
            offset = min(offset // 4096 * 4096, size - length)
        kind = rng.choice(["write", "write", "writev", "read", "punch"])
        if kind == "read":
            buf = bytearray(length)
            storage.pread_into(buf, offset)
            assert_same(bytes(buf), bytes(model[offset : offset + length]), offset)
        elif kind == "punch":
            if storage.punch(offset, length):
                model[offset : offset + length] = bytes(length)
        else:
            data = stamp(n % 127 + 1, offset, length)
            storage.pwrite(data, offset) if kind == "write" else storage.pwritev([data[:100], data[100:]], offset)
            model[offset : offset + length] = data
    storage.flush()
    buf = bytearray(size + 5000)
    storage.pread_into(buf, 0)
    assert_same(bytes(buf), bytes(model) + bytes(5000))


@pytest.mark.parametrize("name", SERVERS)
def test_contract(backend: Callable[..., Backend], rng: random.Random, name: str) -> None:
    words, options = SERVERS[name]
    storage = open_uri(backend(*words, **options).uri, True)
    check_contract(storage, rng)
    storage.close()


def test_contract_of_qemu_nbd(tmp_path: Path, rng: random.Random) -> None:
    import_nbd()
    (tmp_path / "disk").write_bytes(bytes(2 * MiB))
    with QemuNbd(tmp_path / "disk", fmt="raw") as server:
        storage = open_uri(server.uri, True)
        check_contract(storage, rng)
        storage.close()


# Images served from there


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd", "sectors"])
def test_image_in_an_export(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend], name: str,
    rng: random.Random,
) -> None:  # fmt: skip
    """Written at random over several lives of both servers; then QEMU finds a sound image in the export."""
    built = image(size=64 * MiB, layout="D-Z-D")
    path = export(tmp_path, built)
    model = Model(64 * MiB, built.read)
    qemu_nbd = None
    if name == "qemu-nbd":
        qemu_nbd = QemuNbd(path, fmt="raw")
        uri = qemu_nbd.__enter__().uri
    elif name == "sectors":
        words = ["file", str(path), "blocksize-minimum=512", "blocksize-error-policy=error"]
        uri = backend(*words, filters=["blocksize-policy"]).uri
    else:
        uri = backend("file", str(path)).uri
    try:
        for _ in range(2):
            server = serve(uri)
            client = server.connect()
            write_at_random(client, model, rng, CS, 25)
            client.shutdown()
            server.stop()
    finally:
        if qemu_nbd is not None:
            qemu_nbd.__exit__()
    end = assert_sound_in(path, tmp_path / "image.qed")
    assert end < CAPACITY
    qemu.to_raw(tmp_path / "image.qed", tmp_path / "out.raw")
    check_model(model, raw_reader(tmp_path / "out.raw"))


def assert_sound_in(path: Path, copy: Path) -> int:
    """Copy the image out of the export, to its end; returns that."""
    from qedcore.check.image_end import end_of_image
    from qedcore.storage.file import FileStorage

    storage = FileStorage(path, writable=False)
    end = end_of_image(storage)
    storage.close()
    with path.open("rb") as source:
        copy.write_bytes(source.read(end))
    assert_sound(copy)
    qemu.assert_check_clean(copy)
    return end


def test_full(tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]) -> None:
    """ENOSPC reaches the client; what was answered before stays."""
    nbd = import_nbd()
    built = image(size=64 * MiB, layout="-")
    path = export(tmp_path, built, MiB)
    client = serve(backend("file", str(path)).uri).connect()
    written = 0
    with pytest.raises(nbd.Error) as caught:
        while True:
            client.pwrite(stamp(1, written * CS, CS), written * CS)
            written += 1
    assert caught.value.errno == "ENOSPC"
    assert written > 5
    client.flush()
    assert_same(client.pread((written + 1) * CS, 0), stamp(1, 0, written * CS) + bytes(CS))
    client.shutdown()


def test_server_killed_with_writes_that_were_not_flushed(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]
) -> None:
    """The cache filter loses them, as a machine does.  The guest has had its answers, and then its flush."""
    built = image(size=64 * MiB, layout="D")
    path = export(tmp_path, built)
    storage_server = backend("file", str(path), filters=["cache"])
    server = serve(storage_server.uri)
    client = server.connect()
    for round in range(4):
        for i in range(8):
            pos = (round * 8 + i) * CS + 1000
            client.pwrite(stamp(round + 2, pos, 5000), pos)
        storage_server.kill()
        storage_server.start()
        if round % 2:
            client.flush()
            storage_server.kill()
            storage_server.start()
    for round in range(4):
        for i in range(8):
            pos = (round * 8 + i) * CS + 1000
            assert_same(client.pread(5000, pos), stamp(round + 2, pos, 5000), pos)
    client.flush()
    client.shutdown()
    server.stop()
    storage_server.kill()
    assert_sound_in(path, tmp_path / "image.qed")
    with open(tmp_path / "out.raw", "wb"):
        pass
    qemu.to_raw(tmp_path / "image.qed", tmp_path / "out.raw")
    reader = raw_reader(tmp_path / "out.raw")
    for n in range(32):
        assert_same(reader(n * CS + 1000, 5000), stamp(n // 8 + 2, n * CS + 1000, 5000), n * CS + 1000)


def test_server_killed_with_a_request_in_flight(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]
) -> None:
    """A stopped server has a write and a read, dies, and comes back: both are answered."""
    built = image(size=64 * MiB, layout="DD")
    storage_server = backend("file", str(export(tmp_path, built)))
    client = serve(storage_server.uri).connect()
    client.pwrite(b"a" * 512, 0)
    storage_server.send_signal(signal.SIGSTOP)
    buf = bytearray(512)
    one = client.aio_pwrite(b"b" * 4096, 4096)
    two = client.aio_pread(buf, CS)
    storage_server.kill()
    storage_server.start()
    for cookie in (one, two):
        while not client.aio_command_completed(cookie):
            client.poll(-1)
    assert_same(bytes(buf), stamp(1, CS, 512), CS)
    assert client.pread(4096, 4096) == b"b" * 4096
    client.flush()
    client.shutdown()


def test_in_the_background(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]
) -> None:
    """The connection survives nbdkit's fork."""
    built = image(size=64 * MiB, layout="D")
    server = serve(backend("file", str(export(tmp_path, built))).uri, daemon=True)
    client = server.connect()
    assert_same(client.pread(CS, 0), stamp(1, 0, CS))
    client.pwrite(b"x" * 512, MiB)
    client.shutdown()
    server.stop()


def test_read_only(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]
) -> None:
    """A server that does not let us write: everybody is served as a reader, and the log says why."""
    built = image(size=64 * MiB, layout="D")
    uri = backend("file", str(export(tmp_path, built)), args=["-r"]).uri
    client = serve(uri, read_only=True).connect()
    assert_same(client.pread(CS, 0), stamp(1, 0, CS))
    disconnect(client)
    server = serve(uri)
    for _ in range(2):
        client = server.connect()
        assert client.is_read_only()
        assert_same(client.pread(CS, 0), stamp(1, 0, CS))
        disconnect(client)
    assert server.log().count("the server has it read-only: served read-only") == 1


def test_a_server_with_room_for_one(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    """The image is opened for reading, and then for writing, over one connection."""
    built = image(size=64 * MiB, layout="D-Z")
    path = export(tmp_path, built)
    with QemuNbd(path, fmt="raw", args=["-e", "1"]) as storage_server:
        server = serve(storage_server.uri)
        for n in range(2):
            client = server.connect()
            assert_same(client.pread(CS, 0), stamp(1, 0, CS))
            client.pwrite(stamp(n + 2, (n + 1) * MiB, CS), (n + 1) * MiB)
            client.shutdown()
        server.stop()
    assert_sound_in(path, tmp_path / "image.qed")


def test_one_writer_on_one_machine(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]
) -> None:
    """As with files: one writer; any number of readers; and it is over with the writer, however that ends."""
    nbd = import_nbd()
    built = image(size=64 * MiB, layout="D")
    storage_server = backend("file", str(export(tmp_path, built)), tcp=True)
    first, second = serve(storage_server.uri), serve(f"nbd://localhost:{storage_server.port}/")
    writer = first.connect()
    writer.pwrite(stamp(2, MiB, CS), MiB)
    with pytest.raises(nbd.Error):
        second.connect()
    assert 'Failed to get "write" lock. Is another process using the image [nbd://localhost' in second.log()
    reader = serve(storage_server.uri, read_only=True).connect()
    assert_same(reader.pread(CS, 0), stamp(1, 0, CS))
    first.kill()
    client = second.connect()
    assert_same(client.pread(CS, MiB), stamp(2, MiB, CS))
    client.pwrite(stamp(3, 2 * MiB, CS), 2 * MiB)
    unlocked = serve(storage_server.uri, lock="off").connect()  # sees what was not closed cleanly, and repairs it
    with pytest.raises(nbd.Error):
        for n in range(600):
            client.pwrite(bytes([1]) * CS, 3 * MiB + n * CS)
    assert "another program writes to it" in second.log()
    for handle in (reader, client, unlocked):
        disconnect(handle)


def test_nobody_there(tmp_path: Path, serve: Serve) -> None:
    import_nbd()
    with pytest.raises(StartError) as caught:
        serve(f"nbd+unix:///?socket={tmp_path}/none")
    lines = [line for line in caught.value.log.splitlines() if "cannot open nbd+unix" in line]
    assert len(lines) == 1 and "No such file" in lines[0], caught.value.log
    assert "Traceback" not in caught.value.log


def test_tls(tmp_path: Path, image: Callable[..., Built], serve: Serve, backend: Callable[..., Backend]) -> None:
    require("psktool")
    run_ok(["psktool", "-u", "alice", "-p", tmp_path / "keys.psk"])
    built = image(size=64 * MiB, layout="D")
    args = ["--tls=require", f"--tls-psk={tmp_path}/keys.psk"]
    server = backend("file", str(export(tmp_path, built)), args=args, tcp=True)
    client = serve(f"nbds://alice@127.0.0.1:{server.port}/?tls-psk-file={tmp_path}/keys.psk").connect()
    client.pwrite(stamp(2, MiB, MiB), MiB)
    assert_same(client.pread(2 * MiB, 0), stamp(1, 0, CS) + bytes(MiB - CS) + stamp(2, MiB, MiB))
    client.flush()
    client.shutdown()
    with pytest.raises(StorageError):
        open_uri(f"nbd://127.0.0.1:{server.port}/", True)
    with pytest.raises(StorageError):  # an image may not make us use a key of ours
        open_uri(f"nbds://alice@127.0.0.1:{server.port}/?tls-psk-file={tmp_path}/keys.psk", False, trusted=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a loop device")
def test_block_device(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    """A writable image on a device, over what was there before."""
    import subprocess

    built = image(size=64 * MiB, layout="D-Z")
    path = export(tmp_path, built)
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop devices: {made.stderr.strip()}")
    device_path = made.stdout.strip()
    model = Model(64 * MiB, built.read)
    try:
        for n in range(2):
            server = serve(device_path)
            client = server.connect()
            for pos in (CS + 100, 20 * CS + 100, (30 + n) * CS):
                client.pwrite(stamp(n + 3, pos, 100), pos)
                model.write(pos, stamp(n + 3, pos, 100))
            check_model(model, device(client))
            client.shutdown()
            server.stop()
        for options in ([], ["-r", "all"], []):
            out = run_ok([sys.executable, "-m", "qedcore", "check", *options, device_path], cwd=REPO)
            assert out.startswith("No errors were found"), out
    finally:
        subprocess.run(["losetup", "--detach", device_path], check=True)
    assert_sound_in(path, tmp_path / "image.qed")
