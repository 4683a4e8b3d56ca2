"""Images in formats that are neither QED nor raw: qemu-img works on them, and reaches the QED side through nbdkit.

nbdkit serves one QED image with our plugin on a private Unix socket while qemu-img runs, and ends with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..backing.names import json_name
from ..errors import UnsupportedError
from ..storage.open import is_uri
from .open import POLICY
from .qemu_img import find_qemu_img, objects, run_signed, sign

PLUGIN_VARIABLE = "QED_PLUGIN"  # environment: path of qed.py, instead of the one that came with this program
# nbdkit puts the socket's URI into $uri.  It serves until its input ends, when this command has ended, too.
_HOLD = 'printf "%s\\n" "$uri"; exec cat'
URI = "\0uri"  # stands for the served image among the arguments of qemu-img


def find_plugin() -> str | None:
    """The path of the nbdkit plugin; None if it cannot be found."""
    candidates = [
        os.environ.get(PLUGIN_VARIABLE, ""),
        str(Path(__file__).resolve().parents[2] / "plugin" / "qed.py"),
        os.path.join(sys.prefix, "share", "nbdkit", "qed.py"),
    ]
    return next((path for path in candidates if os.path.isfile(path)), None)


def serve(
    image: str,
    arguments: Sequence[str],
    what: str,
    args: argparse.Namespace | None = None,
    *,
    writable: bool = False,
    lock: bool = True,
) -> int:
    """Serve the QED image at path or URI `image`, run qemu-img with `arguments`, URI among them; its exit code.

    With the command's `args`, qemu-img tells its progress.  `lock`: refuse an image that is in use.  Raises
    UnsupportedError, naming `what` was wanted, when a program is missing.
    """
    from .child import PIPE, child, exit_code  # here, because most commands need no other program

    qemu_img, nbdkit, plugin = find_qemu_img(), shutil.which("nbdkit"), find_plugin()
    if qemu_img is None or nbdkit is None or plugin is None:
        missing = [
            name
            for name, found in (("qemu-img", qemu_img), ("nbdkit", nbdkit), ("the nbdkit plugin qed.py", plugin))
            if found is None
        ]
        raise UnsupportedError(f"{what} needs {' and '.join(missing)}, which cannot be found")
    command = [nbdkit, "-U", "-", *([] if writable else ["-r"]), "python", plugin]
    command.append(f"file={image if is_uri(image) else _as_text(os.path.abspath(image))}")
    command += [] if lock else ["lock=off"]
    command += [f"backing={POLICY.follow}", f"backing-format={POLICY.format}", "--run", _HOLD]
    # A session of its own: Ctrl-C is for qemu-img, whose last requests may need the server.
    with child(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True) as server:
        assert server.stdin is not None and server.stdout is not None
        teller = sign(server)
        uri = server.stdout.readline().decode().strip()
        code = 0
        if uri:
            name, *rest = [uri if word == URI else word for word in arguments]
            code = run_signed([qemu_img, name, *objects, *rest], args)
        server.stdin.close()
        teller.join()  # until it has closed the image
    return code or exit_code(server)


def _as_text(path: str) -> str:
    """nbdkit's plugins in Python get nothing that is not UTF-8."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return json_name(path)
