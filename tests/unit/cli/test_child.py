"""No program outlives the command that it works for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tools import REPO, TIMEOUT

from qedcore.cli import child as child_module
from qedcore.cli.child import PIPE, child, exit_code


def test_it_ends_with_the_block() -> None:
    with pytest.raises(KeyError), child(["sleep", "100"]) as process:
        raise KeyError
    assert exit_code(process) == 128 + signal.SIGTERM


def test_it_ends_with_its_input() -> None:
    with child(["cat"], stdin=PIPE) as process:
        pass
    assert exit_code(process) == 0


def test_it_is_killed_if_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "_END_SECONDS", 0.1)
    with child(["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"], stdout=PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
    assert exit_code(process) == 128 + signal.SIGKILL


def test_it_ends_when_the_command_is_killed(tmp_path: Path) -> None:
    code = "from qedcore.cli.child import child\nwith child(['sleep', '100']) as p:\n"
    code += "    print(p.pid, flush=True)\n    p.wait()"
    command = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE)
    assert command.stdout is not None
    pid = int(command.stdout.readline())
    command.kill()
    command.wait()
    deadline = time.monotonic() + TIMEOUT
    while os.path.exists(f"/proc/{pid}/cwd") and "sleep" in Path(f"/proc/{pid}/comm").read_text():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
