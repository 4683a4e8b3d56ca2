"""Images in use: QEMU's programs, `qed` and the server refuse the same things to each other, in the same words."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from support import qemu
from support.patterns import MiB, stamp
from support.qed_image import QedFile
from support.server import Nbdkit, QemuNbd, StartError, disconnect, import_nbd
from support.tools import PYTHON, REPO, Result, run

from qedcore.cli.main import main

Serve = Callable[..., Nbdkit]
Qed = Callable[..., Result]

READ_REFUSED = 'Failed to get shared "write" lock'
WRITE_REFUSED = 'Failed to get "write" lock'


@pytest.fixture
def qed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Qed:
    """qed(*args) runs the command in this process, in tmp_path."""

    def call(*args: str) -> Result:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            capfd.readouterr()
            try:
                code = main(list(args))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """top.qed and other.qed over base.qed; plain.qed; raw.qed over base.raw."""
    qemu.create(tmp_path / "base.qed", MiB)
    qemu.create(tmp_path / "plain.qed", MiB)
    for name in ("top.qed", "other.qed"):
        qemu.create(tmp_path / name, MiB, backing="base.qed", backing_fmt="qed")
    (tmp_path / "base.raw").write_bytes(stamp(1, 0, MiB))
    qemu.create(tmp_path / "raw.qed", MiB, backing="base.raw")
    qemu.qemu_io_ok(tmp_path / "base.qed", "write -q -P 1 0 100k")
    qemu.qemu_io_ok(tmp_path / "top.qed", "write -q -P 2 64k 100k")
    return tmp_path


@pytest.fixture
def use(serve: Serve, images: Path) -> Iterator[Callable[..., ExitStack]]:
    """use(program, name, writable) serves an image until the test ends, or use.stop()."""
    stack = ExitStack()

    def start(program: str, name: str, writable: bool) -> ExitStack:
        if program == "qemu-nbd":
            stack.enter_context(QemuNbd(images / name, args=[] if writable else ["-r"]))
        else:
            server = serve(images / name, read_only=not writable)
            client = server.connect()
            stack.callback(server.kill)
            stack.callback(disconnect, client)
        return stack

    with stack:
        yield start


# What may be done to an image X; each is also a command of `qed`.
COMMANDS = {
    "info": ["info", "X"],
    "info -U": ["info", "-U", "X"],
    "info --backing-chain": ["info", "--backing-chain", "X"],
    "info, locking off": ["info", "--image-opts", "driver=qed,file.filename=X,file.locking=off"],
    "check -r": ["check", "-q", "-r", "all", "X"],
    "check -r -U": ["check", "-q", "-r", "all", "-U", "X"],
    "map": ["map", "X"],
    "map -U": ["map", "-U", "X"],
    "measure": ["measure", "-O", "raw", "X"],
    "compare": ["compare", "X", "X"],
    "compare second": ["compare", "plain.qed", "X"],
    "compare -U": ["compare", "-U", "X", "X"],
    "convert": ["convert", "-O", "raw", "X", "out.raw"],
    "convert -U": ["convert", "-U", "-O", "raw", "X", "out.raw"],
    "convert into": ["convert", "-O", "qed", "plain.qed", "X"],
    "convert into raw": ["convert", "-O", "raw", "plain.qed", "X"],
    "convert -n into": ["convert", "-n", "-O", "qed", "plain.qed", "X"],
    "create": ["create", "-q", "-f", "qed", "X", "1M"],
    "create over it": ["create", "-q", "-f", "qed", "-b", "X", "-F", "qed", "new.qed"],
    "resize": ["resize", "-q", "X", "+1M"],
    "rebase": ["rebase", "-b", "", "X"],
    "rebase -u": ["rebase", "-u", "-b", "base.qed", "-F", "qed", "X"],
    "rebase onto": ["rebase", "-b", "X", "-F", "qed", "copy.qed"],
    "rebase -U onto": ["rebase", "-U", "-b", "X", "-F", "qed", "copy.qed"],
}
ITSELF = {*COMMANDS, "check", "check -U", "commit"}
CHECKS = {"check": ["check", "X"], "check -U": ["check", "-U", "X"], "commit": ["commit", "-q", "X"]}


class State:
    """What is served, and which commands on X then fail."""

    def __init__(self, served: str, writable: bool, image: str, commands: set[str], refused: set[str]) -> None:
        self.served, self.writable = served, writable
        self.image = image
        self.commands = commands
        self.refused = refused


WRITES = {
    "check -r",
    "convert into",
    "convert into raw",
    "convert -n into",
    "create",
    "resize",
    "rebase",
    "rebase -u",
}
REPLACE = {"convert into", "convert into raw", "create"}
READS = {"info --backing-chain", "map", "measure", "compare", "compare second", "convert", "rebase onto"}
STATES = {
    "a writer's image": State(
        "plain.qed", True, "plain.qed", ITSELF - {"commit"}, WRITES | READS | {"info", "check"},
    ),
    "a writer's overlay": State(
        "top.qed", True, "top.qed", ITSELF, WRITES | READS | {"info", "check", "commit"},
    ),
    "a reader's overlay": State("top.qed", False, "top.qed", ITSELF, WRITES | {"commit"}),
    "a writer's base": State("top.qed", True, "base.qed", ITSELF - {"commit"}, WRITES),
    "a reader's base": State("top.qed", False, "base.qed", ITSELF - {"commit"}, WRITES),
    # `qed check` looks at one file only, and may go on; what replaces an image of no use to anybody may, too
    "over a writer's image": State(
        "base.qed", True, "top.qed", COMMANDS.keys() - REPLACE - {"check -r"},
        (READS | WRITES) - REPLACE - {"check -r", "rebase -u"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES.values(), ids=list(STATES))
def test_matrix(state: State, use: Callable[..., ExitStack], images: Path, qed: Qed) -> None:
    """qemu-img beside qemu-nbd is the measure for qemu-img beside the plugin and for qed beside both."""
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in sorted(state.commands)}
    for server in ("qemu-nbd", "plugin"):
        with use(server, state.served, state.writable):
            for name, results in found.items():
                args = [word.replace("X", state.image) for word in {**COMMANDS, **CHECKS}[name]]
                for program in (partial(qemu.qemu_img, cwd=images), qed):
                    shutil.copy(images / "plain.qed", images / "copy.qed")
                    result = program(*args)
                    results.append((result.rc, result.err.replace("qemu-img: ", "qed: ")))
    for name, results in found.items():
        assert results == results[:1] * 4, name
    refused = {name for name, results in found.items() if "Is another process using the image" in results[0][1]}
    assert refused == state.refused


def test_what_only_qed_does(use: Callable[..., ExitStack], images: Path, qed: Qed) -> None:
    before = (images / "base.qed").read_bytes()
    for program in ("qemu-nbd", "plugin"):
        with use(program, "top.qed", True):
            for image in ("top.qed", "base.qed"):
                result = qed("compact", image)
                assert result.rc == 1 and f"Could not open '{image}': {WRITE_REFUSED}\n" in result.err
            for command in (["dump"], ["check"], ["salvage", "-q"]):
                out = ["out"] if command[0] == "salvage" else []
                assert qed(*command, "base.qed", *out).rc == 0
                result = qed(*command, "top.qed", *out)
                assert result.rc == 1 and READ_REFUSED in result.err and "image [top.qed]?" in result.err
                assert READ_REFUSED not in qed(*command, "-U", "top.qed", *out).err
            result = qed("salvage", "base.qed", "top.qed")  # its target
            assert result.rc == 1 and WRITE_REFUSED in result.err and "image [top.qed]?" in result.err
            assert qed("check", "-q", "-r", "all", "--dry-run", "base.qed").rc == 0
            # the sibling is free, but what it is over cannot be written
            result = qed("commit", "other.qed")
            assert result.rc == 1 and f"{WRITE_REFUSED}\nIs another process using the image [base.qed]?" in result.err
            assert qed("compact", "-q", "other.qed").rc == 0
    assert (images / "base.qed").read_bytes() == before
    assert not list(images.glob(".qed-*"))


@pytest.mark.parametrize("program", ["qemu-nbd", "plugin"])
def test_qemu_io(use: Callable[..., ExitStack], images: Path, program: str) -> None:
    def refusal(name: str, **options: bool) -> str:
        result = qemu.qemu_io(images / name, "quit", **options)
        assert (result.rc == 0) is (result.err == "")
        return result.err.split(": ")[-1].split("\n")[0]

    with use(program, "top.qed", True):
        assert refusal("top.qed") == refusal("base.qed") == WRITE_REFUSED
        assert refusal("top.qed", read_only=True) == READ_REFUSED
        assert refusal("base.qed", read_only=True) == refusal("other.qed") == ""
    with use(program, "top.qed", False):
        assert refusal("top.qed") == refusal("base.qed") == WRITE_REFUSED
        assert refusal("top.qed", read_only=True) == refusal("base.qed", read_only=True) == ""
    assert refusal("top.qed") == ""


def test_a_raw_base_is_protected_too(use: Callable[..., ExitStack], images: Path, qed: Qed) -> None:
    """Unlike qemu-nbd, which lets others write to it, but like a virtual machine's disk."""
    with use("plugin", "raw.qed", True):
        for result in (
            qemu.qemu_io(images / "base.raw", "quit", fmt="raw"),
            qemu.qemu_img("resize", "-f", "raw", images / "base.raw", "2M"),
            qemu.qemu_img("create", "-f", "raw", images / "base.raw", "1M"),
            qemu.qemu_img("convert", "-f", "qed", "-O", "raw", images / "plain.qed", images / "base.raw"),
            qed("convert", "plain.qed", "-O", "raw", "base.raw"),
        ):
            assert result.rc == 1 and WRITE_REFUSED in result.err
        assert qemu.qemu_io(images / "base.raw", "quit", fmt="raw", read_only=True).rc == 0
    assert (images / "base.raw").read_bytes() == stamp(1, 0, MiB)
    with QemuNbd(images / "base.raw", fmt="raw"):
        result = qed("map", "raw.qed")
        assert result.rc == 1 and READ_REFUSED in result.err
        assert qed("map", "-U", "raw.qed").rc == qed("info", "base.raw").rc == 0


