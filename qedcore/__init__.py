"""QED (QEMU Enhanced Disk) images: a thread-safe engine in pure Python."""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which would have to be loaded for it
if TYPE_CHECKING:
    from .engine.image import QEDImage
    from .format.create import create
    from .library import open_image

__version__ = "0.1.0"

__all__ = ["QEDImage", "create", "open_image"]

_HOMES = {"QEDImage": ".engine.image", "create": ".format.create", "open_image": ".library"}


def __getattr__(name: str) -> object:
    """Load what is asked for: a command needs little of it, and its user waits."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
