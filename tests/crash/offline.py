"""Crashes of what is done to images that nobody uses: resize, commit, rebase and compact.

Whenever one comes, the guest reads what it read before; after a resize also what it is to read then.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.crashes import World, check_crashes, guest
from support.patterns import KiB, stamp
from support.qed_image import F_NEED_CHECK, Geometry, ImageSpec, build

import qedcore
from qedcore.engine import allocator
from qedcore.engine.chain import close_source
from qedcore.maintenance import compact
from qedcore.maintenance.commit import commit
from qedcore.maintenance.rebase import open_base, rebase
from qedcore.maintenance.resize import resize

CS = 4 * KiB
KINDS = ("grow", "shrink", "commit", "rebase", "compact")


class Offline:
    """A random image, perhaps over a raw or a QED file, and what `kind` is to do with it."""

    def __init__(self, directory: Path, rng: random.Random, kind: str) -> None:
        self.rng = rng
        self.kind = kind
        self.path = directory / "image.qed"
        self.base = directory / "base"
        self.below = rng.choice(("raw", "qed") if kind in ("commit", "rebase") else ("raw", "qed", None, None))
        self.geometry = Geometry(CS, rng.choice((1, 1, 2, 4)))
        size = rng.choice((1, 5, 40, self.geometry.entries - 1, self.geometry.entries + 30)) * CS
        size = min(size, (45 if kind == "rebase" else 560) * CS) + rng.choice((0, 512, CS - 512))
        self.new = self._new_file(directory, size)
        spec: dict[str, Any] = {"backing": "base", "no_probe": self.below == "raw"} if self.below else {}
        self._build_base(size)
        layout = self._layout(size + (8 * CS if kind == "grow" else 0))  # a shrink may have left something there
        self.spec = ImageSpec(
            size=size,
            cluster_size=CS,
            table_size=self.geometry.table_size,
            layout=layout,
            reverse=rng.random() < 0.5,
            l1_last=rng.random() < 0.3,
            leaks=rng.choice((0, 0, 3)),
            # Who starts with a dirty image repairs it first.
            features=F_NEED_CHECK if rng.random() < 0.2 else 0,
            **spec,
        )
        built = build(self.path, self.spec)
        with self.path.open("r+b") as file:  # some clusters of zeros, of which copies leave nothing but a hole
            for offset in built.offsets.values():
                if rng.random() < 0.2:
                    file.seek(offset)
                    file.write(bytes(CS))
        self.size = max(512, size + rng.choice((1, 5, 600)) * (CS if kind == "grow" else -CS) + 512)

    def _layout(self, size: int) -> dict[int, str]:
        rng, clusters = self.rng, -(-size // CS)
        entries = self.geometry.entries
        hot = [*range(12), entries - 1, entries, entries + 3, clusters - 1, clusters - 2, rng.randrange(clusters)]
        return {n: rng.choice(("data", "data", "zero", "-")) for n in hot if n < clusters and rng.random() < 0.6}

    def _build_base(self, size: int) -> None:
        size = max(512, self.rng.choice((size, size // 2, size + 3 * CS, 7 * CS)) // 512 * 512)
        if self.below == "qed":
            layout = self._layout(size)
            build(self.base, ImageSpec(size=size, cluster_size=CS, table_size=2, layout=layout, tag=9))
        elif self.below == "raw":
            self.base.write_bytes(stamp(9, 0, size))

    def _new_file(self, directory: Path, size: int) -> str | None:
        """What it is rebased onto: nothing, or a file that differs in some clusters."""
        if self.kind != "rebase" or self.rng.random() < 0.2:
            return None
        content = bytearray(stamp(9, 0, size))
        for cluster in range(0, size // CS, 3):
            content[cluster * CS : (cluster + 1) * CS] = self.rng.choice((bytes(CS), stamp(8, cluster * CS, CS)))
        (directory / "new").write_bytes(content[: self.rng.choice((size, size // 2))])
        return "new"

    def run(self, opener: Callable[..., Any]) -> None:
        with qedcore.open_image(self.path, opener=opener, write_below=lambda name, path: True) as image:
            if self.kind in ("grow", "shrink"):
                resize(image, self.size)
            elif self.kind == "commit":
                assert image.backing is not None
                commit(image, image.backing)
            elif self.kind == "compact":
                compact.compact(image, zeros=self.rng.random() < 0.5)
            else:
                path = str(self.path.parent / self.new) if self.new else ""
                new = open_base(image, path, "raw", self.new, opener=opener) if self.new else None
                try:
                    rebase(image, self.new, new, True)
                finally:
                    close_source(new)

    def check(self, subsets: int) -> int:
        """How many states there were.  Raises AssertionError and QEDError."""
        before = guest(self.path)
        allowed = [before]
        if self.kind in ("grow", "shrink"):
            allowed.append(before[: self.size] + bytes(max(0, self.size - len(before))))
        files = [path for path in (self.path, self.base, self.path.parent / "new") if path.exists()]
        world = World(*files)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compact, "WINDOW", 4 * CS)
            patch.setattr(allocator, "GROWTH_STEP", 8 * CS)
            self.run(world.open)
            states = check_crashes(world, self.path, allowed, self._repair_base, self.rng, subsets)
        world.save()
        assert guest(self.path) == allowed[-1]
        return states

    def _repair_base(self) -> None:
        """Perhaps somebody opens the base first."""
        if self.below == "qed" and self.rng.random() < 0.5:
            qedcore.open_image(self.base, cache="unsafe").close()
