"""What a program that imports qedcore calls, over the packages."""

from __future__ import annotations

import os
from typing import Any

from .engine import chain
from .engine.image import QEDImage


def open_image(path: str | os.PathLike[str], writable: bool = True, **options: Any) -> QEDImage:
    """Open the image at `path` and its backing chain, with the options of engine.chain.open_image.

    Closing a writable one gives back what is free inside the file, if that is little work.
    """
    return chain.open_image(path, writable, tidy=_tidy, **options)


def _tidy(image: QEDImage) -> None:
    from .maintenance.tidy import tidy  # here, because most programs only read

    tidy(image)
