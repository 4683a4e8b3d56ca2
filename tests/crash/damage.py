"""Damaged images: whatever is done to one, what it still shows it shows afterwards, too (P8).

Some entries are wrong: they lead to data, to tables, to leaks, past the end or nowhere.  What the guest can surely
read is what the independent reader finds by entries that are right, in tables that are.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from support.litter import littering
from support.patterns import KiB, stamp
from support.qed_image import F_NEED_CHECK, Built, Geometry, ImageSpec, QedFile, build

import qedcore
from qedcore.errors import QEDError
from qedcore.maintenance.compact import compact
from qedcore.maintenance.repair import Repair
from qedcore.maintenance.tidy import tidy
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.open import open_storage

CS = 4 * KiB
STEPS = ("read", "write", "trim", "leaks", "all", "compact")
_LINKED = struct.pack("<Q", 0x7F5500000 << 12) * (CS // 8)  # data of the guest that looks like entries past the end


class Damaged:
    """A random image with wrong entries."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.path = directory / "image.qed"
        self.rng = rng
        geometry = Geometry(CS, rng.choice((1, 1, 2)))
        self._entries = entries = geometry.entries
        last = 3 * entries - 1
        hot = [*range(10), entries - 1, entries, entries + 3, 2 * entries, last]
        layout = {n: rng.choice(("data", "data", "zero")) for n in hot if rng.random() < 0.7}
        layout.update({0: "data", entries + 5: "data", 2 * entries + 7: "data"})
        wrong: dict[int, Callable[[Built], int]] = {}
        wrong_tables: dict[int, Callable[[Built], int]] = {}
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.4:
                wrong_tables[rng.choice((1, 2))] = self._value()
            else:
                wrong[rng.choice((entries + 5, 11, 2 * entries + 7, entries + 30))] = self._value()
        built = build(
            self.path,
            ImageSpec(
                size=(last + 1) * CS,
                cluster_size=CS,
                table_size=geometry.table_size,
                layout=layout,
                entries=wrong,
                l1_entries=wrong_tables,
                features=F_NEED_CHECK if rng.random() < 0.3 else 0,
                litter=littering(rng, CS, geometry.table_size) if rng.random() < 0.5 else lambda behind: (),
            ),
        )
        with open(self.path, "r+b") as file:
            for cluster, offset in built.offsets.items():
                if rng.random() < 0.5 and cluster not in wrong:
                    file.seek(offset)
                    file.write(_LINKED)
        self._wrong = sorted(wrong)
        looked_at = {*hot, *layout, *range(40), *range(entries, entries + 40), *rng.sample(range(last + 1), 30)}
        clusters = sorted(n for n in looked_at if n // entries not in wrong_tables and n not in wrong)
        with QedFile(self.path) as image:
            self.sure = {n: image.read(n * CS, CS) for n in clusters}
            values = list(image.entries().values())
            tables = {offset + i * CS for offset in image.l1.values() for i in range(geometry.table_size)}
            self.own = [n for n in clusters if self._is_alone(image.entry(n), values, tables)]

    @staticmethod
    def _is_alone(entry: int, values: list[int], tables: set[int]) -> bool:
        """Nothing else leads there."""
        return entry < CS or (values.count(entry) == 1 and entry not in tables)

    def _value(self) -> Callable[[Built], int]:
        """Of a wrong entry."""
        rng = self.rng
        return rng.choice(
            (
                lambda built: rng.choice(sorted(built.offsets.values())),
                lambda built: rng.choice(sorted(built.l2_offsets.values())),
                lambda built: built.end,
                lambda built: built.end + CS * rng.randrange(5),
                lambda built: rng.randrange(1 << 63) & ~(CS - 1),
                lambda built: rng.randrange(built.end),
                lambda built: built.end - CS,
            )
        )

    def check(self, name: str) -> None:
        """Raises AssertionError."""
        with QedFile(self.path) as image:
            for cluster, content in self.sure.items():
                try:
                    shown: object = image.read(cluster * CS, CS)
                except OSError as error:
                    shown = error
                assert shown == content, f"{name}: guest cluster {cluster} has changed"

    def run(self) -> str:
        """Some of the STEPS.  Raises AssertionError."""
        steps = self.rng.sample(STEPS, self.rng.randint(1, 3))
        done: list[str] = []
        for step in steps:
            done.append(step)
            with suppress(QEDError):  # it may be refused, but not harm
                self._do(step)
            self.check(", ".join(done))
        return ", ".join(done)

    def _do(self, step: str) -> None:
        if step in ("leaks", "all"):
            storage = open_storage(str(self.path), True, CacheMode(no_flush=True))
            try:
                Repair(storage).run(everything=step == "all")
            finally:
                storage.close()
            return
        with qedcore.open_image(self.path, cache="unsafe") as image:
            if step == "read":
                for cluster in range(image.size // CS):
                    with suppress(QEDError):
                        image.pread(CS, cluster * CS)
            elif step == "trim":  # what only seems to be its own
                for cluster in self._wrong:
                    with suppress(QEDError):
                        image.trim(cluster * CS, CS)
                image.flush()
                self._write(image, 5)
            elif step == "write":
                self._write(image, 5)
                with suppress(QEDError):
                    tidy(image)
            else:
                compact(image)

    def _write(self, image: qedcore.QEDImage, n: int) -> None:
        """To n clusters that have what they have for themselves."""
        for cluster in self.rng.sample(self.own, n):
            data = stamp(5, cluster * CS, CS)
            with suppress(QEDError):
                image.pwrite(data, cluster * CS)
                self.sure[cluster] = data
