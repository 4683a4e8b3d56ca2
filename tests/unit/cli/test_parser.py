"""getopt's rules, and help that fits."""

from __future__ import annotations

import pytest

from qedcore.cli.main import COMMANDS, main, parse


@pytest.mark.parametrize(
    ("line", "files", "found"),
    [
        ("info -- -x", ["-x"], {}),
        ("info a -- -x", ["a", "-x"], {}),
        ("info a -fqed", ["a"], {"format": "qed"}),
        ("info -f -x a", ["a"], {"format": "-x"}),
        ("info --form=-x a", ["a"], {"format": "-x"}),
        ("info --back --out json a", ["a"], {"backing_chain": True, "output": "json"}),
        ("check -qU a", ["a"], {"quiet": True, "force_share": True}),
        ("convert -o -x -o y a b", ["a", "b"], {"options": ["-x", "y"]}),
        ("convert -m 4 a b", ["a", "b"], {"coroutines": 4}),
        ("resize -- -x -1G", ["-x"], {"size": "-1G"}),
        ("--deb -T x info a", ["a"], {"debug": True, "trace": "x"}),
    ],
)
def test_rules(line: str, files: list[str], found: dict[str, object]) -> None:
    args = parse(line.split())
    assert args.files == files
    assert {name: getattr(args, name) for name in found} == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("infp a", "Command not found: infp; did you mean 'info'?"),
        ("frobnicate", "Command not found: frobnicate"),
        ("info --bakcing-chain a", "unrecognized option '--bakcing-chain'; did you mean '--backing-chain'?"),
        ("info -f", "missing argument for option '-f'"),
        ("info --format", "missing argument for option '--format'"),
        ("info --backing-chain=1 a", "option '--backing-chain' takes no argument"),
        ("check --fo a", "option '--fo' is ambiguous"),
        ("convert -m x a b", "Invalid value for option '-m': x"),
    ],
)
def test_errors(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 1
    assert capsys.readouterr().err == f"qed: {said}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns, and not wider on others; `help COMMAND` is `COMMAND --help`."""
    monkeypatch.setenv("COLUMNS", "200")
    texts = []
    for words in (["help", command] if command else ["help"], [command, "--help"] if command else ["-h"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and max(map(len, texts[0].splitlines())) < 80
    assert texts[0].startswith("usage: qed") and ("FILE" in texts[0].splitlines()[0])
