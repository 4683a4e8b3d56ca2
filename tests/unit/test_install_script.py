"""tests/install.sh: which package manager it asks for what, and what it does without."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "install.sh"

NEEDED = ["python3", "nbdkit", "nbdkit-plugin-python", "python3-venv"]
WISHED = ["libnbd-bin", "file", "python3-libnbd", "qemu-utils", "gnutls-bin", "perl", "fuse3"]

DNF = "nbdkit nbdkit-python-plugin python3 libnbd file python3-libnbd qemu-img gnutls-utils perl-podlators fuse3"
ZYPPER = "nbdkit nbdkit-python-plugin python3 libnbd file python3-libnbd qemu-tools gnutls perl fuse3"
APT = "nbdkit nbdkit-plugin-python python3-venv libnbd-bin file python3-libnbd qemu-utils gnutls-bin perl fuse3"

# What each brings; a Python module is a file of that name, too.
TOOLS = {
    "nbdkit": ["nbdkit"], "python3": ["venv"], "python3-venv": ["venv"], "file": ["file"], "python3-libnbd": ["nbd"],
    "libnbd": ["nbdinfo", "nbdcopy"], "libnbd-bin": ["nbdinfo", "nbdcopy"],
    "qemu-img": ["qemu-img", "qemu-io", "qemu-nbd"], "qemu-tools": ["qemu-img", "qemu-io", "qemu-nbd"],
    "qemu-utils": ["qemu-img", "qemu-io", "qemu-nbd"],
    "gnutls-utils": ["psktool", "certtool"], "gnutls": ["psktool", "certtool"], "gnutls-bin": ["psktool", "certtool"],
    "perl-podlators": ["pod2man"], "perl": ["pod2man"], "fuse3": ["fusermount3"],
}  # fmt: skip


class System:
    """A PATH with a shell, one package manager that records what it is asked for, and nothing else."""

    def __init__(self, directory: Path, manager: str, lacks: str = "none") -> None:
        self.bin, self.log = directory / "bin", directory / "log"
        self.bin.mkdir()
        for name in ("sh", "cat", "mktemp", "rm", "touch", "chmod", "env"):
            found = shutil.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)
        self.program("id", "echo 0")
        # -c CODE: whether the modules in it are installed.
        self.program(
            "python",
            f'for m in nbd venv numpy; do case "$2" in *$m*) [ -e "{self.bin}/$m" ] || exit 1 ;; esac; done; exit 0',
        )
        brings = "\n".join(f"{name}) made='{' '.join(tools)}' ;;" for name, tools in TOOLS.items())
        self.program(
            manager,
            f'echo "{manager} $*" >>"{self.log}"\n'
            f'for p; do [ "$p" != {lacks} ] || exit 1; done\n'
            f"for p; do made=; case $p in\n{brings}\nesac\nfor t in $made; do\n"
            f'echo "#!$(command -v sh)" >"{self.bin}/$t"; chmod +x "{self.bin}/$t"; done; done',
        )

    def program(self, name: str, code: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{self.bin}/sh\n{code}\n")
        path.chmod(0o755)

    def install(self, *packages: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "PYTHON": str(self.bin / "python"), "TMPDIR": os.fspath(self.bin.parent)}
        return subprocess.run([self.bin / "sh", SCRIPT, *packages], env=env, capture_output=True, text=True)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.mark.parametrize(
    ("manager", "commands"),
    [
        ("dnf", [f"install -q -y --setopt=install_weak_deps=False {DNF}"]),
        ("zypper", [f"--non-interactive --quiet install --no-recommends {ZYPPER}"]),
        ("apt-get", ["update -q", f"install -q -y --no-install-recommends {APT}"]),
    ],
)
def test_asks_for_this_systems_names(tmp_path: Path, manager: str, commands: list[str]) -> None:
    system = System(tmp_path, manager)
    done = system.install(*NEEDED, "--", *WISHED)
    assert (done.returncode, done.stderr) == (0, "")
    assert system.asked() == [f"{manager} {command}" for command in commands]
    # The second time everything is there.
    assert system.install(*NEEDED, "--", *WISHED).stdout == ""
    assert len(system.asked()) == len(commands)


def test_one_that_is_not_to_be_had_does_not_keep_back_the_others(tmp_path: Path) -> None:
    system = System(tmp_path, "dnf", lacks="python3-libnbd")
    done = system.install(*NEEDED, "--", *WISHED)
    assert done.returncode == 0
    assert done.stderr == "not to be had here, what needs it is left out: python3-libnbd\n"
    assert [line.split()[-1] for line in system.asked()[1:]] == DNF.split()


def test_one_that_is_needed_and_not_to_be_had(tmp_path: Path) -> None:
    system = System(tmp_path, "dnf", lacks="nbdkit")
    done = system.install(*NEEDED)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("still not usable: nbdkit")


@pytest.mark.parametrize(("packages", "code"), [(["nbdkit"], 1), (["--", "fio"], 0)])
def test_no_package_manager(tmp_path: Path, packages: list[str], code: int) -> None:
    system = System(tmp_path, "pacman")
    done = system.install(*packages)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert system.asked() == []
