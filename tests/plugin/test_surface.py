"""What the server says of itself over NBD, compared with qemu-nbd's answers for the same image; prefetching."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, QedFile, assert_sound
from support.server import Nbdkit, QemuNbd, import_nbd
from support.tools import require, run, unavailable

Serve = Callable[..., Nbdkit]
CS = 64 * KiB

FLAGS = ("read_only", "rotational", "multi_conn", "flush", "fua", "zero", "cache", "df")


def connect(server: Nbdkit | QemuNbd, name: str = "") -> Any:
    nbd = import_nbd()
    handle = nbd.NBD()
    handle.set_export_name(name)
    handle.set_full_info(True)
    handle.add_meta_context("base:allocation")
    handle.connect_unix(str(server.socket))  # a URI would bring its own name
    return handle


def answers(handle: Any) -> dict[str, object]:
    asked = {name: getattr(handle, f"is_{name}", None) or getattr(handle, f"can_{name}") for name in FLAGS}
    found: dict[str, object] = {name: question() for name, question in asked.items()}
    found["size"] = handle.get_size()
    found["extents"] = handle.can_meta_context("base:allocation")
    found["maximum"] = handle.get_block_size(import_nbd().SIZE_MAXIMUM)
    return found


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_answers_are_those_of_qemu_nbd(image: Callable[..., Built], serve: Serve, read_only: bool) -> None:
    """FUA and the cache request are native, the connections share one image, and it is no disk that rotates."""
    built = image(layout="DZ-D")
    server = serve(built.path, read_only=read_only)
    client = connect(server)
    ours = answers(client)
    client.shutdown()
    server.stop()
    with QemuNbd(built.path, args=["-r"] if read_only else []) as reference:
        client = connect(reference)
        theirs = answers(client)
        client.shutdown()
    if read_only:  # nbdkit offers FUA to those who may write
        assert ours.pop("fua") is False
        theirs.pop("fua")
    assert ours == theirs


@pytest.mark.parametrize(
    ("cluster_size", "preferred"), [(4 * KiB, 4 * KiB), (64 * KiB, 64 * KiB), (2 * MiB, 2 * MiB), (64 * MiB, 2 * MiB)]
)
def test_block_sizes(image: Callable[..., Built], serve: Serve, cluster_size: int, preferred: int) -> None:
    nbd = import_nbd()
    client = connect(serve(image(size=MiB, cluster_size=cluster_size, table_size=1).path))
    assert client.get_block_size(nbd.SIZE_MINIMUM) == 1  # qemu-nbd wants whole sectors
    assert client.get_block_size(nbd.SIZE_PREFERRED) == preferred
    assert client.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MiB
    client.shutdown()


def test_requests_of_the_smallest_and_the_largest_block(image: Callable[..., Built], serve: Serve) -> None:
    built = image(size=48 * MiB)
    client = connect(serve(built.path))
    client.pwrite(stamp(1, 3, 32 * MiB), 3)
    client.pwrite(b"!", 40 * MiB + 1)
    assert_same(client.pread(32 * MiB, 3), stamp(1, 3, 32 * MiB), 3)
    assert client.pread(3, 40 * MiB) == b"\0!\0"
    client.shutdown()


def test_description_names_no_file(image: Callable[..., Built], serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(MiB))
    built = image(size=3 * MiB, cluster_size=16 * KiB, backing="secret.raw", no_probe=True)
    server = serve(built.path)
    client = connect(server)
    assert client.get_export_description() == "QED image, 3 MiB, 16 KiB clusters, with a backing file"
    client.shutdown()


def test_one_image_is_listed_once_and_served_under_any_name(image: Callable[..., Built], serve: Serve) -> None:
    nbd = import_nbd()
    built = image(layout="D", size=MiB)
    server = serve(built.path)
    found = []
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_uri(server.uri)
    client.opt_list(lambda name, description: found.append((name, description)) or 0)
    client.opt_abort()
    assert found == [("", "QED image, 1 MiB, 64 KiB clusters")]
    for name in ("", "anything", "ünï", "../x"):
        client = connect(server, name)
        assert client.get_export_name() == name
        assert_same(client.pread(MiB, 0), built.read(0, MiB))
        client.shutdown()


def test_connections_share_one_image(image: Callable[..., Built], serve: Serve) -> None:
    nbd = import_nbd()
    built = image(size=MiB)
    server = serve(built.path)
    writer, other = connect(server), connect(server)
    writer.pwrite(stamp(1, 0, 512), 0)
    writer.pwrite(stamp(2, 5 * CS, 512), 5 * CS, nbd.CMD_FLAG_FUA)
    assert_same(other.pread(512, 0), stamp(1, 0, 512))  # what one connection wrote, the others see
    other.flush()
    server.kill()
    with QedFile(built.path) as oracle:
        assert_same(oracle.read(0, 512), stamp(1, 0, 512))
        assert_same(oracle.read(5 * CS, 512), stamp(2, 5 * CS, 512))


# The cache request.

FADVISE = re.compile(r"fadvise64\(\d+<(.+?)>, (\d+), (\d+), POSIX_FADV_WILLNEED\) += 0")


def traced(serve: Serve, built: Built, log: Path, **options: Any) -> Nbdkit:
    require("strace")
    if run(["strace", "-D", "-o", str(log), "true"]).rc != 0:
        unavailable("strace may not trace here")
    wrapper = ["strace", "-D", "-f", "-qq", "-y", "-o", str(log), "-e", "trace=fadvise64"]
    return serve(built.path, wrapper=wrapper, **options)


def prefetched(log: Path) -> dict[str, set[int]]:
    """Name of each file -> offsets of the 4 KiB blocks that were asked for."""
    blocks: dict[str, set[int]] = {}
    for path, offset, length in FADVISE.findall(log.read_text()):
        range_ = range(int(offset), int(offset) + int(length), 4 * KiB)
        blocks.setdefault(Path(path).name, set()).update(range_)
    return blocks


def test_cache_request_prefetches_through_the_chain(
    tmp_path: Path, image: Callable[..., Built], serve: Serve
) -> None:
    (tmp_path / "base.raw").write_bytes(stamp(9, 0, MiB))
    built = image(layout="DZ-D", size=MiB, backing="base.raw", no_probe=True, reverse=True)
    log = tmp_path / "trace"
    server = traced(serve, built, log)
    client = connect(server)
    client.cache(4 * CS, 0)
    wanted = {
        "image.qed": {built.offsets[n] + i for n in (0, 3) for i in range(0, CS, 4 * KiB)},
        "base.raw": {2 * CS + i for i in range(0, CS, 4 * KiB)},
    }
    assert prefetched(log) == wanted
    client.cache(4 * KiB, 8 * CS)  # only what was asked for
    assert prefetched(log)["base.raw"] - wanted["base.raw"] == {8 * CS}
    client.shutdown()
    server.stop()


@pytest.mark.parametrize("options", [{"cache": "none"}, {"trace": "all"}], ids=["direct", "traced"])
def test_cache_request_changes_nothing(image: Callable[..., Built], serve: Serve, options: dict[str, str]) -> None:
    built = image(layout="DZ-D", size=MiB)
    server = serve(built.path, **options)
    client = connect(server)
    client.cache(MiB, 0)
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()
    server.stop()
    assert_sound(built.path)


def test_cache_request_of_a_damaged_table_fails(image: Callable[..., Built], serve: Serve) -> None:
    nbd = import_nbd()
    built = image(layout="DD", size=MiB, entries={1: 0x123})
    client = connect(serve(built.path, read_only=True))
    client.cache(CS, 0)
    with pytest.raises(nbd.Error) as caught:
        client.cache(2 * CS, 0)
    assert caught.value.errno == "EIO"
    assert_same(client.pread(CS, 0), built.read(0, CS))
    client.shutdown()


def test_qemu_works_with_these_limits(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="D-Z-D", size=5 * MiB + 512, cluster_size=MiB, table_size=2)
    server = serve(built.path)
    copy = tmp_path / "copy.raw"
    qemu.qemu_img_ok("convert", "-f", "raw", "-O", "raw", server.uri, copy)
    assert_same(copy.read_bytes(), built.read(0, built.spec.size))
    assert run(["nbdcopy", server.uri, str(tmp_path / "copy2.raw")]).rc == 0
    assert_same((tmp_path / "copy2.raw").read_bytes(), built.read(0, built.spec.size))
    server.stop()
