"""What the sub-commands share: names of images, sizes, progress, and targets that appear complete or not at all."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qedcore.cli import COMMANDS, build_command_parser, common, main, parse
from qedcore.cli.common import Location, Progress, locate, sized
from qedcore.errors import RequestError, StorageError, UnsupportedError
from qedcore.format.create import replacing
from qedcore.units import parse_qemu_size

ROOT = Path(__file__).resolve().parents[3]

LOCATED = {
    ("a.qed", None, False): ("a.qed", None),
    ("a.qed", "qed", False): ("a.qed", "qed"),
    ("dir/a:b", None, False): ("dir/a:b", None),
    ("file:a.qed", "raw", False): ("a.qed", "raw"),
    ("driver=qed,file.filename=a.qed", None, True): ("a.qed", "qed"),
    ("driver=qed,file.filename=a,,b.qed", None, True): ("a,b.qed", "qed"),
    ("file.filename=a.qed", None, True): ("a.qed", None),
    ("driver=file,filename=a", None, True): ("a", "raw"),
    ('json:{"driver":"qed","file":{"filename":"a.qed"}}', None, False): ("a.qed", "qed"),
    ("json:{'driver':'qed','file':{'filename':'it\\'s \"a\".qed'}}", None, False): ('it\'s "a".qed', "qed"),
    ('json:{"driver":"null-co","size":5}', None, False): (None, "null-co"),
}


@pytest.mark.parametrize("given", LOCATED)
def test_locate(given: tuple[str, str | None, bool]) -> None:
    path, format = LOCATED[given]
    assert locate(*given) == Location(given[0], path, format)


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        (("nbd://host/name", None, False), "nbd://host/name"),
        (("nbd+unix:///?socket=s", "qed", False), "nbd+unix:///?socket=s"),
        (("nbd:host:7:exportname=a b", None, False), "nbd://host:7/a%20b"),
        (("nbd:unix:s", None, False), "nbd+unix:///?socket=s"),
        (("driver=qed,file.driver=nbd,file.host=h", None, True), "nbd://h:10809/"),
        (("json:{'driver':'qed','file':{'driver':'nbd','server':{'type':'unix','path':'s'}}}", None, False),
         "nbd+unix:///?socket=s"),
        (("driver=qcow2,file.driver=nbd,file.host=h", None, True), None),
        (("driver=qed,file.driver=nbd,file.host=h,file.tls-creds=t", None, True), None),
    ],
)  # fmt: skip
def test_locate_on_a_server(given: tuple[str, str | None, bool], uri: str | None) -> None:
    found = locate(*given)
    assert (found.path, found.uri, found.place) == (None, uri, uri)
    assert locate("a.qed").place == "a.qed"


@pytest.mark.parametrize(
    ("name", "format", "image_opts", "error", "message"),
    [
        ("a.qed", "qed", True, RequestError, "mutually exclusive"),
        ("json:{", None, False, RequestError, "JSON"),
        ("driver=qed,file.filename=a,foo=1", None, True, UnsupportedError, "does not support the option 'foo'"),
    ],
)
def test_locate_refuses(
    name: str, format: str | None, image_opts: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        locate(name, format, image_opts)


@pytest.mark.parametrize(("text", "size"), [("0x200", 512), ("10b", 10), ("1.5k", 1536), ("7", 7), ("1E", 1 << 60)])
def test_qemu_sizes(text: str, size: int) -> None:
    assert parse_qemu_size(text) == sized(text, "x") == size


@pytest.mark.parametrize("text", ["1.5", "1.5b", "0x", "0xg", "", "-1", "16E", "0x10000000000000000", "1e3"])
def test_no_qemu_sizes(text: str) -> None:
    with pytest.raises(RequestError):
        parse_qemu_size(text)
    with pytest.raises(RequestError, match="Invalid rate specified"):
        sized(text, "rate")


# -- progress -------------------------------------------------------------------------------------------


def arguments(progress: bool = False, quiet: bool = False) -> argparse.Namespace:
    return argparse.Namespace(progress=progress, quiet=quiet)


def test_progress_prints_whole_percents(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(arguments(progress=True), 1000) as progress:
        for done in (1, 9, 10, 11, 500, 1000):
            progress.update(done)
    printed = capsys.readouterr().out
    assert printed == "".join(f"    ({n}/100%)\r" for n in ("0.00", "1.00", "50.00", "100.00")) + "\n"


@pytest.mark.parametrize("total", [0, 10])
def test_progress_ends_at_100(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(arguments(progress=True), total):
        pass
    assert capsys.readouterr().out == "    (0.00/100%)\r    (100.00/100%)\r\n"


def test_progress_that_stops_or_fails_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(arguments(progress=True), 10) as progress:
        progress.stop()
    with pytest.raises(ValueError), Progress(arguments(progress=True), 10):
        raise ValueError
    assert "100.00" not in capsys.readouterr().out


@pytest.mark.parametrize("args", [arguments(), arguments(quiet=True), arguments(progress=True, quiet=True)])
def test_progress_is_silent_in_pipes(args: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(args, 10) as progress:
        progress.update(5)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Bar:
    """Stands in for tqdm."""

    def __init__(self, **options: object) -> None:
        self.n = 0
        self.closed = False
        bars.append(self)

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.closed = True


bars: list[Bar] = []


def test_progress_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    bars.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))  # type: ignore[arg-type]
    with Progress(arguments(), 10) as progress:
        progress.update(4)
        assert bars[0].n == 4
    assert bars[0].n == 10 and bars[0].closed
    with Progress(arguments(quiet=True), 10), Progress(arguments(progress=True), 10):
        assert len(bars) == 1


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # type: ignore[arg-type]
    with Progress(arguments(), 10) as progress:
        progress.update(5)
    assert terminal.getvalue() == ""


# -- targets --------------------------------------------------------------------------------------------


def test_replacing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o604)
    link = tmp_path / "link"
    link.symlink_to(target)
    with replacing(link) as temporary:
        Path(temporary).write_bytes(b"new")
        assert target.read_bytes() == b"old" and os.path.dirname(temporary) == str(tmp_path)
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o604
    assert link.is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "target"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_replacing_nothing_when_it_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(error), replacing(target) as temporary:
        Path(temporary).write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["target"]


def test_replacing_only_files(tmp_path: Path) -> None:
    for wrong in (tmp_path, "/dev/null", tmp_path / "missing" / "target"):
        with pytest.raises(StorageError, match="cannot create"), replacing(wrong):
            raise AssertionError


# -- the command as a whole -----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Nothing is left, and the old target is untouched."""
    with open(tmp_path / "source.raw", "wb") as file:
        file.write(b"x" * (4 << 20))
    (tmp_path / "target").write_bytes(b"old")
    # One byte per second; the progress says that the copy has begun
    argv = ["convert", "-p", "-r", "1", "-O", "qed", "source.raw", "target"]
    child = subprocess.Popen(
        [sys.executable, "-m", "qedcore", *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None and child.stdout.read(15) == b"    (0.00/100%)"
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err == (b"qed: interrupted\n" if number == signal.SIGINT else b"")
    assert (tmp_path / "target").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["source.raw", "target"]


def test_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps as long as the average needs; time that the copy itself took counts."""
    now = 100.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(common.time, "monotonic", lambda: now)
    monkeypatch.setattr(common.time, "sleep", sleep)
    limit = common.RateLimit(1000)
    limit.wait(500)
    now += 0.25  # the next copy
    limit.wait(500)
    now += 10  # a slow one
    limit.wait(500)
    assert slept == [0.5, 0.25, 0.0]
    common.RateLimit(0).wait(1 << 40)
    assert len(slept) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: qed {command} ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(re.search(rf"^  {command} ", text, re.MULTILINE) for command in COMMANDS)


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


def test_options_and_names_in_any_order() -> None:
    args = parse(["convert", "a", "-O", "qed", "b", "-p", "c"])
    assert (args.files, args.target_format, args.progress) == (["a", "b", "c"], "qed", True)
    assert parse(["--debug", "info", "a"]).debug and parse(["info", "a", "--debug"]).debug
    assert not parse(["info", "a"]).debug


def test_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_tracing", {})
    path = str(tmp_path / "x.qed")
    assert main(["create", "-q", path, "1M"]) == 0
    (tmp_path / "data").write_bytes(b"x" * 65536)
    assert main(["convert", "-O", "qed", str(tmp_path / "data"), path]) == 0
    assert main(["-T", "qed_read_table", "map", path]) == 0
    assert "qed_read_table s" in capsys.readouterr().err
    assert main(["-T", "nonsense", "map", path]) == 1


def test_never_delegates_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed under the name qemu-img, first in PATH."""
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.find_qemu_img() == str(program)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert common.find_qemu_img() is None
