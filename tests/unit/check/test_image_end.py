"""Where an image ends."""

from __future__ import annotations

import pytest

from qedcore.check.image_end import end_of_image
from unit.storage.disk import Image, make


@pytest.mark.parametrize("layout", ["-", "D", "D-Z-D", "ZZZ"])
def test_end_of_image(image: Image, layout: str) -> None:
    disk, built = make(image, layout=layout)
    assert end_of_image(disk) == built.end
    with disk.open() as img:
        assert img.storage.size() == built.end