# The server is the second


@pytest.mark.parametrize("read_only", [False, True])
def test_server_does_not_start_over_a_writer(serve: Serve, images: Path, read_only: bool) -> None:
    with QemuNbd(images / "base.qed"):
        for name, words in (("base.qed", ""), ("top.qed", "top.qed: its backing file: ")):
            with pytest.raises(StartError) as caught:
                serve(images / name, read_only=read_only)
            assert f"{words}{READ_REFUSED}. Is another process using the image [" in caught.value.log
            assert "base.qed]?" in caught.value.log
    serve(images / "base.qed").connect()


def test_promotion_is_refused_while_there_are_readers(serve: Serve, images: Path) -> None:
    """The client is refused, and nothing else; later ones are served."""
    nbd = import_nbd()
    before = (images / "base.qed").read_bytes()
    with QemuNbd(images / "base.qed", args=["-r"]):
        server = serve(images / "base.qed")
        for _ in range(2):
            with pytest.raises(nbd.Error):
                server.connect()
        assert f"{WRITE_REFUSED}. Is another process using the image [{images / 'base.qed'}]?" in server.log()
        assert qemu.qemu_img("check", images / "base.qed").rc == 0  # the server still is a reader like others
        assert qemu.qemu_img("resize", images / "base.qed", "2M").rc == 1
    client = server.connect()
    assert client.pread(512, 0) == b"\1" * 512
    client.pwrite(b"\7" * 512, 0)
    assert qemu.qemu_img("info", images / "base.qed").rc == 1
    disconnect(client)
    assert qemu.qemu_img("info", images / "base.qed").rc == 1  # as long as the server runs
    server.stop()
    assert (images / "base.qed").read_bytes() != before
    qemu.assert_check_clean(images / "base.qed")


