"""The completion of bash: every option, values, lists after -o, and names."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from support.tools import REPO, run_ok

from qedcore.cli.main import COMMANDS, build_command_parser

SCRIPT = REPO / "qedcore" / "cli" / "completion.bash"


def complete(line: str, cwd: Path) -> list[str]:
    """What is offered at the end of the line; the shell cuts words at colons and equals signs."""
    words = re.findall(r"[=:]+|[^\s=:]+", line) + ([""] if line.endswith(" ") else [])
    code = (
        f'. {SCRIPT}; compopt() {{ :; }}; COMP_WORDBREAKS="$3"; COMP_LINE=$1; COMP_POINT=${{#COMP_LINE}}\n'
        'shift 3; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        '_qed qed "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return [
        word.strip()
        for word in run_ok(["bash", "-c", code, "bash", line, "", " =:", *words], cwd=cwd).split("\n")
        if word
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option(command: str, tmp_path: Path) -> None:
    names = {
        name
        for action in build_command_parser(command)._actions
        for name in action.option_strings
        if action.help != argparse.SUPPRESS and name not in ("-h",)
    }
    offered = {word.rstrip("=") for word in complete(f"qed {command} -", tmp_path)}
    assert names <= offered, names - offered


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qed in", ["info"]),
        ("qed -T all comp", ["compact", "compare"]),
        ("qed help comp", ["compact", "compare"]),
        ("qed info --output ", ["human", "json"]),
        ("qed info --output=j", ["json"]),
        ("qed check -r ", ["leaks", "all"]),
        ("qed create -o table", ["table_size="]),
        ("qed create -o cluster_size=4k,table", ["4k,table_size="]),
        ("qed convert -O qed -o back", ["backing_file=", "backing_fmt="]),
        ("qed convert -O qcow2 -o lazy", ["lazy_refcounts="]),
        ("qed convert -O raw -o table", []),
        ("qed info di", ["disk.qed"]),
        ("qed info a:", ["b.qed"]),
        ("qed info a:b.q", ["b.qed"]),
        ("qed dd i", ["if="]),
        ("qed dd if=di", ["disk.qed"]),
    ],
)
def test_offers(line: str, offered: list[str], tmp_path: Path) -> None:
    for name in ("disk.qed", "a:b.qed"):
        (tmp_path / name).touch()
    assert complete(line, tmp_path) == offered
