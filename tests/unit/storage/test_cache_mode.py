"""Cache modes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedcore.errors import RequestError
from qedcore.storage.cache_mode import CACHE_MODES, cache_mode
from qedcore.storage.direct import DirectStorage
from qedcore.storage.open import open_storage


def test_cache_modes_choose_the_storage(direct_dir: Path) -> None:
    path = direct_dir / "modes"
    path.write_bytes(bytes(4096))
    for name, mode in CACHE_MODES.items():
        assert cache_mode(name) is mode
        storage = open_storage(path, True, mode)
        assert isinstance(storage, DirectStorage) is (name in ("none", "directsync"))
        storage.close()
    assert {name for name, mode in CACHE_MODES.items() if mode.writethrough} == {"writethrough", "directsync"}
    with pytest.raises(RequestError, match="cache=fast is not one of writeback, .*unsafe"):
        cache_mode("fast")
