"""Sizes on the command line; every option is documented."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from qedcore.cli.main import COMMANDS, build_command_parser
from qedcore.cli.options import sized
from qedcore.errors import RequestError
from qedcore.units import parse_qemu_size

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("text", "size"), [("0x200", 512), ("10b", 10), ("1.5k", 1536), ("7", 7), ("1E", 1 << 60)])
def test_qemu_sizes(text: str, size: int) -> None:
    assert parse_qemu_size(text) == sized(text, "x") == size


@pytest.mark.parametrize("text", ["1.5", "1.5b", "0x", "0xg", "", "-1", "16E", "0x10000000000000000", "1e3"])
def test_no_qemu_sizes(text: str) -> None:
    with pytest.raises(RequestError):
        parse_qemu_size(text)
    with pytest.raises(RequestError, match="Invalid rate specified"):
        sized(text, "rate")


def test_manual_and_completion_know_every_option() -> None:
    manual = (ROOT / "plugin" / "qed.pod").read_text()
    completion = (ROOT / "qedcore" / "cli" / "completion.bash").read_text()
    for command in COMMANDS:
        assert command in completion
        assert re.search(rf"^=head2 .*\b{command}\b", manual, re.MULTILINE)
        for action in build_command_parser(command)._actions:
            if action.help == argparse.SUPPRESS or not action.option_strings or command in ("amend", "bitmap"):
                continue
            assert any(re.search(rf"(?<![\w-]){name}(?![\w-])", manual) for name in action.option_strings), (
                f"{command} {action.option_strings}"
            )
