"""The manual pages: well-formed, complete, and their examples are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.tools import REPO, require, run

from qedcore.parameters import Parameters
from qedcore.storage.file import CACHE_MODES

PAGE = REPO / "plugin" / "nbdkit-qed-plugin.pod"
README = REPO / "README.md"


@pytest.mark.parametrize("page", sorted(REPO.glob("plugin/*.pod")), ids=lambda page: page.name)
def test_pages_are_well_formed(page: Path) -> None:
    require("podchecker")
    result = run(["podchecker", "-warnings", "-warnings", page])
    assert result.rc == 0 and "WARNING" not in result.text, result.text


def sections() -> dict[str, str]:
    """Heading of first level -> its text."""
    parts = re.split(r"^=head1 (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def documented() -> dict[str, str]:
    """Parameter -> the text of its items, those that share one text included."""
    found: dict[str, str] = {}
    items = re.split(r"^=item ", sections()["PARAMETERS"], flags=re.MULTILINE)[1:]
    for item in reversed(items):
        match = re.match(r"B<([\w-]+)=([^>]*)>", item)
        assert match, item
        found[match[1]] = item + found.get(match[1], "")
    return found


def test_every_parameter_is_documented_and_there_is_no_other() -> None:
    assert set(documented()) == set(Parameters.NAMES)


def test_every_parameter_has_an_example() -> None:
    for name, text in documented().items():
        assert re.search(rf"^ nbdkit .*\b{name}=\S", text, re.MULTILINE) or name == "cache", name


def test_all_cache_modes_are_documented() -> None:
    assert set(re.findall(r"B<cache=(\w+)>", PAGE.read_text())) == set(CACHE_MODES)


def test_readme_has_every_parameter() -> None:
    table = README.read_text().partition("## Parameters")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == set(Parameters.NAMES)


def examples() -> list[str]:
    text = "".join(text for heading, text in sections().items() if heading != "SYNOPSIS")
    return [line.strip() for line in text.splitlines() if re.match(r" +\S*nbdkit\S* .*\b(file|dir)=", line)]


@pytest.mark.parametrize("command", examples())
def test_examples_are_accepted(command: str) -> None:
    parameters = Parameters(print, print)
    for word in shlex.split(command.partition(" --run ")[0]):
        name, equals, value = word.partition("=")
        if equals and not name.startswith("-"):
            parameters.take(name, value)
    parameters.complete()
