"""Where and how the server runs: paths, daemon, threads, TCP, TLS, filters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, assert_sound
from support.server import Nbdkit, import_nbd
from support.tools import PLUGIN, REPO, require, run_ok, unavailable

Serve = Callable[..., Nbdkit]
LAYOUT = "DZ-DDD--ZZD"


def use(client: Any, built: Built, *, writable: bool = True) -> None:
    """Read the image through a client, write across a cluster end, read it back."""
    size = built.spec.size
    assert client.get_size() == size
    assert_same(client.pread(size, 0), built.read(0, size))
    if writable:
        pos, length = 2 * 64 * KiB - 1024, 3 * KiB
        client.pwrite(stamp(5, pos, length), pos)
        client.flush()
        assert_same(client.pread(length, pos), stamp(5, pos, length), pos)


def finish(server: Nbdkit, client: Any, path: Path) -> None:
    client.shutdown()
    server.stop()
    assert server.log() == ""
    assert_sound(path)


@pytest.mark.parametrize("plugin_path", ["absolute", "relative", "relative from tests", "symlink"])
@pytest.mark.parametrize("file_path", ["absolute", "relative"])
@pytest.mark.parametrize("daemon", [False, True], ids=["foreground", "daemon"])
def test_paths(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, plugin_path: str, file_path: str, daemon: bool
) -> None:
    built = image(layout=LAYOUT, size=MiB)
    cwd, plugin = {
        "absolute": (tmp_path, str(PLUGIN)),
        "relative": (REPO, "plugin/qed.py"),
        "relative from tests": (REPO / "tests", "../plugin/qed.py"),
        "symlink": (tmp_path, "./link.py"),
    }[plugin_path]
    if plugin_path == "symlink":
        (tmp_path / "link.py").symlink_to(PLUGIN)
    file = str(built.path) if file_path == "absolute" else os.path.relpath(built.path, cwd)
    server = serve(file, plugin=plugin, cwd=cwd, daemon=daemon)
    client = server.connect()
    use(client, built)
    finish(server, client, built.path)


@pytest.mark.parametrize("daemon", [False, True], ids=["foreground", "daemon"])
def test_checkout_and_image_in_paths_with_odd_characters(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, daemon: bool
) -> None:
    home = tmp_path / "a dir, with = and ünïcode"
    home.mkdir()
    for name in ("plugin", "qedcore"):
        shutil.copytree(REPO / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = image(name=f"{home.name}/my image=1.qed", layout=LAYOUT, size=MiB)
    server = serve("my image=1.qed", plugin="plugin/qed.py", cwd=home, daemon=daemon)
    client = server.connect()
    use(client, built)
    finish(server, client, built.path)


def test_relative_backing_file_of_a_daemon(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.raw").write_bytes(stamp(9, 0, MiB))
    built = image(name="deep/image.qed", layout="DZ-", size=MiB, backing="../base.raw", no_probe=True)
    server = serve("deep/image.qed", cwd=tmp_path, daemon=True)
    client = server.connect()
    want = built.read(0, MiB, lambda pos, length: stamp(9, pos, length))
    assert_same(client.pread(MiB, 0), want)
    client.shutdown()
    server.stop()


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
def test_threads(image: Callable[..., Built], serve: Serve, threads: int) -> None:
    built = image(layout=LAYOUT, size=MiB)
    server = serve(built.path, threads=threads)
    client = server.connect()
    use(client, built)
    finish(server, client, built.path)


def test_tcp(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout=LAYOUT, size=MiB)
    server = serve(built.path, tcp=True)
    client = server.connect()
    use(client, built)
    finish(server, client, built.path)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_tls_psk(tmp_path: Path, image: Callable[..., Built], serve: Serve, tcp: bool) -> None:
    require("psktool")
    nbd = import_nbd()
    if not nbd.NBD().supports_tls():
        unavailable("libnbd has no TLS")
    keys = tmp_path / "keys.psk"
    run_ok(["psktool", "-u", "alice", "-p", keys])
    built = image(layout=LAYOUT, size=MiB)
    server = serve(built.path, tcp=tcp, args=["--tls=require", f"--tls-psk={keys}"])
    client = nbd.NBD()
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_psk_file(str(keys))
    client.set_tls_username("alice")
    if tcp:
        client.connect_tcp("127.0.0.1", str(server.port))
    else:
        client.connect_unix(str(server.socket))
    assert client.get_tls_negotiated()
    use(client, built)
    client.shutdown()
    with pytest.raises(nbd.Error):
        server.connect()  # without TLS
    assert server.running()
    server.stop()
    assert_sound(built.path)


def test_single_client_over_stdin(image: Callable[..., Built]) -> None:
    """nbdkit -s: the client starts the server, which ends with the connection."""
    nbd = import_nbd()
    require("nbdkit")
    built = image(layout=LAYOUT, size=MiB)
    client = nbd.NBD()
    client.connect_command(["nbdkit", "-s", "--exit-with-parent", "python", str(PLUGIN), f"file={built.path}"])
    use(client, built)
    client.shutdown()
    del client  # waits for the server to exit
    assert_sound(built.path)


# filter -> its parameters, whether writes reach the image
FILTERS: dict[str, tuple[list[str], list[str], bool]] = {
    "blocksize": (["blocksize"], ["minblock=512", "maxdata=64K"], True),
    "blocksize-policy": (["blocksize-policy"], ["blocksize-minimum=512"], True),
    "cache": (["cache"], ["cache=writeback"], True),
    "cacheextents": (["cacheextents"], [], True),
    "checkwrite": (["checkwrite"], [], False),
    "cow": (["cow"], [], False),
    "delay": (["delay"], ["rdelay=1ms"], True),
    "error": (["error"], ["error-pread-rate=0"], True),
    "fua emulate": (["fua"], ["fuamode=emulate"], True),
    "fua native": (["fua"], ["fuamode=native"], True),
    "log": (["log"], ["logfile=/dev/null"], True),
    "multi-conn": (["multi-conn"], ["multi-conn-mode=auto"], True),
    "nocache": (["nocache"], [], True),
    "noextents": (["noextents"], [], True),
    "noparallel": (["noparallel"], [], True),
    "nozero": (["nozero"], [], True),
    "rate": (["rate"], ["rate=10G"], True),
    "readahead": (["readahead"], [], True),
    "retry": (["retry"], ["retries=1"], True),
    "retry-request": (["retry-request"], ["retry-request-retries=1"], True),
    "scan": (["scan"], ["scan-clock=off"], True),
    "stats": (["stats"], ["statsfile=/dev/null"], True),
    "log, cow, blocksize": (["log", "cow", "blocksize"], ["logfile=/dev/null", "minblock=4096"], False),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(image: Callable[..., Built], serve: Serve, name: str) -> None:
    filters, params, reaches = FILTERS[name]
    built = image(layout=LAYOUT, size=MiB)
    before = built.path.read_bytes()
    server = serve(built.path, filters=filters, filter_params=params)
    client = server.connect()
    use(client, built, writable=name != "checkwrite")
    client.shutdown()
    server.stop()
    assert_sound(built.path)
    if not reaches:
        assert built.path.read_bytes() == before


def test_offset_and_truncate_filters_see_the_right_bytes(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout=LAYOUT, size=MiB)
    server = serve(
        built.path,
        filters=["truncate", "offset"],
        filter_params=["truncate=512K", f"offset={64 * KiB + 512}", f"range={256 * KiB}"],
    )
    client = server.connect()
    assert client.get_size() == 512 * KiB
    want = built.read(64 * KiB + 512, 256 * KiB) + bytes(256 * KiB)
    assert_same(client.pread(512 * KiB, 0), want)
    client.shutdown()
    server.stop()


def test_partition_filter(image: Callable[..., Built], serve: Serve) -> None:
    """A partition table written through the server, then its second partition served."""
    built = image(size=8 * MiB)
    entries = b"".join(
        bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + first.to_bytes(4, "little") + count.to_bytes(4, "little")
        for first, count in ((2048, 2048), (4096, 8192))
    )
    mbr = bytes(446) + entries + bytes(32) + b"\x55\xaa"
    server = serve(built.path)
    client = server.connect()
    client.pwrite(mbr, 0)
    client.pwrite(stamp(6, 2 * MiB, 4 * MiB), 2 * MiB)
    client.shutdown()
    server.stop()
    server = serve(built.path, filters=["partition"], filter_params=["partition=2"])
    client = server.connect()
    assert client.get_size() == 4 * MiB
    assert_same(client.pread(4 * MiB, 0), stamp(6, 2 * MiB, 4 * MiB))
    client.shutdown()
    server.stop()


def test_injected_errors_do_not_stick(image: Callable[..., Built], serve: Serve) -> None:
    nbd = import_nbd()
    built = image(layout=LAYOUT, size=MiB)
    server = serve(
        built.path,
        filters=["error"],
        filter_params=["error-pwrite=ENOSPC", "error-pwrite-rate=100%"],
    )
    client = server.connect()
    with pytest.raises(nbd.Error) as caught:
        client.pwrite(b"x" * 512, 0)
    assert caught.value.errno == "ENOSPC"
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()
    server.stop()
    assert_sound(built.path)