def test_no_writer_between_start_and_first_client(serve: Serve, images: Path) -> None:
    """What the server has read at its start cannot become stale."""
    server = serve(images / "plain.qed")
    result = qemu.qemu_io(images / "plain.qed", "write 0 64k")
    assert result.rc == 1 and WRITE_REFUSED in result.err
    assert server.connect().pread(512, 0) == bytes(512)


def test_two_servers(serve: Serve, images: Path) -> None:
    readers = [serve(images / "top.qed", read_only=True) for _ in range(2)]
    assert {bytes(reader.connect().pread(1, 0)) for reader in readers} == {b"\1"}
    writers = [serve(images / name) for name in ("raw.qed", "other.qed")]
    for writer in writers:
        writer.connect().pwrite(b"x", 0)
    with pytest.raises(StartError, match="Failed to get shared"):
        serve(images / "other.qed")
    with pytest.raises(import_nbd().Error):  # the base of the other three
        serve(images / "base.qed").connect()


def test_kill_frees_the_image(serve: Serve, images: Path) -> None:
    server = serve(images / "top.qed")
    server.connect().pwrite(b"x", 0)
    assert qemu.qemu_io(images / "top.qed", "quit").rc == 1
    server.send_signal(signal.SIGKILL)
    server.wait()
    qemu.qemu_io_ok(images / "top.qed", "read -q -P 120 0 1")


