"""Images in formats that are neither QED nor raw: qemu-img works on them, and reaches the QED side through nbdkit.

nbdkit serves one QED image with our plugin on a private Unix socket while qemu-img runs, and ends with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UnsupportedError
from ..storage.open import is_uri
from .open import POLICY
from .qemu_img import find_qemu_img, run_signed

PLUGIN_VARIABLE = "QED_PLUGIN"  # environment: path of qed.py, instead of the one that came with this program
URI = "\0uri"  # stands for the served image among the arguments of qemu-img


def find_plugin() -> str | None:
    """The path of the nbdkit plugin; None if it cannot be found."""
    candidates = [
        os.environ.get(PLUGIN_VARIABLE, ""),
        str(Path(__file__).resolve().parents[2] / "plugin" / "qed.py"),
        os.path.join(sys.prefix, "share", "nbdkit", "qed.py"),
    ]
    return next((path for path in candidates if os.path.isfile(path)), None)


def serve(image: str, arguments: Sequence[str], what: str, *, writable: bool = False, lock: bool = True) -> int:
    """Serve the QED image at path or URI `image`, run qemu-img with `arguments`, URI among them; its exit code.

    `lock`: refuse an image that is in use.  Raises UnsupportedError, naming `what` was wanted, when a program is
    missing.
    """
    qemu_img, nbdkit, plugin = find_qemu_img(), shutil.which("nbdkit"), find_plugin()
    if qemu_img is None or nbdkit is None or plugin is None:
        missing = [
            name
            for name, found in (("qemu-img", qemu_img), ("nbdkit", nbdkit), ("the nbdkit plugin qed.py", plugin))
            if found is None
        ]
        raise UnsupportedError(f"{what} needs {' and '.join(missing)}, which cannot be found")
    # nbdkit puts the socket's URI into $uri of the command's environment
    words = " ".join('"$uri"' if word == URI else shlex.quote(word) for word in [qemu_img, *arguments])
    command = [nbdkit, "-U", "-", *([] if writable else ["-r"]), "python", plugin]
    command.append(f"file={image if is_uri(image) else os.path.abspath(image)}")
    command += [] if lock else ["lock=off"]
    return run_signed([*command, f"backing={POLICY.follow}", f"backing-format={POLICY.format}", "--run", words])
