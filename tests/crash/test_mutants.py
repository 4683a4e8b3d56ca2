"""Faults that the simulator did not see once are put back, one by one: each must be caught by a known history."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash.commands import Case
from crash.damage import Damaged
from crash.engine import SHAPES, Setup, check, record
from crash.exports import record_export
from crash.sessions import play
from support.crashes import Medium

from qedcore.check.cluster_use import DATA, ClusterUse
from qedcore.engine import image, need_check
from qedcore.engine.allocator import Allocator
from qedcore.engine.census import Census
from qedcore.engine.free_map import FreeMap
from qedcore.engine.image import QEDImage
from qedcore.engine.reclaim import Reclaimer
from qedcore.errors import QEDError, UnreachableError
from qedcore.format.geometry import UNALLOCATED
from qedcore.format.header import read_header
from qedcore.maintenance.header_fit import fit
from qedcore.maintenance.move import Mover
from qedcore.maintenance.repair import Repair, correct_header
from qedcore.storage.replay_log import ReplayLog

History = Callable[[Path, random.Random], object]

# -- the histories -----------------------------------------------------------------------------------------------


def lives(*names: str, **start: Any) -> History:
    return lambda directory, rng: play(directory, rng, names, **start)


def command(name: str) -> History:
    return lambda directory, rng: Case(directory, rng, name).run()


def damage(directory: Path, rng: random.Random) -> None:
    Damaged(directory, rng).run()


def power_loss(directory: Path, rng: random.Random) -> None:
    setup = Setup(directory, SHAPES["4K/1"], rng.random() < 0.5)
    check(setup, record(setup, rng, requests=6), rng, subsets=1, limit=60)


def lives_of_a_large_image(directory: Path, rng: random.Random) -> None:
    """One with more clusters than a map can have: its leaks are not found, but all else holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "MAP_LIMIT", 4)
        patch.setattr(Setup, "counts", False)
        OLD_STYLE(directory, rng)


def export(*events: str) -> History:
    def run(directory: Path, rng: random.Random) -> None:
        setup = Setup(directory, SHAPES["4K/1"], rng.random() < 0.5, medium=Medium(fixed=True))
        check(setup, record_export(setup, directory, rng, events=events), rng, subsets=1, part=0.3, limit=200)

    return run


# -- the faults --------------------------------------------------------------------------------------------------


def dangling_entries_come_true(patch: pytest.MonkeyPatch) -> None:
    """What points past the end of the file is left as it is, and valid in the next opening."""
    patch.setattr(Census, "_is_dangling", lambda census, entry, end: False)


def dangling_entries_of_large_images_come_true(patch: pytest.MonkeyPatch) -> None:
    """Of those that have more clusters than the map."""
    screen = Census.screen
    patch.setattr(Census, "screen", lambda census, again=False: census._countable and screen(census, again))


def marks_are_written_to_what_is_no_table(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Census, "_refuse_unproven", lambda census: None)


def leaks_are_not_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FreeMap, "add_unused", lambda free, use: None)


def leaks_are_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QEDImage, "holes", lambda image, search=True: 0)


def shared_clusters_are_reused(patch: pytest.MonkeyPatch) -> None:
    """A cluster with two users counts as one of which either may dispose."""

    def count(census: Census) -> ClusterUse | None:
        found = counted(census)
        return census._use if found is None else found

    counted = Census.count
    patch.setattr(Census, "count", count)


def leaks_disprove_the_header(patch: pytest.MonkeyPatch) -> None:
    """Tables of twice the size leave less unused: the header is "corrected"."""

    def doubt(repair: Repair, scan: Any, everything: bool) -> bool:
        before = repair._header.header
        found = fit(repair._storage, before._replace(table_size=2 * before.table_size))
        if not everything or not scan.result.leaks or found is None or found.found.corruptions:
            return False
        correct_header(repair._storage, before, found, repair._say)
        repair._open(*read_header(repair._storage))
        return True

    patch.setattr(Repair, "_doubt_header", doubt)