def test_a_daemon_keeps_the_locks(serve: Serve, images: Path) -> None:
    """They were taken by a process that has ended: nbdkit forks after the image was opened."""
    serve(images / "top.qed", daemon=True)
    for name in ("top.qed", "base.qed"):
        assert WRITE_REFUSED in qemu.qemu_io(images / name, "quit").err
        assert qemu.qemu_img("info", images / name).rc == 0


def test_lock_off(serve: Serve, images: Path) -> None:
    with QemuNbd(images / "base.qed", args=["-r"]):
        serve(images / "top.qed", lock="off").connect()
        serve(images / "base.qed", lock="off").connect()
    qemu.qemu_img_ok("info", images / "base.qed")


def test_the_command_frees_what_it_kills(images: Path) -> None:
    """kill -9 in the middle of a command leaves no lock behind."""
    code = (
        "import os, signal, sys; from qedcore.storage.file import FileStorage\n"
        "FileStorage.flush = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from qedcore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    image = images / "plain.qed"
    result = run([PYTHON, "-c", code, "resize", image, "2M"], env={"PYTHONPATH": str(REPO)})
    assert result.rc == -signal.SIGKILL
    qemu.qemu_io_ok(image, "quit")
    with QedFile(image) as left:
        assert not left.verify().errors


def test_image_options(use: Callable[..., ExitStack], images: Path, qed: Qed) -> None:
    options = "driver=qed,file.filename=plain.qed,file.locking="
    with use("qemu-nbd", "plain.qed", True):
        for value, rc in (("off", 0), ("auto", 1), ("on", 1), ("maybe", 1)):
            theirs, ours = (
                qemu.qemu_img("map", "--image-opts", options + value, cwd=images),
                qed("map", "--image-opts", options + value),
            )
            assert (ours.rc, ours.err) == (theirs.rc, theirs.err.replace("qemu-img: ", "qed: "))
            assert ours.rc == rc
        name = 'json:{"driver": "qed", "file": {"driver": "file", "filename": "plain.qed", "locking": "off"}}'
        assert qed("check", name).rc == 0
