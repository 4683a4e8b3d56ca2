"""Which nbdkit is refused."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from qedcore.errors import UnsupportedError
from qedcore.server.nbdkit_version import require_nbdkit


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("nbdkit 1.28.3", True),
        ("nbdkit 1.29.12 (nbdkit-1.29.12-1.el9)", True),
        ("nbdkit 1.30.0", False),
        ("nbdkit 1.30.8 (nbdkit-1.30.8-1.el9)", False),
        ("nbdkit 2.0.1", False),
        ("", False),  # another program embeds Python
    ],
)
def test_an_old_nbdkit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, said: str, refused: bool) -> None:
    def answer(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[1:] == ["--version"]
        return SimpleNamespace(stdout=said)

    monkeypatch.setattr(subprocess, "run", answer)
    if refused:
        with pytest.raises(UnsupportedError, match=r"^nbdkit 1\.2[89] is too old: 1\.30 or later is needed$"):
            require_nbdkit(SimpleNamespace())
    else:
        require_nbdkit(SimpleNamespace())


def test_a_new_one_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    require_nbdkit(SimpleNamespace(parse_size=int))