def marks_are_taken_for_damaged_offsets(patch: pytest.MonkeyPatch) -> None:
    """The repair links what the entry would lead to without its low bits, if nothing else does."""

    def instead_of(repair: Repair, damage: Any, use: ClusterUse, *_: object) -> tuple[int, str]:
        rounded = repair._geometry.start_of_cluster(damage.value)
        cluster = rounded >> repair._geometry.l2_shift
        if repair._bounds.valid_cluster(rounded) and use.claim_free(cluster, DATA):
            return rounded, "corrected"
        return UNALLOCATED, "cleared"

    patch.setattr(Repair, "_instead_of", instead_of)


def moves_fill_holes(patch: pytest.MonkeyPatch) -> None:
    """Zeros are copied as if they were data."""
    patch.setattr(Mover, "punch", lambda mover, slot, n: False)


def superseded_writes_are_sent_again(patch: pytest.MonkeyPatch) -> None:
    class Log(ReplayLog):
        def __init__(self) -> None:
            super().__init__()
            self._all: list[Any] = []

        def __iter__(self) -> Any:
            return iter(self._all)

        def add(self, offset: int, length: int, data: bytes | None) -> None:
            super().add(offset, length, data)
            self._all.append(self._pieces[offset]._replace(length=length, data=data))

        def flushed(self, epoch: int) -> None:
            self._all = [piece for piece in self._all if piece.epoch >= epoch]

    patch.setattr("qedcore.storage.nbd.ReplayLog", Log)


def what_is_in_doubt_is_used_again(patch: pytest.MonkeyPatch) -> None:
    def give_back(reclaimer: Reclaimer, cluster: int, n: int, state: int) -> None:
        reclaimer._free.add(cluster, n, state)

    patch.setattr(Reclaimer, "_give_back", give_back)


def files_grow_into_what_is_in_doubt(patch: pytest.MonkeyPatch) -> None:
    def append(allocator: Allocator, n: int) -> int:
        offset = allocator._bounds.end
        end = offset + n * allocator._geometry.cluster_size
        if end > allocator._grown:
            allocator._grow(offset, end)
        allocator._bounds.end = end
        return offset

    patch.setattr(Allocator, "_append_locked", append)


def an_outage_keeps_need_check(patch: pytest.MonkeyPatch) -> None:
    """A flush that met no server counts as one that has failed for good."""

    class Other(UnreachableError):
        pass

    patch.setattr(need_check, "_NOTHING_LOST", (Other,))


class Caught(NamedTuple):
    """By `history`, with the seed `first` or one of the next."""

    history: History
    first: int = 0


OLD_STYLE = lives("qemu", "guests", "guests", backing=False, shape="4K/1")
MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], Caught] = {
    dangling_entries_come_true: Caught(OLD_STYLE),
    dangling_entries_of_large_images_come_true: Caught(lives_of_a_large_image),
    marks_are_written_to_what_is_no_table: Caught(damage),
    leaks_are_not_found: Caught(power_loss),
    leaks_are_not_given_back: Caught(power_loss),
    shared_clusters_are_reused: Caught(damage),
    leaks_disprove_the_header: Caught(command("check -r all"), 50),
    marks_are_taken_for_damaged_offsets: Caught(
        lives("qemu", "trims", "check -r all", backing=False, shape="4K/1", medium=Medium(holes=False)),
        24,
    ),
    moves_fill_holes: Caught(command("compact"), 5),
    superseded_writes_are_sent_again: Caught(export("cut"), 5),
    what_is_in_doubt_is_used_again: Caught(export("late")),
    files_grow_into_what_is_in_doubt: Caught(export("late"), 8),
    an_outage_keeps_need_check: Caught(export("away at flush"), 20),
}
TRIES = 150  # seeds


def catch(directory: Path, history: History, seeds: Iterable[int]) -> tuple[int, str]:
    """The first seed with which a history fails, and how; (-1, "") if none does."""
    for seed in seeds:
        where = directory / str(seed)
        where.mkdir()
        try:
            history(where, random.Random(seed))
        except (AssertionError, QEDError) as error:
            return seed, str(error) or repr(error)
    return -1, ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_simulator_catches(mutant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path) -> None:
    caught = MUTANTS[mutant]
    # Without the fault this history is one like others.
    assert catch(tmp_path, caught.history, [caught.first]) == (-1, "")
    (tmp_path / str(caught.first)).rename(tmp_path / "sound")
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        # Others for when a change of the engine has changed the order of things.
        seed, how = catch(tmp_path, caught.history, range(caught.first, caught.first + TRIES))
    assert seed >= 0, "not caught"
    assert how
