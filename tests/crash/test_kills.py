"""Power loss after a program was killed: what it wrote is there to be read, but not durable.

Nothing may be done for good that relies on it before it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.crashes import RecordedFile, World, guest
from support.patterns import stamp
from support.qed_image import Built, QedFile

import qedcore
from qedcore.engine.chain import close_source
from qedcore.errors import CorruptImageError, StorageError
from qedcore.maintenance.rebase import change_name, open_base, rebase
from qedcore.maintenance.repair import Repair
from qedcore.storage.cache_mode import CacheMode

CS = 4096  # bytes of a cluster
Image = Callable[..., Built]


class Killed(BaseException):
    """The program is gone."""


@pytest.mark.parametrize("step", range(5))
def test_name_of_the_backing_file(image: Image, rng: random.Random, step: int) -> None:
    """The second change of a long name does not overwrite the one that a crash may bring back."""
    names = ["a" * 600, "b" * 600, "c" * 540]
    built = image(size=1 << 20, cluster_size=CS, table_size=1, layout="D", backing=names[0], no_probe=True)
    world = World(built.path)
    world.stop_at(step, Killed(), dead=True)
    try:
        change_name(str(built.path), names[1], True, opener=world.open)
    except Killed:
        pass
    world.before = lambda number: None
    change_name(str(built.path), names[2], True, opener=world.open)
    for state in world.crash_states(rng, 4):
        built.path.write_bytes(state.files[str(built.path)])
        with QedFile(built.path) as file:
            assert file.backing_name in names, state.name


def test_rebase_to_a_new_copy(image: Image, tmp_path: Path, rng: random.Random) -> None:
    """What is the same in both bases is not copied: the new one must be durable, too."""
    base, new = tmp_path / "base", tmp_path / "new"
    base.write_bytes(stamp(9, 0, 16 * CS))
    new.write_bytes(b"")
    built = image(size=16 * CS, cluster_size=CS, table_size=1, layout="D", backing="base", no_probe=True)
    with qedcore.open_image(built.path, writable=False) as img:
        before = img.pread(16 * CS, 0)
    world = World(built.path, base, new)
    world.open(str(new), True, CacheMode()).pwrite(base.read_bytes(), 0)  # cp base new
    with qedcore.open_image(built.path, opener=world.open) as img:
        source = open_base(img, str(new), "raw", "new", opener=world.open)
        rebase(img, "new", source, True)
        assert source is not None
        close_source(source)
    for state in world.crash_states(rng, 2):
        for path, content in state.files.items():
            Path(path).write_bytes(content)
        with qedcore.open_image(built.path, cache="unsafe") as img:
            assert img.pread(16 * CS, 0) == before, state.name


def test_repair_all(image: Image, rng: random.Random) -> None:
    """An entry is corrected to lead to a cluster that nothing else leads to: that must be so for good."""
    size = 128 * CS
    spec = {"size": size, "cluster_size": CS, "table_size": 1, "layout": "D", "entries": {5: lambda built: built.end}}
    built = image(**spec)
    world = World(built.path)
    img = qedcore.open_image(built.path, opener=world.open)
    img.pwrite(b"Y" * CS, 100 * CS)  # in the place that entry 5 led to, which was past the end
    img.flush()
    img.trim(100 * CS, CS)
    Repair(world.open(str(built.path), True, CacheMode()), say=lambda line: None).run(everything=True)
    for state in world.crash_states(rng, 3):
        built.path.write_bytes(state.files[str(built.path)])
        with qedcore.open_image(built.path, cache="unsafe") as img:
            before = img.pread(CS, 100 * CS)
            with suppress(CorruptImageError):  # it was not repaired yet
                img.pwrite(b"X" * CS, 5 * CS)
            assert img.pread(CS, 100 * CS) == before, state.name


@pytest.mark.parametrize("believed", [False, True], ids=["", "believed"])
def test_what_the_system_has_given_up(
    image: Image, rng: random.Random, monkeypatch: pytest.MonkeyPatch, believed: bool
) -> None:
    """After a failed flush the cache shows an entry as gone that is still on disk: its cluster is not free."""
    built = image(size=64 * CS, cluster_size=CS, table_size=1, layout="D")
    world = World(built.path)
    img = qedcore.open_image(built.path, opener=world.open)
    img.pwrite(b"a" * CS, CS)
    img.flush()
    img.trim(CS, CS)
    world.flush_failed = world.give_up
    world.stop_at(len(world.log), StorageError("injected"), dead=True)
    with pytest.raises(StorageError):
        img.flush()
    world.before = lambda number: None
    if believed:
        monkeypatch.setattr(RecordedFile, "drop_cache", lambda file: None)
    img = qedcore.open_image(built.path, opener=world.open)  # the other is gone
    img.pwrite(b"b" * CS, 9 * CS)
    img.flush()
    wrong = 0
    for state in world.crash_states(rng, 4):
        built.path.write_bytes(state.files[str(built.path)])
        with qedcore.open_image(built.path, cache="unsafe") as img:
            try:
                wrong += not set(img.pread(CS, CS)) <= set(b"a\0")
            except CorruptImageError:
                wrong += 1
    assert (wrong > 0) == believed


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("fua", [False, True], ids=["flush", "FUA"])
@pytest.mark.parametrize("believed", [False, True], ids=["", "believed"])
def test_what_could_not_be_written_is_not_shown_to_the_next(
    image: Image, monkeypatch: pytest.MonkeyPatch, believed: bool, fua: bool, killed: bool
) -> None:
    """Also when only data were overwritten: a failed flush says that the cache must not be believed."""
    built = image(size=64 * CS, cluster_size=CS, table_size=1, layout="D")
    world = World(built.path)
    old = guest(built.path)
    img = qedcore.open_image(built.path, opener=world.open)
    img.pwrite(b"a" * CS, 0)
    failures = []

    def flush(file: RecordedFile) -> None:  # as GroupCommit: once it has failed it always does
        if not failures:
            world.give_up(file.name)
        failures.append(file)
        raise StorageError("injected")

    if believed:
        monkeypatch.setattr(RecordedFile, "drop_cache", lambda file: None)
    with monkeypatch.context() as patch:
        patch.setattr(RecordedFile, "flush", flush)
        with pytest.raises(StorageError):
            img.pwrite(b"a" * CS, 0, fua=True) if fua else img.flush()
        if not killed:
            with pytest.raises(StorageError):
                img.close()
    with qedcore.open_image(built.path, opener=world.open) as img:
        shown = img.pread(img.size, 0)
        img.flush()
    power_lost = list(world.crash_states())[-1]
    built.path.write_bytes(power_lost.files[str(built.path)])
    assert guest(built.path) == old
    assert (shown != old) == believed
