"""dir=: the images of a directory as exports."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, ImageSpec, QedFile, assert_sound, build, read_header
from support.server import Nbdkit, disconnect, import_nbd, refusal, wait_for
from support.tools import REPO, require, run, run_ok, unavailable

CS = 64 * KiB
NEED_CHECK = 2

Serve = Callable[..., Nbdkit]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def make(home: Path, name: str, tag: int = 1, **spec: Any) -> Built:
    return build(home / name, ImageSpec(**{"size": MiB, "layout": "DZ-D", "tag": tag, **spec}))


def connect(server: Nbdkit, name: str = "") -> Any:
    handle = import_nbd().NBD()
    handle.set_export_name(name)
    handle.set_full_info(True)
    handle.connect_unix(str(server.socket))  # a URI would bring its own name
    return handle


def listed(server: Nbdkit) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    handle = import_nbd().NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.uri)
    handle.opt_list(lambda name, description: found.append((name, description)) or 0)
    handle.opt_abort()
    return found


def open_files(server: Nbdkit, home: Path) -> list[str]:
    """Names of the files of the directory that the server has open."""
    found = []
    for fd in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            target = Path(os.readlink(fd))
        except FileNotFoundError:
            continue
        if target.parent == home:
            found.append(target.name)
    return sorted(found)


def refused(server: Nbdkit, name: str, *words: str) -> None:
    """Opening it fails, with one line in the log that has the words."""
    before = len(server.log().splitlines())
    with pytest.raises(import_nbd().Error):
        connect(server, name)
    lines = server.log().splitlines()[before:]
    assert len(lines) == 1, lines
    assert not [word for word in words if word not in lines[0]], lines[0]


def test_each_image_is_served_by_its_name(home: Path, serve: Serve) -> None:
    images = {name: make(home, name, tag) for tag, name in enumerate(("a.qed", "b", "grüße und = Leerzeichen"), 1)}
    server = serve(dir=home)
    clients = {name: connect(server, name) for name in images}
    for name, client in clients.items():
        assert client.get_export_description() == "QED image, 1 MiB, 64 KiB clusters"
        assert_same(client.pread(MiB, 0), images[name].read(0, MiB))
    for tag, client in enumerate(clients.values(), 11):
        client.pwrite(stamp(tag, 2 * CS, 4096), 2 * CS)
        client.shutdown()
    server.stop()
    assert server.log() == ""
    for tag, built in enumerate(images.values(), 11):
        assert_sound(built.path)
        with QedFile(built.path) as oracle:
            assert_same(oracle.read(2 * CS, 4096), stamp(tag, 2 * CS, 4096))


def odd_files(home: Path, outside: Path) -> list[str]:
    """Puts everything into the directory that is no export; the names of it."""
    content = make(outside, "outside.qed").path.read_bytes()
    (home / "raw").write_bytes(bytes(4096))
    (home / "empty").write_bytes(b"")
    (home / ".hidden.qed").write_bytes(content)
    (home / "qcow2").write_bytes(b"QFI\xfb" + bytes(4096))
    (home / "link").symlink_to(outside / "outside.qed")
    (home / "inner-link").symlink_to("good.qed")
    (home / "dangling").symlink_to("nothing")
    os.mkfifo(home / "fifo")
    (home / "sub").mkdir()
    (home / "sub" / "x.qed").write_bytes(content)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(home / "socket"))
    with open(os.fsencode(home) + b"/latin\xe9.qed", "wb") as file:
        file.write(content)
    return ["raw", "empty", ".hidden.qed", "qcow2", "link", "inner-link", "dangling", "fifo", "sub", "socket"]


def test_only_images_are_listed(tmp_path: Path, home: Path, serve: Serve) -> None:
    make(home, "good.qed", cluster_size=4 * KiB)
    make(home, "a-bad-size.qed", header={"cluster_size": 5000})
    make(home, "a-bad-table.qed", header={"l1_table_offset": 512})
    (home / "cut.qed").write_bytes(b"QED\0")
    odd_files(home, tmp_path)
    server = serve(dir=home)
    assert listed(server) == [
        ("a-bad-size.qed", "QED image, damaged"),
        ("a-bad-table.qed", "QED image, 1 MiB, 64 KiB clusters"),
        ("cut.qed", "QED image, damaged"),
        ("good.qed", "QED image, 1 MiB, 4 KiB clusters"),
    ]
    assert server.log() == ""
    refused(server, "a-bad-size.qed", "a-bad-size.qed", "cluster size is invalid")
    refused(server, "a-bad-table.qed", "a-bad-table.qed", "table offset is invalid")
    refused(server, "cut.qed", "cut.qed", "cluster size is invalid")


def test_what_is_no_image_is_not_opened(tmp_path: Path, home: Path, serve: Serve) -> None:
    """Whatever name a client sends: one line in the log, nothing else; above all, no wait for a FIFO."""
    good = make(home, "good.qed")
    odd = odd_files(home, tmp_path)
    (tmp_path / "images-2").mkdir()
    make(tmp_path / "images-2", "x.qed")
    server = serve(dir=home)
    for name in odd:
        refused(server, name, name)
    names = ["nothing", "..", ".", "/", "../outside.qed", "./good.qed", "sub/x.qed", "good.qed/", "../images-2/x.qed"]
    names += [
        str(good.path),
        "good.qed/../good.qed",
        "x" * 300,
        "tab\tnew\nline",
        "%s%n",
        "/proc/self/fd/0",
        "GOOD.QED",
    ]
    for name in names:
        refused(server, name, "export '")
    client = connect(server, "good.qed")
    assert_same(client.pread(MiB, 0), good.read(0, MiB))
    client.shutdown()
    wait_for(lambda: open_files(server, home) == [], "all are closed")
    server.stop()


def test_a_name_that_is_not_utf8(home: Path, serve: Serve) -> None:
    """libnbd would not send it: the handshake by hand."""
    built = make(home, "good.qed")
    with open(os.fsencode(home) + b"/caf\xe9", "wb") as file:
        file.write(built.path.read_bytes())
    server = serve(dir=home)
    for name in (b"caf\xe9", b"good\0.qed"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(server.socket))
            greeting = b""
            while len(greeting) < 18:
                greeting += client.recv(18 - len(greeting))
            # fixed newstyle; NBD_OPT_EXPORT_NAME, to which the only negative answer is to hang up
            client.sendall(b"\0\0\0\1" + b"IHAVEOPT" + b"\0\0\0\1" + len(name).to_bytes(4, "big") + name)
            try:
                answer = client.recv(1024)
            except ConnectionError:
                answer = b""
        assert answer == b""
    ours, _ = server.log().splitlines()
    assert "cannot be the name" in ours
    client = connect(server, "good.qed")
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()


def test_default_export(home: Path, serve: Serve) -> None:
    server = serve(dir=home)
    refused(server, "", "no export is named", str(home))
    only = make(home, "only.qed", 1)
    (home / "other.raw").write_bytes(bytes(512))
    client = connect(server)
    assert client.get_canonical_export_name() == "only.qed"
    assert_same(client.pread(MiB, 0), only.read(0, MiB))
    client.shutdown()
    make(home, "second.qed", 2)
    refused(server, "", "no export is named", str(home))
    assert [name for name, _ in listed(server)] == ["only.qed", "second.qed"]


def test_an_image_is_open_while_it_has_clients(home: Path, serve: Serve) -> None:
    for name in ("a", "b"):
        make(home, name)
    server = serve(dir=home)
    assert open_files(server, home) == []
    first = connect(server, "a")
    assert open_files(server, home) == ["a"]
    second, third = connect(server, "a"), connect(server, "b")
    assert open_files(server, home) == ["a", "b"]  # shared, not opened twice
    first.pwrite(stamp(3, 2 * CS, 512), 2 * CS)
    assert_same(second.pread(512, 2 * CS), stamp(3, 2 * CS, 512))
    first.shutdown()
    second.pwrite(stamp(4, 5 * CS, 512), 5 * CS)
    assert read_header(home / "a")["features"] & NEED_CHECK
    second.shutdown()
    wait_for(lambda: open_files(server, home) == ["b"], "a is closed")
    assert_sound(home / "a")  # NEED_CHECK is cleared, too
    qemu.assert_check_clean(home / "a")
    third.shutdown()
    again = connect(server, "a")
    assert_same(again.pread(512, 5 * CS), stamp(4, 5 * CS, 512))
    again.shutdown()
    server.stop()
    assert server.log() == ""


def test_two_names_of_one_file_share_one_image(home: Path, serve: Serve) -> None:
    built = make(home, "a")
    os.link(built.path, home / "b")
    server = serve(dir=home)
    one, two = connect(server, "a"), connect(server, "b")
    for i in range(4):  # two allocators on one file would give the same clusters away
        one.pwrite(stamp(5, (4 + 2 * i) * CS, CS), (4 + 2 * i) * CS)
        two.pwrite(stamp(6, (5 + 2 * i) * CS, CS), (5 + 2 * i) * CS)
    for i in range(4):
        assert_same(two.pread(CS, (4 + 2 * i) * CS), stamp(5, (4 + 2 * i) * CS, CS))
        assert_same(one.pread(CS, (5 + 2 * i) * CS), stamp(6, (5 + 2 * i) * CS, CS))
    one.shutdown()
    two.shutdown()
    server.stop()
    assert_sound(built.path)


def test_a_replaced_image_is_another_one(home: Path, serve: Serve) -> None:
    old = make(home, "a", 1)
    server = serve(dir=home)
    before = connect(server, "a")
    new = make(home, "a.new", 2)
    os.replace(new.path, old.path)
    after = connect(server, "a")
    assert_same(before.pread(CS, 0), old.read(0, CS))
    assert_same(after.pread(CS, 0), new.read(0, CS))
    before.shutdown()
    after.pwrite(b"x" * 512, 0)
    after.shutdown()
    server.stop()
    assert_sound(home / "a")


def test_a_renamed_image_is_the_same_one(home: Path, serve: Serve) -> None:
    """Readers have it under its old name; whoever comes by the new one may write, even if the old one is taken."""
    built = make(home, "a", 1)
    with_r = serve(dir=home)
    reader = connect(with_r, "a")
    assert_same(reader.pread(CS, 0), built.read(0, CS))
    os.rename(home / "a", home / "b")
    make(home, "a", 2)
    writer = connect(with_r, "b")
    writer.pwrite(stamp(7, 5 * CS, 512), 5 * CS)
    assert_same(reader.pread(512, 5 * CS), stamp(7, 5 * CS, 512))
    other = connect(with_r, "a")
    assert_same(other.pread(512, 5 * CS), bytes(512))
    for client in (reader, writer, other):
        client.shutdown()
    with_r.stop()
    assert_sound(home / "b")
    assert_sound(home / "a")


def test_an_image_grows_between_its_clients(home: Path, serve: Serve) -> None:
    """NBD cannot resize a disk in use; the server need not end for it: without clients an image is not open."""
    built = make(home, "a")
    server = serve(dir=home)
    client = connect(server, "a")
    resize = [sys.executable, "-m", "qedcore", "resize", str(home / "a"), "+1M"]
    refusal = run(resize, cwd=REPO)
    assert refusal.rc == 1 and 'Failed to get "write" lock' in refusal.text or "lock" in refusal.text, refusal.text
    client.shutdown()
    wait_for(lambda: open_files(server, home) == [], "it is closed")
    run_ok(resize, cwd=REPO)
    client = connect(server, "a")
    assert client.get_size() == 2 * MiB
    client.pwrite(stamp(3, 2 * MiB - 512, 512), 2 * MiB - 512)
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(home / "a")


def test_read_only(home: Path, serve: Serve) -> None:
    """One golden image for many: nothing is written, not even a repair."""
    built = make(home, "golden", features=NEED_CHECK, leaks=2)
    content = built.path.read_bytes()
    server = serve(dir=home, read_only=True)
    clients = [connect(server, "golden") for _ in range(3)]
    for client in clients:
        assert client.is_read_only()
        assert_same(client.pread(MiB, 0), built.read(0, MiB))
        client.shutdown()
    server.stop()
    assert built.path.read_bytes() == content


def test_a_dirty_image_is_repaired_when_it_is_opened(home: Path, serve: Serve) -> None:
    make(home, "clean")
    dirty = make(home, "dirty", features=NEED_CHECK, leaks=2)
    server = serve(dir=home)
    connect(server, "clean").shutdown()
    assert server.log() == ""
    client = connect(server, "dirty")
    assert "dirty" in server.log()
    client.shutdown()
    server.stop()
    qemu.assert_check_clean(dirty.path)


def test_a_close_that_fails_is_logged(home: Path, tmp_path: Path, serve: Serve) -> None:
    """The last client cannot be told; the image says itself that it was not closed, and is repaired."""
    require("strace")
    if run(["strace", "-D", "-o", str(tmp_path / "probe"), "true"]).rc != 0:
        unavailable("strace may not trace here")
    log = tmp_path / "trace"

    def use(name: str, *inject: str) -> tuple[Nbdkit, int]:
        make(home, name)
        wrapper = ["strace", "-D", "-f", "-qq", "-o", str(log), "-e", "trace=fdatasync", *inject]
        server = serve(dir=home, wrapper=wrapper, threads=1)  # strace counts the calls of each thread
        client = connect(server, name)
        client.pwrite(stamp(7, 5 * CS, 4096), 5 * CS)
        syncs = log.read_text().count("fdatasync(")
        client.shutdown()
        wait_for(lambda: open_files(server, home) == [], "it is closed")
        return server, syncs

    _, syncs = use("dry")
    server, _ = use("a", "-e", f"inject=fdatasync:error=EIO:when={syncs + 1}")
    server.stop()
    line = server.log()
    assert line.count("\n") == 1 and "cannot flush" in line and "Input/output error" in line, line
    assert read_header(home / "a")["features"] & NEED_CHECK
    server = serve(dir=home)
    client = connect(server, "a")
    assert "was not closed cleanly" in server.log()
    assert_same(client.pread(4096, 5 * CS), stamp(7, 5 * CS, 4096))
    client.shutdown()
    server.stop()
    assert_sound(home / "a", leaks=None)


def test_backing_files_start_from_the_directory(home: Path, serve: Serve) -> None:
    base = make(home, "base.qed", 1, layout="DDDD")
    overlay = make(home, "overlay.qed", 2, layout="D---", backing="base.qed")
    server = serve(dir="images", cwd=home.parent, daemon=True)
    client = connect(server, "overlay.qed")
    assert_same(client.pread(4 * CS, 0), overlay.read(0, CS) + base.read(CS, 3 * CS))
    client.shutdown()
    server.stop()


def test_names_do_not_depend_on_the_locale(tmp_path: Path, serve: Serve) -> None:
    home = tmp_path / "Bilder-ü"
    home.mkdir()
    built = make(home, "größe.qed")
    server = serve(dir=home, env={"LC_ALL": "C"})
    assert [name for name, _ in listed(server)] == ["größe.qed"]
    client = connect(server, "größe.qed")
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()
    server.stop()
    server = serve(built.path, env={"LC_ALL": "C"})
    client = connect(server)
    assert_same(client.pread(MiB, 0), built.read(0, MiB))
    client.shutdown()


def test_thousands_of_images(home: Path, serve: Serve) -> None:
    """nbdkit lists 10,000 exports and fails beyond; all of them can be opened."""
    header = make(home, "00000").path.read_bytes()[:64]
    for n in range(1, 10_001):
        with open(home / f"{n:05}", "wb") as file:
            file.write(header)
    server = serve(dir=home)
    before = len(server.log().splitlines())
    assert [name for name, _ in listed(server)] == [f"{n:05}" for n in range(10_000)]
    assert "10001 images" in server.log().splitlines()[before]


def test_many_clients_come_and_go(home: Path, serve: Serve, rng: random.Random) -> None:
    """Opening, closing and reopening at once, on real threads; every acknowledged write is there in the end."""
    clients, rounds = 6, 12
    names = ["a", "b", "c"]
    images = {name: make(home, name, size=4 * MiB, layout="") for name in names}
    plans = [[(rng.choice(names), r) for r in range(rounds)] for _ in range(clients)]
    server = serve(dir=home)
    done: list[tuple[str, int, int]] = []  # name, position, tag
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for name, r in plans[number]:
                client = connect(server, name)
                pos = (number * rounds + r) % 64 * CS + number * 512
                client.pwrite(stamp(number + 1, pos, 512), pos)
                done.append((name, pos, number + 1))
                client.shutdown()
        except BaseException as error:  # noqa: BLE001 - the main thread reports it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    wait_for(lambda: open_files(server, home) == [], "all are closed")
    for built in images.values():
        assert_sound(built.path)
    for name, pos, tag in done:
        client = connect(server, name)
        assert_same(client.pread(512, pos), stamp(tag, pos, 512), pos)
        disconnect(client)
    server.stop()
    assert server.log() == ""


REFUSED = {
    "dir and file": (["dir=.", "file=x.qed"], ("file", "dir", "exclude")),
    "file and dir": (["file=x.qed", "dir=."], ("file", "dir", "exclude")),
    "no value": (["dir="], ("dir=", "value")),
    "twice": (["dir=.", "dir=."], ("dir", "twice")),
    "absent": (["dir=nowhere"], ("nowhere", "No such file")),
    "a file": (["dir=file"], ("file", "Not a directory")),
    "create": (["dir=.", "create=true", "size=1M"], ("create=true", "file=")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(home: Path, name: str) -> None:
    params, words = REFUSED[name]
    (home / "file").write_bytes(b"")
    line = refusal(params, home)
    assert not [word for word in words if word not in line], line
