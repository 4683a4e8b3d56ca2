"""Parameters: what is accepted, and that anything else is one clear line before the server starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built
from support.server import Nbdkit, StartError
from support.tools import PLUGIN, REPO, run

Serve = Callable[..., Nbdkit]

# Parameters after "file=image.qed" (or instead of it) -> words of the message
REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no file": ([], ("file", "missing")),
    "empty file": (["file="], ("file=", "value")),
    "absent file": (["file=no-such.qed"], ("no-such.qed", "no such file")),
    "absent directory": (["file=no-such/x.qed"], ("no-such/x.qed",)),
    "directory": (["file=."], ("not a file",)),
    "not QED": (["file=raw.bin"], ("not in qed format",)),
    "qcow2": (["file=disk.qcow2"], ("disk.qcow2", "not in qed format")),
    "character device": (["file=/dev/null"], ("/dev/null", "not a file or block device")),
    "server that is not there": (["file=nbd+unix:///?socket=no-such"], ("nbd+unix", "no such file")),
    "empty image": (["file=empty.bin"], ("not in qed format",)),
    "file twice": (["file=image.qed", "file=image.qed"], ("file", "twice")),
    "unknown": (["file=image.qed", "bogus=1"], ("bogus",)),
    "unknown, empty": (["file=image.qed", "bogus="], ("bogus",)),
    "wrong case": (["file=image.qed", "Cache=none"], ("cache",)),
    "cache bogus": (["file=image.qed", "cache=bogus"], ("cache", "bogus", "writeback", "unsafe")),
    "cache empty": (["file=image.qed", "cache="], ("cache",)),
    "cache directsync": (["file=image.qed", "cache=WRITEBACK"], ("cache", "WRITEBACK".lower())),
    "l2_cache empty": (["file=image.qed", "l2_cache="], ("l2_cache",)),
    "l2_cache abc": (["file=image.qed", "l2_cache=abc"], ("l2_cache", "abc")),
    "l2_cache negative": (["file=image.qed", "l2_cache=-1"], ("l2_cache", "-1")),
    "l2_cache unit": (["file=image.qed", "l2_cache=8Q"], ("l2_cache", "8q")),
    "l2_cache float": (["file=image.qed", "l2_cache=nan"], ("l2_cache", "nan")),
    "l2_cache huge": (["file=image.qed", "l2_cache=99999999999999999999E"], ("l2_cache",)),
    "affinity bogus": (["file=image.qed", "affinity=2"], ("affinity", "auto")),
    "backing bogus": (["file=image.qed", "backing=all"], ("backing=all", "none", "files", "any")),
    "backing twice": (["file=image.qed", "backing=any", "backing=any"], ("backing", "twice")),
    "backing-format bogus": (["file=image.qed", "backing-format=luks"], ("backing-format=luks", "qcow2", "probe")),
    "backing-dir empty": (["file=image.qed", "backing-dir="], ("backing-dir=",)),
    "backing-dir absent": (["file=image.qed", "backing-dir=no-such"], ("backing-dir=no-such", "there is no")),
    "trace bogus": (["file=image.qed", "trace=bogus_event"], ("trace", "bogus_event")),
    "trace one of two": (["file=image.qed", "trace=qed_aio_setup,nope"], ("trace", "nope")),
    "trace empty": (["file=image.qed", "trace="], ("trace",)),
    "trace empty item": (["file=image.qed", "trace=qed_aio_setup,,qed_aio_complete"], ("trace",)),
    "bare word": (["image.qed"], ("image.qed",)),
    "non-ASCII value": (["file=image.qed", "cache=größe"], ("cache",)),
}


@pytest.fixture
def directory(tmp_path: Path, image: Callable[..., Built]) -> Path:
    image(layout="DZ-D")
    (tmp_path / "raw.bin").write_bytes(b"\x01" * 4096)
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb\0\0\0\3".ljust(4096, b"\0"))
    return tmp_path


def one_error_line(log: str) -> str:
    lines = log.splitlines()
    assert len(lines) == 1, f"not one line:\n{log}"
    assert lines[0].startswith("nbdkit: ")
    assert "Traceback" not in log
    return lines[0]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(directory: Path, name: str) -> None:
    params, words = REFUSED[name]
    server = Nbdkit(params, cwd=directory)
    try:
        with pytest.raises(StartError) as caught:
            server.start()
        assert not server.socket.exists()
    finally:
        server.remove()
    assert caught.value.rc == 1
    line = one_error_line(caught.value.log).lower()
    line = line.replace(str(directory).lower(), "").replace("qed.py", "")
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


# Images that do not open: also one line before the server listens.
BAD_IMAGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "features": ({"features": 0x10}, ("unsupported qed features", "10")),
    "cluster_size": ({"header": {"cluster_size": 5000}}, ("cluster size is invalid", "5000")),
    "L1": ({"header": {"l1_table_offset": 512}}, ("table offset is invalid", "0x200")),
    "absent backing": ({"backing": "gone.raw", "no_probe": True}, ("gone.raw",)),
}


@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_one_line(image: Callable[..., Built], name: str, read_only: bool) -> None:
    changes, words = BAD_IMAGES[name]
    built = image(**changes)
    server = Nbdkit({"file": built.path}, read_only=read_only)
    try:
        with pytest.raises(StartError) as caught:
            server.start()
    finally:
        server.remove()
    assert caught.value.rc == 1
    line = one_error_line(caught.value.log).lower()
    assert not [word for word in words if word not in line], line
    assert (changes.get("backing") or str(built.path)).lower() in line


ACCEPTED: dict[str, dict[str, str]] = {
    "writeback": {"cache": "writeback"},
    "writethrough": {"cache": "writethrough"},
    "none": {"cache": "none"},
    "unsafe": {"cache": "unsafe"},
    "l2_cache bytes": {"l2_cache": "1048576"},
    "l2_cache small": {"l2_cache": "64K"},
    "l2_cache M": {"l2_cache": "8M"},
    "l2_cache G": {"l2_cache": "1G"},
    "trace": {"trace": "qed_aio_setup,qed_aio_complete"},
    "trace all": {"trace": "all"},
    "all": {"cache": "none", "l2_cache": "1M", "trace": "all"},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(image: Callable[..., Built], serve: Serve, name: str) -> None:
    built = image(layout="DZ-D", size=MiB)
    server = serve(built.path, **ACCEPTED[name])
    client = server.connect()
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    for pos, length in ((512, 512), (64 * KiB + 512, 1024), (700 * KiB + 512, 70 * KiB)):
        client.pwrite(stamp(3, pos, length), pos)
        assert_same(client.pread(length, pos), stamp(3, pos, length), pos)
    client.flush()
    client.shutdown()
    server.stop()


def test_trace_names_reach_the_log(image: Callable[..., Built], serve: Serve) -> None:
    built = image(size=MiB)
    server = serve(built.path, trace="qed_aio_write_main,qed_write_table", args=["-v"])
    client = server.connect()
    client.pwrite(b"t" * 4096, 4096)
    client.shutdown()
    server.stop()
    events = re.findall(r"debug: (qed_\w+) ", server.log())
    # the L2 table, then the L1 sector
    assert events == ["qed_aio_write_main", "qed_write_table", "qed_write_table"]


def test_no_trace_without_the_parameter(image: Callable[..., Built], serve: Serve) -> None:
    server = serve(image(size=MiB).path, args=["-v"])
    client = server.connect()
    client.pwrite(b"t" * 4096, 4096)
    client.shutdown()
    server.stop()
    assert "debug: qed_" not in server.log()


def test_dump_plugin_shows_version_and_path() -> None:
    for cwd, plugin in ((REPO, os.path.relpath(PLUGIN, REPO)), (Path("/"), str(PLUGIN))):
        result = run(["nbdkit", "python", plugin, "--dump-plugin"], cwd=cwd)
        assert result.rc == 0, result.text
        assert not result.err
        fields = dict(line.split("=", 1) for line in result.out.splitlines() if "=" in line)
        import qedcore

        ours = {key: value for key, value in fields.items() if key.startswith("qed")}
        assert qedcore.__version__ in ours.values(), result.out
        assert any(str(PLUGIN) in v or str(REPO / "qedcore") in v for v in ours.values()), result.out


def test_parameter_order_does_not_matter(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="D", size=MiB)
    server = Nbdkit(["l2_cache=1M", "cache=none", f"file={built.path}"])
    try:
        with server.start():
            assert_same(server.connect().pread(MiB, 0), built.read(0, MiB))
    finally:
        server.remove()


def test_relative_backing_dir(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    """It starts where nbdkit was started, which changes its directory later."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "base").write_bytes(stamp(9, 0, MiB))
    built = image(size=MiB, layout="-", backing="in/base", no_probe=True)
    server = serve(built.path, cwd=tmp_path, daemon=True, **{"backing-dir": "in"})
    client = server.connect()
    assert_same(client.pread(MiB, 0), stamp(9, 0, MiB))
    client.pwrite(b"x" * 512, 0)  # the chain is opened anew
    client.shutdown()
    server.stop()
    with pytest.raises(StartError) as caught:
        serve(built.path, cwd=tmp_path / "in", **{"backing-dir": "/usr"})
    assert "backing-dir" in one_error_line(caught.value.log)


def test_backing_none(tmp_path: Path, image: Callable[..., Built], serve: Serve) -> None:
    (tmp_path / "base").write_bytes(stamp(9, 0, MiB))
    with pytest.raises(StartError) as caught:
        serve(image(size=MiB, layout="-", backing="base", no_probe=True).path, backing="none")
    assert "backing=none" in one_error_line(caught.value.log)
