"""Finding qemu-img."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qedcore.cli.qemu_img import find_qemu_img


def test_never_delegates_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed under the name qemu-img, first in PATH."""
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_qemu_img() == str(program)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert find_qemu_img() is None
