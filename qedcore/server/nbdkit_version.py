"""Refuse an nbdkit that is too old, in a line, instead of failing later in ways that nobody understands."""

from __future__ import annotations

import os
import re

from ..errors import UnsupportedError

OLDEST = (1, 30)  # has block sizes and takes lengths past 2 GiB from Python


def require_nbdkit(module: object) -> None:
    """Raise UnsupportedError if the nbdkit that runs this process, and whose Python module this is, is too old.

    From 1.32 on the module has parse_size(); only without it the program is asked, which takes milliseconds.
    """
    if hasattr(module, "parse_size"):
        return
    import subprocess  # the server starts faster without

    try:
        command = [os.readlink("/proc/self/exe"), "--version"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return
    found = re.match(r"nbdkit (\d+)\.(\d+)", said)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise UnsupportedError(f"nbdkit {found[1]}.{found[2]} is too old: 1.30 or later is needed")
