"""A virtual machine whose disk is a served image: ext4 with discard, and what Linux does with it.

Not in the default run.  Needs the Debian packages qemu-system-x86, linux-image-cloud-amd64 and busybox-static; the
latter two may be unpacked into the directory that QED_TEST_VM names instead (dpkg -x).  The processor is emulated,
which takes a minute or two, and works anywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
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

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
# twice: which of the first two needs the other depends on the kernel
for module in {modules} {modules}; do insmod /modules/$module.ko 2>/dev/null; done
set -e
trap 'echo TEST FAILED; poweroff -f' EXIT
echo discard at most $(cat /sys/block/vda/queue/discard_max_bytes)
/sbin/mke2fs -q -t ext4 /dev/vda
mkdir /disk
mount -t ext4 -o discard /dev/vda /disk
{work}
cd /disk
find . -type f | sort | xargs sha256sum | sed 's/^/SUM /'
cd /
umount /disk
sync
trap - EXIT
echo TEST DONE
poweroff -f
"""

# What is in /data goes to the disk, part of it is deleted, discarded, and written again elsewhere.
FILES = """
for i in 0 1 2 3 4 5 6 7 8 9 10 11; do cat /data/* /data/* /data/* >/disk/old$i; done
sync
rm /disk/old1 /disk/old2 /disk/old4 /disk/old5 /disk/old7 /disk/old8
sync
for i in 0 1 2; do cp /data/* /disk; mkdir -p /disk/d$i; mv /disk/f* /disk/d$i; done
sync
rm /disk/old10
fstrim -v /disk
dd if=/dev/urandom of=/disk/random bs=100k count=77 2>/dev/null
"""

# Packages are installed, upgraded and removed again, by Debian's dpkg with all of its fsyncs and renames.
PACKAGES = """
export PATH=/usr/bin:/usr/sbin:/bin:/sbin
mkdir -p /disk/var/lib/dpkg/updates /disk/var/lib/dpkg/info /disk/var/log
touch /disk/var/lib/dpkg/status /disk/var/lib/dpkg/available
dpkg="/usr/bin/dpkg --root=/disk --force-bad-path --force-script-chrootless --log=/dev/null"
$dpkg -i /data/*_1_all.deb >/dev/null
$dpkg -i /data/*_2_all.deb >/dev/null
$dpkg -P p1 >/dev/null
sync
fstrim -v /disk
$dpkg -i /data/p1_1_all.deb >/dev/null
$dpkg --verify
sync
"""


def kernel() -> Path:
    found = sorted((ROOT / "boot").glob("vmlinuz-*-cloud-amd64"))
    if not found:
        unavailable("no vmlinuz-*-cloud-amd64")
    return found[-1]


def initramfs(tmp_path: Path, files: dict[str, bytes], work: str, programs: Sequence[str] = ()) -> Path:
    """A root file system in memory, whose init does the work; `programs` of this system are there, too."""
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
    for program in ("mke2fs", *programs):
        path = shutil.which(program)
        assert path is not None
        for name in [path, *re.findall(r"(/\S+) \(0x", run_ok(["ldd", path]))]:
            target = root / "sbin/mke2fs" if program == "mke2fs" and name == path else root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, target)
    for name, data in files.items():
        (root / "data" / name).write_bytes(data)
    (root / "init").write_text(INIT.format(modules=" ".join(MODULES), work=work))
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


def boot(server: Nbdkit, initrd: Path) -> dict[str, str]:
    """Let the machine do its work; name -> SHA-256 of each file on its disk in the end."""
    drive = f"file={server.uri},format=raw,if=virtio,discard=unmap"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "512", "-nodefaults"]
    command += ["-display", "none", "-serial", "stdio", "-no-reboot", "-drive", drive, "-kernel", str(kernel())]
    command += ["-initrd", str(initrd)]
    command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=500, check=False)
    console = done.stdout.decode(errors="replace")
    assert done.returncode == 0 and "TEST DONE" in console, console + done.stderr.decode(errors="replace")
    server.stop()
    assert server.log() == ""
    return dict(reversed(line.split()[1:]) for line in console.splitlines() if line.startswith("SUM "))


def assert_files(tmp_path: Path, image: Path, sums: dict[str, str]) -> None:
    """QEMU finds the image clean, and the file system in it is sound and has these files."""
    qemu.assert_check_clean(image)
    raw, copy = tmp_path / "out.raw", tmp_path / "copy"
    qemu.to_raw(image, raw)
    run_ok(["e2fsck", "-fn", raw])
    for name, digest in sums.items():
        assert run(["debugfs", "-R", f"dump {name[1:]} {copy}", raw]).rc == 0
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == digest, name
        copy.unlink()


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_ext4_with_discard(tmp_path: Path, image: Callable[..., Built], serve: Serve, backing: bool) -> None:
    require("qemu-system-x86_64", "mke2fs", "debugfs", "e2fsck", "ldd")
    files = {f"f{i}": stamp(i + 1, 0, MiB + i * 4099) for i in range(4)}
    if backing:
        (tmp_path / "base.raw").write_bytes(stamp(9, 0, 64 * MiB))
    built = image(size=SIZE, layout="D-Z" * 99, backing="base.raw" if backing else None, no_probe=backing)
    sums = boot(serve(built.path), initramfs(tmp_path, files, FILES))
    live = 5 * 3 * 4 * MiB + 3 * 4 * MiB + 8 * MiB  # bytes in files, about
    assert built.path.stat().st_blocks * 512 < live + 32 * MiB, "what was discarded is not free"
    assert_files(tmp_path, built.path, sums)
    assert len(sums) == 5 + 3 * len(files) + 1
    assert sums["./d2/f3"] == hashlib.sha256(files["f3"]).hexdigest()


def package(tmp_path: Path, number: int, version: int, rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A Debian package of 150 files of all sizes; name -> SHA-256 of each."""
    tree = tmp_path / f"p{number}_{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: p{number}\nVersion: {version}\nArchitecture: all\nMaintainer: T <t@t>\nDescription: t\n"
    )
    sums = {}
    for i in range(150):
        path = tree / f"usr/share/p{number}/{i % 7}/f{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = rng.randbytes(rng.choice([0, 10, 3000, 4096, 20000, 200 * KiB]))
        path.write_bytes(data)
        sums[f"./{path.relative_to(tree)}"] = hashlib.sha256(data).hexdigest()
    run_ok(["dpkg-deb", "-Zgzip", "--root-owner-group", "--build", tree, f"{tree}_all.deb"])
    return (tmp_path / f"{tree}_all.deb").read_bytes(), sums


def test_packages_are_installed(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, rng: random.Random
) -> None:
    require("qemu-system-x86_64", "mke2fs", "debugfs", "e2fsck", "ldd", "dpkg", "dpkg-deb", "tar")
    packages = {(n, v): package(tmp_path, n, v, rng) for n in (1, 2, 3) for v in (1, 2)}
    built = image(size=SIZE, layout="")
    files = {f"p{n}_{v}_all.deb": deb for (n, v), (deb, _) in packages.items()}
    programs = ("dpkg", "dpkg-deb", "dpkg-split", "tar", "rm")
    sums = boot(serve(built.path), initramfs(tmp_path, files, PACKAGES, programs))
    assert_files(tmp_path, built.path, sums)
    for installed in ((1, 1), (2, 2), (3, 2)):
        assert packages[installed][1].items() <= sums.items()
