"""The promises P1 to P4 for the real server under power loss, as its system calls show it; more in `make crash`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from crash.engine import SHAPES, Setup, check
from crash.guest import Violation
from crash.syscalls import Recording, parse
from support.crashes import Op
from support.tools import changed_plugin

from qedcore.errors import QEDError


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_power_loss(tmp_path: Path, backing: bool, seed: str) -> None:
    """A server that is killed, a repair, and one that ends in peace."""
    setup = Setup(tmp_path, SHAPES["4K/2"], backing)
    rng = random.Random(seed)
    recording = Recording(setup)
    recording.serve(rng, clients=3, requests=8, kill=True)
    recording.command("check", "-r", "all")
    recording.serve(rng, clients=3, requests=8)
    assert check(setup, recording.history(), rng, subsets=1, part=0.1) > 20


FORGETFUL = """
from qedcore.engine import allocator
from qedcore.storage.file import FileStorage

allocator.GROWTH_STEP = 32768
really_flush = FileStorage.flush

def forgetful(storage):
    if sys._getframe(1).f_code.co_name != FUNCTION:
        really_flush(storage)

FileStorage.flush = forgetful
"""


@pytest.mark.parametrize(
    "function, spec",
    [("_begin", {}), ("_link_new_table", {"backing": True, "layout": {}}), ("flush", {})],
    ids=["no flush after NEED_CHECK", "L1 before L2", "no flush for guests"],
)
def test_recorder_catches(tmp_path: Path, function: str, spec: dict[str, Any]) -> None:
    """The flushes of one function do nothing in this server."""
    plugin = changed_plugin(tmp_path, f"FUNCTION = {function!r}\n{FORGETFUL}")
    with pytest.raises((Violation, QEDError)):
        for seed in range(20):
            rng = random.Random(seed)
            (tmp_path / str(seed)).mkdir()
            setup = Setup(tmp_path / str(seed), SHAPES["4K/1"], **{"backing": False, **spec})
            recording = Recording(setup)
            recording.serve(rng, clients=2, requests=10, plugin=plugin, kill=True)
            check(setup, recording.history(), rng, subsets=2, part=0.3)


def test_log() -> None:
    """Calls count in the order in which they return, and not if they fail."""
    calls = parse(
        r"""1 10.000001 pwrite64(5, "\x61\x62", 2, 512 <unfinished ...>
2 10.000002 fdatasync(5 <unfinished ...>
3 10.000003 pwritev2(5, [{iov_base="", iov_len=0}, {iov_base="\x63\x64", iov_len=2}], 2, 4096, 0) = 1 <0.000100>
1 10.000200 <... pwrite64 resumed>) = 2 <0.000199>
2 10.000300 <... fdatasync resumed>) = 0 <0.000298>
2 10.000400 fallocate(5, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 8192, 4) = -1 EOPNOTSUPP (...) <0.000001>
2 10.000500 ftruncate(5, 12288) = 0 <0.000001>
1 10.000600 +++ exited with 0 +++
"""
    )
    assert [call.op() for call in calls] == [
        Op("image.qed", 4096, b"c"),
        Op("image.qed", 512, b"ab"),
        Op("image.qed"),
        Op("image.qed", size=12288),
    ]
    assert [(call.called, call.returned) for call in calls] == [(2, 2), (0, 3), (1, 4), (6, 6)]
