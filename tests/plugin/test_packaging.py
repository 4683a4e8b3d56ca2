"""packaging/: the systemd units, tried by systemd's own tools, and the versions."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from support.patterns import MiB
from support.qed_image import Built, assert_sound
from support.server import wait_for
from support.tools import PLUGIN, REPO, TIMEOUT, require, run, run_ok

import qedcore

PACKAGING = REPO / "packaging"
SERVICE = PACKAGING / "systemd" / "nbdkit-qed@.service"


def command_of_the_service(variables: dict[str, str]) -> list[str]:
    """ExecStart=, its variables expanded as systemd does: ${NAME} is one word, $NAME as many as it has."""
    lines = [line for line in SERVICE.read_text().splitlines() if line.startswith("ExecStart=")]
    assert len(lines) == 1
    words: list[str] = []
    for word in lines[0].partition("=")[2].split():
        if word.startswith("$") and not word.startswith("${"):
            words += shlex.split(variables[word[1:]])
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], word))
    return words


def test_the_service_serves_what_systemd_listens_for(tmp_path: Path, image: Callable[..., Built]) -> None:
    require("systemd-socket-activate", "nbdinfo", "nbdcopy")
    built = image(layout="DZ-D", size=MiB)
    command = command_of_the_service({"FILE": str(built.path), "OPTIONS": "", "PARAMETERS": "cache=writethrough"})
    # The plugin of the checkout instead of the installed one.
    at = command.index("qed")
    command[at : at + 1] = ["python", str(PLUGIN)]
    socket = tmp_path / "socket"
    uri = f"nbd+unix:///?socket={socket}"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(["systemd-socket-activate", "-l", socket, *command], stderr=log, cwd="/")
    try:
        wait_for(socket.exists, "the socket")
        assert run_ok(["nbdinfo", "--size", uri]).strip() == str(MiB)
        data = tmp_path / "data"
        data.write_bytes(os.urandom(MiB))
        run_ok(["nbdcopy", "--flush", data, uri])
        # systemd ends a service with this signal.
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
    assert_sound(built.path)


def test_the_units_are_valid(tmp_path: Path) -> None:
    require("systemd-analyze")
    units = []
    for kind in ("service", "socket"):
        text = (PACKAGING / "systemd" / f"nbdkit-qed@.{kind}").read_text()
        unit = tmp_path / f"nbdkit-qed@disk.{kind}"
        # Manual pages that are not installed here would be missed.
        unit.write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
        units.append(unit)
    result = run(["systemd-analyze", "verify", *units])
    # It also looks at the units that these depend on, which are the system's.
    assert "nbdkit-qed@" not in result.text, result.text


def test_the_rpm_has_the_version_of_the_package() -> None:
    text = (PACKAGING / "qed.spec").read_text()
    assert re.findall(r"global qed_version ([\d.]+)", text) == [qedcore.__version__]
