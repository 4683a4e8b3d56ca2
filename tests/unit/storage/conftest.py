"""Files through the page cache and past it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tools import unavailable

from qedcore.storage.cache_mode import CacheMode
from unit.storage.files import Open, has_direct, opener


@pytest.fixture(scope="session")
def direct_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose file system has O_DIRECT."""
    for candidate in (str(tmp_path_factory.getbasetemp()), "/var/tmp", os.getcwd(), "/dev/shm"):
        if os.path.isdir(candidate) and os.access(candidate, os.W_OK) and has_direct(candidate):
            with tempfile.TemporaryDirectory(dir=candidate) as name:
                yield Path(name)
            return
    unavailable("no file system with O_DIRECT")


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Open]:
    yield from opener(tmp_path / "file", CacheMode())


@pytest.fixture
def open_direct(direct_dir: Path) -> Iterator[Open]:
    with tempfile.TemporaryDirectory(dir=direct_dir) as name:
        yield from opener(Path(name) / "file", CacheMode(direct=True))


@pytest.fixture(params=["buffered", "direct"])
def open_any(request: pytest.FixtureRequest) -> Open:
    result: Open = request.getfixturevalue("open_file" if request.param == "buffered" else "open_direct")
    return result
