"""The manual pages: well-formed, complete, and their examples are accepted."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from support.tools import REPO, require, run

from qedcore.cli.main import COMMANDS, build_command_parser
from qedcore.server.parameters import Parameters
from qedcore.storage.cache_mode import CACHE_MODES

PAGE = REPO / "plugin" / "nbdkit-qed-plugin.pod"
COMMAND_PAGE = REPO / "plugin" / "qed.pod"
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
        # Filters take their own parameters before the plugin sees them.
        if equals and not name.startswith("-") and name not in ("statsfile", "logfile"):
            parameters.take(name, value)
    parameters.complete()


# -- qed(1) -------------------------------------------------------------------------------------------------------


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))


def command_sections() -> dict[str, str]:
    """Command -> its heading and text.  "": what all or most commands take."""
    page = COMMAND_PAGE.read_text()
    options, commands = (
        page.partition(f"=head1 {name}\n")[2].partition("\n=head1 ")[0] for name in ("OPTIONS", "COMMANDS")
    )
    parts = re.split(r"^=head2 ", commands, flags=re.MULTILINE)[1:]
    return {"": options, **{part.split()[0]: part for part in parts}}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_and_there_is_no_other(command: str) -> None:
    """Short ones with their command; what they mean may be said once for all commands."""
    sections = command_sections()
    own, common = options_in(sections[command]), options_in(sections[""])
    known = set()
    for action in build_command_parser(command)._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        known |= set(action.option_strings)
        for name in action.option_strings:
            alone = all(other.startswith("--") for other in action.option_strings)
            anywhere = name.startswith("--") and (alone or own & set(action.option_strings))
            assert name in own or (anywhere and name in common), f"{command} {name}"
    assert own <= known, f"{command}: {own - known}"


def test_every_command_is_documented_and_there_is_no_other() -> None:
    assert set(command_sections()) == {"", *COMMANDS}
