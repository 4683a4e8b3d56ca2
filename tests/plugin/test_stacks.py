"""Locks of servers that tests start are checked, and a server that hangs shows where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import show_and_kill
from support.qed_image import Built
from support.server import DEADLOCK, Nbdkit, import_nbd, wait_for
from support.tools import changed_plugin

Image = Callable[..., Built]
Serve = Callable[..., Nbdkit]

OUT_OF_ORDER = """
from qedcore.engine.image import QEDImage
from qedcore.locks import Rank, ranked_lock

one, two = ranked_lock(Rank.L1), ranked_lock(Rank.GATE)

def flush_out_of_order(image):
    with one, two:
        pass

QEDImage.flush = flush_out_of_order
"""


def test_locks_of_servers_are_checked(image: Image, serve: Serve, tmp_path: Path) -> None:
    server = serve(image(layout="D").path, plugin=changed_plugin(tmp_path, OUT_OF_ORDER))
    client = server.connect()
    with pytest.raises(import_nbd().Error):
        client.flush()
    client.shutdown()
    server.stop()
    assert "LockOrderError: GATE taken while holding ['L1']" in server.log()
    server.expect_traceback = True  # else the fixture fails the test for it


def test_server_that_hangs_shows_its_stacks(image: Image, serve: Serve, tmp_path: Path) -> None:
    server = serve(image(layout="D").path, plugin=changed_plugin(tmp_path, DEADLOCK))
    client = server.connect()
    nbd = import_nbd()
    cookie = client.aio_flush()
    wait_for(lambda: "hangs" in server.log(), "the flush has begun")
    show_and_kill([server])
    with pytest.raises(nbd.Error):
        while not client.aio_command_completed(cookie):
            client.poll(-1)
    assert "in wait_for_ever" in server.log()
    assert "threads of the server:" in server.log() and "in futex" in server.log()
