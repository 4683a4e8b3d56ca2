"""QED (QEMU Enhanced Disk) images: a thread-safe engine in pure Python."""

from .chain import open_image
from .create import create
from .image import QEDImage

__version__ = "0.1.0"

__all__ = ["QEDImage", "create", "open_image"]
