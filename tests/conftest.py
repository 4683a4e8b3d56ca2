"""Import paths, the random seed and the fixtures that every test directory shares."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Lock ranks are checked in every test, also in the servers that tests start.
os.environ["QEDCORE_CHECK_LOCKS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
for entry in (ROOT, ROOT / "tests"):
    if str(entry) not in sys.path:
        sys.path.insert(0, str(entry))

from support.qed_image import Built, ImageSpec, build  # noqa: E402
from support.server import Nbdkit  # noqa: E402

SEED_VARIABLE = "QED_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    # kill -USR1 prints all Python stacks of a stuck run
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # xdist workers inherit the environment, so all of them use the controller's seed
    os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(1 << 32)))


def pytest_report_header(config: pytest.Config) -> str:
    return f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]}"))
        for server in getattr(item, "qed_servers", []):
            report.sections.append((f"log of server {server.pid}", server.log()))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """Seed of this test: the run's seed and the test's own name, so that tests do not depend on their order."""
    return f"{os.environ[SEED_VARIABLE]}:{request.node.nodeid.split('/')[-1]}"


@pytest.fixture
def rng(seed: str) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Built]:
    """image(name="image.qed", **spec) builds an image in tmp_path; see ImageSpec."""

    def make(name: str = "image.qed", **spec: Any) -> Built:
        return build(tmp_path / name, ImageSpec(**spec))

    return make


def show_and_kill(servers: list[Nbdkit]) -> None:
    """The test hangs: its servers say where they are, and end, so that it fails with their logs."""
    for server in servers:
        if server.running():
            server.show_stacks()
            server.send_signal(signal.SIGKILL)


def _patience(item: pytest.Item) -> float:
    """Seconds: a little less than pytest-timeout has."""
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker and marker.args else item.config.getini("timeout")
    return float(limit) * 0.8


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., Nbdkit]]:
    """serve(path, key=value..., **nbdkit) starts a server; it dies with the test, and left no traceback.

    Keyword arguments that Nbdkit.__init__ knows go there, all others to the plugin.
    """
    servers: list[Nbdkit] = []
    request.node.qed_servers = servers
    watchdog = threading.Timer(_patience(request.node), show_and_kill, args=(servers,))
    watchdog.daemon = True
    watchdog.start()

    def start(file: str | os.PathLike[str] | None = None, **options: Any) -> Nbdkit:
        known = {"plugin", "read_only", "threads", "filters", "filter_params", "args", "cwd", "env", "tcp"}
        known |= {"daemon", "wrapper"}
        nbdkit = {key: options.pop(key) for key in known & options.keys()}
        params = ({} if file is None else {"file": os.fspath(file)}) | options
        server = Nbdkit(params, **nbdkit)
        servers.append(server)
        return server.start()

    yield start
    watchdog.cancel()
    tracebacks = []
    for server in servers:
        server.kill()
        if "Traceback" in server.log() and not server.expect_traceback:
            tracebacks.append(server.log())
        server.remove()
    assert not tracebacks, tracebacks[0]
