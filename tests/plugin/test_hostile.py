"""Images from strangers, through the real server: it answers, or ends, with one clear line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.qed_image import Built
from support.qemu import qemu_img_ok
from support.server import Nbdkit, StartError, disconnect, import_nbd

CS = 64 * 1024
NAMES = {
    "not UTF-8": b"no\xff\xfesuch.raw",
    "a line break": b"no\nsuch.raw",
    "a terminal's escape": b"no\x1b[31msuch.raw",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_strange_backing_name(image: Callable[..., Built], serve: Callable[..., Nbdkit], name: bytes) -> None:
    built = image(backing=name, no_probe=True)
    with pytest.raises(StartError) as caught:
        serve(built.path)
    assert caught.value.rc == 1
    assert len(caught.value.log.splitlines()) == 1
    assert "such.raw" in caught.value.log and caught.value.log.isprintable() is False  # only its line break
    assert caught.value.log.rstrip("\n").isprintable()


def test_backing_file_vanishes(image: Callable[..., Built], serve: Callable[..., Nbdkit]) -> None:
    """The first writer's open fails; the server says why and lives on."""
    built = image(backing=b"b\xff.raw", no_probe=True)
    base = Path(os.fsdecode(bytes(built.path.parent) + b"/b\xff.raw"))
    base.write_bytes(b"base" * 128)
    server = serve(built.path)
    moved = base.with_name("moved")
    base.rename(moved)
    with pytest.raises(import_nbd().Error):
        server.connect()
    moved.rename(base)
    client = server.connect()
    assert client.pread(8, 0) == b"basebase"
    disconnect(client)
    assert server.stop() == 0
    assert server.log().count("such file") == 1


def test_log_that_nobody_reads(image: Callable[..., Built], serve: Callable[..., Nbdkit], tmp_path: Path) -> None:
    """A repair is told to a pipe whose reader is gone: no reason to turn the client away."""
    built = image(layout="D", features=2, entries={1: lambda b: b.end})
    plugin = Path(__file__).resolve().parents[2] / "plugin" / "qed.py"
    command = 'nbdkit -U - python "$0" file="$1" --run \'qemu-io -f raw -c "write -P 5 64k 4k" "$uri" >"$2"\''
    reader, writer = os.pipe()
    os.close(reader)
    script = command.replace('"$2"', str(tmp_path / "out"))
    done = subprocess.run(["sh", "-c", script, plugin, built.path], stderr=writer, timeout=60)
    os.close(writer)
    assert done.returncode == 0
    assert "wrote 4096/4096" in (tmp_path / "out").read_text()


def test_block_status_of_a_fragmented_image(image: Callable[..., Built], serve: Callable[..., Nbdkit]) -> None:
    """QEMU asks for one extent at a time over all that is left: each answer costs what it says, not all the rest."""
    clusters = 4096
    built = image(size=clusters * CS, layout="D-" * (clusters // 2), reverse=False)
    server = serve(built.path, read_only=True)
    lines = qemu_img_ok("map", "-f", "raw", "--output=json", server.uri).splitlines()
    assert len(lines) == clusters
    client = server.connect(meta=True)
    seen: list[int] = []
    client.block_status(
        clusters * CS, 0, lambda context, offset, entries, error: seen.extend(entries), import_nbd().CMD_FLAG_REQ_ONE
    )
    assert seen == [CS, 0]
    disconnect(client)
