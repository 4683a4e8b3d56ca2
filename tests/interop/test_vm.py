"""A virtual machine whose disk is a served image: ext4 with discard, and what Linux does with it.

Not in the default run.  Needs the Debian packages qemu-system-x86, linux-image-cloud-amd64 and busybox-static; the
latter two may be unpacked into the directory that QED_TEST_VM names instead (dpkg -x).  The processor is emulated,
which takes a minute or two, and works anywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB, stamp
from support.qed_image import Built
from support.server import Nbdkit
from support.tools import require, run, run_ok, unavailable

Serve = Callable[..., Nbdkit]
pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]
ROOT = Path(os.environ.get("QED_TEST_VM", "/"))
MODULES = ("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
SIZE = 256 * MiB
CS = 64 * KiB

# What is in /data goes to the disk, part of it is deleted, discarded, and written again elsewhere.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
for module in {modules}; do insmod /modules/$module.ko 2>/dev/null; done
set -e
trap 'echo TEST FAILED; poweroff -f' EXIT
echo discard at most $(cat /sys/block/vda/queue/discard_max_bytes)
/sbin/mke2fs -q -t ext4 /dev/vda
mkdir /disk
mount -t ext4 -o discard /dev/vda /disk
for i in 0 1 2 3 4 5 6 7 8 9 10 11; do cat /data/* /data/* /data/* >/disk/old$i; done
sync
rm /disk/old1 /disk/old2 /disk/old4 /disk/old5 /disk/old7 /disk/old8
sync
for i in 0 1 2; do cp /data/* /disk; mkdir -p /disk/d$i; mv /disk/f* /disk/d$i; done
sync
rm /disk/old10
fstrim -v /disk
dd if=/dev/urandom of=/disk/random bs=100k count=77 2>/dev/null
cd /disk
find . -type f | sort | xargs sha256sum | sed 's/^/SUM /'
cd /
umount /disk
sync
trap - EXIT
echo TEST DONE
poweroff -f
"""


def kernel() -> Path:
    found = sorted((ROOT / "boot").glob("vmlinuz-*-cloud-amd64"))
    if not found:
        unavailable("no vmlinuz-*-cloud-amd64")
    return found[-1]


def initramfs(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """A root file system in memory, whose init does the work."""
    root = tmp_path / "root"
    for name in ("bin", "sbin", "dev", "proc", "sys", "modules", "data"):
        (root / name).mkdir(parents=True)
    busybox = ROOT / "bin" / "busybox"
    if not busybox.exists():
        unavailable("busybox-static is not installed")
    shutil.copy(busybox, root / "bin")
    release = kernel().name[len("vmlinuz-") :]
    there = {path.stem: path for path in (ROOT / "lib" / "modules" / release).rglob("virtio*.ko")}
    for module in MODULES:
        if module in there:  # else it is built in
            shutil.copy(there[module], root / "modules")
    mke2fs = shutil.which("mke2fs")
    assert mke2fs is not None
    for name in [mke2fs, *re.findall(r"(/\S+) \(0x", run_ok(["ldd", mke2fs]))]:
        target = root / "sbin/mke2fs" if name == mke2fs else root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)
    for name, data in files.items():
        (root / "data" / name).write_bytes(data)
    (root / "init").write_text(INIT.format(modules=" ".join(MODULES)))
    (root / "init").chmod(0o755)
    out = tmp_path / "initramfs"
    out.write_bytes(gzip.compress(cpio(root), 1))
    return out


def cpio(root: Path) -> bytes:
    """The tree as the kernel wants it (Documentation/driver-api/early-userspace/buffer-format)."""
    out = bytearray()

    def add(name: str, mode: int, data: bytes) -> None:
        nonlocal out
        fields = (len(out) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + os.fsencode(name) + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)

    for path in sorted(root.rglob("*")):
        mode = path.stat().st_mode
        add(str(path.relative_to(root)), mode, path.read_bytes() if stat.S_ISREG(mode) else b"")
    add("TRAILER!!!", 0, b"")
    return bytes(out)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_ext4_with_discard(tmp_path: Path, image: Callable[..., Built], serve: Serve, backing: bool) -> None:
    require("qemu-system-x86_64", "mke2fs", "debugfs", "e2fsck", "ldd")
    files = {f"f{i}": stamp(i + 1, 0, MiB + i * 4099) for i in range(4)}
    if backing:
        (tmp_path / "base.raw").write_bytes(stamp(9, 0, 64 * MiB))
    built = image(size=SIZE, layout="D-Z" * 99, backing="base.raw" if backing else None, no_probe=backing)
    server = serve(built.path)
    drive = f"file={server.uri},format=raw,if=virtio,discard=unmap"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "512", "-nodefaults"]
    command += ["-display", "none", "-serial", "stdio", "-no-reboot", "-drive", drive, "-kernel", str(kernel())]
    command += ["-initrd", str(initramfs(tmp_path, files))]
    command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=500, check=False)
    console = done.stdout.decode(errors="replace")
    assert done.returncode == 0 and "TEST DONE" in console, console + done.stderr.decode(errors="replace")
    server.stop()
    assert server.log() == ""
    qemu.assert_check_clean(built.path)
    live = 5 * 3 * 4 * MiB + 3 * 4 * MiB + 8 * MiB  # bytes in files, about
    assert built.path.stat().st_blocks * 512 < live + 32 * MiB, "what was discarded is not free"
    qemu.to_raw(built.path, tmp_path / "out.raw")
    run_ok(["e2fsck", "-fn", tmp_path / "out.raw"])
    sums = dict(reversed(line.split()[1:]) for line in console.splitlines() if line.startswith("SUM "))
    assert len(sums) == 5 + 3 * len(files) + 1
    for name, digest in sums.items():
        copy = tmp_path / "copy"
        assert run(["debugfs", "-R", f"dump {name[1:]} {copy}", tmp_path / "out.raw"]).rc == 0
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == digest, name
        copy.unlink()
    assert sums["./d2/f3"] == hashlib.sha256(files["f3"]).hexdigest()
