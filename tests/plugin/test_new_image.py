"""create=true: a missing image is made before it is served; nothing that exists is touched."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, assert_sound, read_header
from support.server import Nbdkit, refusal
from support.tools import PLUGIN, TIMEOUT

Serve = Callable[..., Nbdkit]


def info(path: Path) -> Any:
    return json.loads(qemu.qemu_img_ok("info", "--output=json", path))


def test_a_new_image(tmp_path: Path, serve: Serve) -> None:
    path = tmp_path / "new.qed"
    server = serve(path, create="true", size="5.5M")
    assert server.log() == f"qed: {path}: created: QED image, 5.5 MiB, 64 KiB clusters\n"
    client = server.connect()
    assert client.get_size() == 5632 * KiB
    client.pwrite(stamp(1, 0, MiB), MiB)
    client.shutdown()
    server.stop()
    assert_sound(path)
    qemu.assert_check_clean(path)
    assert os.listdir(tmp_path) == ["new.qed"]  # no temporary file is left


def test_what_qemu_cannot_open(tmp_path: Path, serve: Serve) -> None:
    path = tmp_path / "new.qed"
    server = serve(path, create="true", size="1G", cluster_size="4M")
    assert f"qed: {path}: warning: QEMU cannot open images " in server.log()
    server.stop()


def test_all_options(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.raw").write_bytes(stamp(9, 0, 3 * MiB))
    options = {"cluster_size": "4k", "table_size": 2, "backing_file": "base.raw", "backing_fmt": "raw"}
    server = serve("sub/x.qed", create="yes", size=MiB + 1, cwd=tmp_path, daemon=True, **options)
    client = server.connect()
    assert client.get_size() == MiB + 512
    assert_same(client.pread(MiB, 0), stamp(9, 0, MiB))
    client.shutdown()
    server.stop()
    found = info(tmp_path / "sub" / "x.qed")
    assert found["virtual-size"] == MiB + 512 and found["cluster-size"] == 4 * KiB
    assert found["backing-filename"] == "base.raw"
    assert read_header(tmp_path / "sub" / "x.qed")["features"] == 1 | 4  # raw is recorded


@pytest.mark.parametrize("fmt", ["raw", "qed"])
def test_the_size_of_the_backing_file(tmp_path: Path, image: Callable[..., Built], serve: Serve, fmt: str) -> None:
    if fmt == "qed":
        base = image(name="base", size=3 * MiB, layout="DD").path
    else:
        base = tmp_path / "base"
        base.write_bytes(stamp(1, 0, 3 * MiB - 100))
    content = base.read_bytes()
    server = serve(tmp_path / "x.qed", create="on", backing_file="base", backing_fmt=fmt)
    client = server.connect()
    assert client.get_size() == 3 * MiB
    client.pwrite(b"new" * 512, 0)
    client.shutdown()
    server.stop()
    assert base.read_bytes() == content


def test_an_existing_image_is_served_as_it_is(image: Callable[..., Built], serve: Serve) -> None:
    built = image(layout="DZ-D", size=MiB)
    content = built.path.read_bytes()
    server = serve(built.path, create="true", size=MiB)
    assert server.log() == ""
    client = server.connect()
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()
    server.stop()
    assert built.path.read_bytes() == content
    server = serve(built.path, create="true", size="2M", cluster_size="4k")
    what = "exists, and is served as it is: size=1048576 instead of 2097152, cluster_size=65536 instead of 4096"
    assert server.log() == f"qed: {built.path}: {what}\n"
    server.stop()
    assert built.path.read_bytes() == content


def test_create_false_does_not(tmp_path: Path) -> None:
    refused(tmp_path, ["file=x.qed", "create=false"], "x.qed", "No such file")


def test_two_servers_at_once(tmp_path: Path) -> None:
    """One of them makes the image, the other one finds it: never two images, one of which is lost."""
    for turn in range(5):
        path = tmp_path / f"{turn}.qed"
        servers = [Nbdkit({"file": path, "create": "true", "size": "1M"}) for _ in range(3)]
        try:
            processes = [
                subprocess.Popen([*server.argv(), "--run", "exit 0"], stderr=subprocess.PIPE, text=True)
                for server in servers
            ]
            logs = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        finally:
            for server in servers:
                server.remove()
        assert [process.returncode for process in processes] == [0, 0, 0], logs
        assert sorted(log.count("created") for log in logs) == [0, 0, 1], logs
        assert_sound(path)
    assert len(os.listdir(tmp_path)) == 5


def refused(directory: Path, params: list[str], *words: str) -> None:
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    line = refusal(params, directory)
    assert not [word for word in words if word not in line], line
    assert {path: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before


CREATE = ["file=x.qed", "create=true"]
REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no size": (CREATE, ("create=true", "size=")),
    "not a size": ([*CREATE, "size=abc"], ("size=abc",)),
    "negative": ([*CREATE, "size=-1"], ("size=-1",)),
    "too large": ([*CREATE, "size=65T"], ("image size is invalid", str(65 << 40))),
    "beyond NBD": ([*CREATE, "size=8E", "cluster_size=64M"], ("size", "too large")),
    "cluster size": ([*CREATE, "size=1M", "cluster_size=5000"], ("cluster size is invalid", "5000")),
    "table size": ([*CREATE, "size=1M", "table_size=3"], ("table size is invalid", "3")),
    "not a boolean": (["file=x.qed", "create=maybe", "size=1M"], ("create=maybe",)),
    "no create": (["file=x.qed", "size=1M"], ("size=", "create=true")),
    "create=no": (["file=x.qed", "create=no", "cluster_size=4k"], ("cluster_size=", "create=true")),
    "backing without format": ([*CREATE, "backing_file=base"], ("backing_fmt",)),
    "format without backing": ([*CREATE, "size=1M", "backing_fmt=raw"], ("backing_file",)),
    "unknown format": ([*CREATE, "backing_file=base", "backing_fmt=vmdk"], ("backing_fmt=vmdk", "raw", "qed")),
    "absent backing": ([*CREATE, "backing_file=gone", "backing_fmt=raw"], ("gone", "No such file")),
    "itself": ([*CREATE, "backing_file=x.qed", "backing_fmt=qed"], ("x.qed", "No such file")),
    "wrong format": ([*CREATE, "size=1M", "backing_file=base", "backing_fmt=qed"], ("base", "not in QED format")),
    "long name": ([*CREATE, "size=1M", f"backing_file={'./' * 2100}base", "backing_fmt=raw"], ("name",)),
    "no directory": (["file=no/x.qed", "create=true", "size=1M"], ("no/x.qed", "No such file")),
    "backing that is not allowed": (
        [*CREATE, "size=1M", "backing_file=base", "backing_fmt=raw", "backing=none"],
        ("'base' of ", "/x.qed is needed, and backing=none allows none"),
    ),
    "a directory": (["file=.", "create=true", "size=1M"], ("not a file",)),
    "not an image": (["file=base", "create=true", "size=1M"], ("not in QED format",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    params, words = REFUSED[name]
    (tmp_path / "base").write_bytes(bytes(4096))
    refused(tmp_path, params, *words)
    assert os.listdir(tmp_path) == ["base"]


def test_help_and_dump_plugin_create_nothing(tmp_path: Path) -> None:
    for option in ("--help", "--dump-plugin"):
        argv = ["nbdkit", option, "python", str(PLUGIN), "file=x.qed", "create=true", "size=1M"]
        subprocess.run(argv, cwd=tmp_path, capture_output=True, timeout=TIMEOUT, check=True)
    assert os.listdir(tmp_path) == []
