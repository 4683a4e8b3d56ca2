"""A server whose images are fakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.qed_image import ImageSpec, build

from qedcore.server.exports import ImageDirectory
from unit.server.world import World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def directory(world: World, tmp_path: Path) -> ImageDirectory:
    for name in "abc":
        build(tmp_path / name, ImageSpec())
    return ImageDirectory(world, str(tmp_path))
