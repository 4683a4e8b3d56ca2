"""Every command on sound images that are full of leaks and holes: the guest's bytes are the same before and after.

The images are files, and the commands are those of `qed`, in this process.  What the guest sees is the independent
reader's word, before and after; commands that only read leave every byte of the file as it was.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from support.crashes import guest
from support.litter import littering
from support.patterns import KiB, assert_same, stamp
from support.qed_image import Geometry, ImageSpec, QedFile, build
from support.qemu import qemu_img

from qedcore.cli.main import main
from qedcore.storage.file import punch_hole

_SLACK = 64 * KiB  # bytes on disk that a command may add: a few tables


class Command(NamedTuple):
    """`words` of the command line: IMAGE, OUT and SIZE stand for what they say."""

    words: str
    backing: bool | None = None  # only with one, or only without
    leaks: bool = True  # may leave some
    codes: tuple[int, ...] = (0,)
    check: Callable[[Any], None] = lambda case: None

    @property
    def reads(self) -> bool:
        """It leaves the image alone."""
        return self.words.split()[0] in ("info", "map", "dump", "salvage", "convert", "measure") or (
            self.words in ("check IMAGE", "check -r all --dry-run IMAGE")
        )


def same_as_raw(case: Case) -> None:
    out = case.out.read_bytes()
    assert_same(out[: len(case.before)].ljust(len(case.before), b"\0"), case.before)
    assert not out[len(case.before) :].strip(b"\0")


def same_as_qed(case: Case) -> None:
    assert_same(guest(case.out), case.before)


COMMANDS = {
    "check": Command("check IMAGE", codes=(0, 3)),
    "check -r leaks": Command("check -r leaks IMAGE", leaks=False),
    "check -r all": Command("check -r all IMAGE", leaks=False),
    "check --dry-run": Command("check -r all --dry-run IMAGE", codes=(0, 3)),
    "compact": Command("compact IMAGE", leaks=False),
    "compact --zeros": Command("compact --zeros IMAGE", leaks=False),
    "resize +": Command("resize IMAGE +2M"),
    "resize -": Command("resize --shrink IMAGE SIZE"),
    "rebase": Command("rebase -b other -F raw IMAGE", backing=True),
    "rebase to nothing": Command("rebase -b '' IMAGE", backing=True),
    "rebase -u": Command("rebase -u -b same -F raw IMAGE", backing=True),
    "commit": Command("commit IMAGE", backing=True),
    "commit -d": Command("commit -d IMAGE", backing=True),
    "salvage": Command("salvage IMAGE OUT", backing=False, check=same_as_raw),
    "convert raw": Command("convert -O raw IMAGE OUT", check=same_as_raw),
    "convert qed": Command("convert -O qed IMAGE OUT", check=same_as_qed),
    "info": Command("info IMAGE"),
    "map": Command("map IMAGE"),
    "dump": Command("dump IMAGE"),
    "measure": Command("measure -O qcow2 IMAGE"),
}


class Case:
    """A random image, sound and full of leaks, and a command."""

    def __init__(self, directory: Path, rng: random.Random, name: str) -> None:
        self.directory = directory
        self.command = COMMANDS[name]
        self.path = directory / "image.qed"
        self.out = directory / "out"
        wanted = self.command.backing
        backing = rng.random() < 0.5 if wanted is None else wanted
        cs = rng.choice((4 * KiB, 4 * KiB, 64 * KiB))
        geometry = Geometry(cs, rng.choice((1, 1, 2, 4)))
        entries = geometry.entries
        small = (40, entries + 30, 3 * entries) if cs == 4 * KiB else (40,)
        size = rng.choice(small) * cs + rng.choice((0, 512, cs - 512))
        last = -(-size // cs) - 1
        hot = [*range(12), entries - 1, entries, entries + 3, 2 * entries, 2 * entries + 1, last - 1, last]
        layout = {n: rng.choice(("data", "data", "zero", "-")) for n in hot if n <= last and rng.random() < 0.6}
        layout[rng.randrange(last)] = "data"
        if backing:
            base = stamp(9, 0, size // 2 // 512 * 512)
            (directory / "base").write_bytes(base)
            (directory / "same").write_bytes(base)
            (directory / "other").write_bytes(bytes(7 * cs) + base[7 * cs :])
        self.spec = ImageSpec(
            size=size,
            cluster_size=cs,
            table_size=geometry.table_size,
            layout=layout,
            reverse=rng.random() < 0.3,
            l1_last=rng.random() < 0.3,
            litter=littering(rng, cs, geometry.table_size),
            backing="base" if backing else None,
            no_probe=backing,
        )
        built = build(self.path, self.spec)
        if cs > 4 * KiB and rng.random() < 0.7:  # as a guest that writes little leaves them
            with open(self.path, "r+b") as file:
                for offset in built.offsets.values():
                    punch_hole(file.fileno(), offset + 4 * KiB, cs - 4 * KiB)
        self.size = rng.randrange(1, size // 512) * 512
        self.before = guest(self.path)

    def run(self) -> None:
        """Raises AssertionError."""
        content, blocks = self.path.read_bytes(), self.path.stat().st_blocks
        names = {"IMAGE": str(self.path), "OUT": str(self.out), "SIZE": str(self.size), "''": ""}
        argv = [names.get(word, word) for word in self.command.words.split()]
        argv = [str(self.directory / word) if word in ("other", "same") else word for word in argv]
        said = io.StringIO()
        where = os.getcwd()
        os.chdir(self.directory)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main(argv)
        finally:
            os.chdir(where)
        assert code in self.command.codes, f"{argv}: {code}, {said.getvalue()}"
        after = guest(self.path)
        if argv[0] == "resize":
            kept = min(len(after), len(self.before))
            assert_same(after[:kept], self.before[:kept])
            assert not after[kept:].strip(b"\0"), "what a device gains is not zeros"
        else:
            assert_same(after, self.before)
        if self.command.reads:
            assert self.path.read_bytes() == content, "it was not to be changed"
        with QedFile(self.path) as image:
            report = image.verify()
        assert not report.errors, report.errors[:3]
        assert not report.need_check
        if not self.command.leaks:
            assert not report.leaks, report.leaks[:10]
            if self.spec.geometry.qemu_opens:
                assert qemu_img("check", "-f", "qed", self.path).rc == 0
        if argv[0] in ("check", "compact"):
            more = (self.path.stat().st_blocks - blocks) * 512
            assert more <= _SLACK, f"{more} more bytes on disk"
        self.command.check(self)
