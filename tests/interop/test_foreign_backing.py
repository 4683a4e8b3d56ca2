"""Backing files in formats of other programs, and on NBD servers: what is read through them, and when not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.patterns import KiB, MiB, Model, assert_same, check_model, device, stamp
from support.qed_image import Built, raw_reader
from support.server import Nbdkit, QemuNbd, StartError, import_nbd, wait_for
from support.tools import Result, require, run

import qedcore
from qedcore.backing.policy import BackingPolicy
from qedcore.errors import QEDError, StorageError, UnsupportedError

Image = Callable[..., Built]
Serve = Callable[..., Nbdkit]
CS = 64 * KiB
SIZE = 4 * MiB
REPO = Path(__file__).resolve().parents[2]
ANY = BackingPolicy(follow="any", format="probe")
FORMATS = ("qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "parallels")


@pytest.fixture(autouse=True)
def needed() -> None:
    import_nbd()
    require("qemu-nbd", "qemu-img")


def foreign(path: Path, fmt: str, tag: int = 77) -> bytes:
    """An image with data and holes; its content."""
    data = stamp(tag, 0, MiB) + bytes(MiB) + stamp(tag, 2 * MiB, MiB) + bytes(MiB)
    plain = path.with_suffix(".plain")
    plain.write_bytes(data)
    # vpc rounds sizes otherwise
    options = ["-o", "force_size=on"] if fmt == "vpc" else []
    qemu.qemu_img_ok("convert", "-f", "raw", "-O", fmt, *options, plain, path)
    plain.unlink()
    return data


def helpers(tmp_path: Path) -> list[int]:
    """The qemu-nbd processes that work on files of this test."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes() if entry.isdigit() else b""
            if b"qemu-nbd\0" in words and os.fsencode(tmp_path) in words:
                found.append(int(entry))
        except OSError:
            pass
    return found


def no_helpers(tmp_path: Path) -> None:
    wait_for(lambda: not helpers(tmp_path), "qemu-nbd ends with its client")


@pytest.mark.parametrize("fmt", FORMATS)
def test_served_over_other_formats(tmp_path: Path, image: Image, serve: Serve, fmt: str) -> None:
    """Read, copied up and written; QEMU sees the same."""
    data = foreign(tmp_path / "base", fmt)
    built = image(size=SIZE + MiB, layout="DZ-", backing="base")
    model = Model(SIZE + MiB, lambda pos, n: built.read(pos, n, lambda p, m: data[p : p + m].ljust(m, b"\0")))
    server = serve(built.path, **{"backing-format": fmt})
    client = server.connect()
    check_model(model, device(client))
    for pos, length in ((5 * CS + 100, 1000), (SIZE - 512, 1024), (2 * MiB + 512, 3 * CS)):
        client.pwrite(stamp(3, pos, length), pos)
        model.write(pos, stamp(3, pos, length))
    check_model(model, device(client))
    client.shutdown()
    server.stop()
    no_helpers(tmp_path)
    qemu.assert_check_clean(built.path)
    qemu.to_raw(built.path, tmp_path / "out.raw")
    check_model(model, raw_reader(tmp_path / "out.raw"))


def test_the_rest_of_the_chain_is_followed_by_qemu(tmp_path: Path, image: Image) -> None:
    (tmp_path / "sub").mkdir()
    data = bytearray(foreign(tmp_path / "sub" / "low.vmdk", "vmdk"))
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", "-b", "low.vmdk", "-F", "vmdk", tmp_path / "sub" / "base.qcow2")
    qemu.qemu_io_ok(tmp_path / "sub" / "base.qcow2", "write -q -P 7 1536 5000", fmt="qcow2")
    data[1536:6536] = b"\7" * 5000
    image("middle.qed", size=SIZE, layout="-", backing="sub/base.qcow2")
    top = image("top.qed", size=SIZE, layout="-", backing="middle.qed")
    with qedcore.open_image(top.path, policy=BackingPolicy(format="qcow2")) as img:
        assert_same(img.pread(SIZE, 0), bytes(data))
    no_helpers(tmp_path)


def test_requests_run_at_the_same_time(tmp_path: Path, image: Image) -> None:
    data = foreign(tmp_path / "base", "qcow2")
    built = image(size=SIZE, layout="-", backing="base")
    with qedcore.open_image(built.path, writable=False, policy=ANY) as img, ThreadPoolExecutor(16) as pool:

        def read(i: int) -> None:
            pos = i * 7919 * 512 % (SIZE - 10000)
            assert_same(img.pread(10000, pos), data[pos : pos + 10000], pos)

        list(pool.map(read, range(500)))


def test_name_with_the_format(tmp_path: Path, image: Image) -> None:
    """As QEMU writes it; the operator need not say more."""
    (tmp_path / "d").mkdir()
    data = foreign(tmp_path / "d" / "a, b: c", "qcow2")
    name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"d/a, b: c"}}'
    with qedcore.open_image(image(size=SIZE, layout="-", backing=name).path) as img:
        assert_same(img.pread(SIZE, 0), data)


def test_name_for_qemu_alone(tmp_path: Path, image: Image) -> None:
    """Options that only QEMU understands; allowed only where everything is."""
    data = foreign(tmp_path / "base", "qcow2")
    options = {"driver": "qcow2", "lazy-refcounts": False, "file.filename": f"{tmp_path}/base"}
    path = image(size=SIZE, layout="-", backing=f"json:{json.dumps(options)}").path
    with qedcore.open_image(path, policy=ANY) as img:
        assert_same(img.pread(SIZE, 0), data)
    with pytest.raises(UnsupportedError, match="backing=any"):
        qedcore.open_image(path)


def test_operator_names_another_format_than_there_is(tmp_path: Path, image: Image) -> None:
    """The format is what was said, never what the bytes look like."""
    foreign(tmp_path / "base", "qcow2")
    built = image(size=SIZE, layout="-", backing="base")
    with pytest.raises(StorageError, match=f"cannot open {tmp_path}/base: [^/]*VDI[^/]*$") as caught:
        qedcore.open_image(built.path, policy=BackingPolicy(format="vdi"))
    assert "\n" not in str(caught.value)
    no_helpers(tmp_path)


def test_raw_disk_disguised_by_its_guest(tmp_path: Path, image: Image, serve: Serve) -> None:
    """The guest of a raw disk writes a qcow2 header that names a file of the host.  An old QEMU made an overlay."""
    (tmp_path / "secret").write_bytes(stamp(66, 0, SIZE))
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", tmp_path / "disk.raw", "4M")
    disk = (tmp_path / "disk.raw").read_bytes()
    built = image(size=SIZE, layout="-", backing="disk.raw")
    with pytest.raises(StartError) as caught:
        serve(built.path)
    assert caught.value.log.count("\n") <= 2 and "backing-format=qcow2 if" in caught.value.log
    client = serve(built.path, **{"backing-format": "raw"}).connect()
    assert_same(client.pread(len(disk), 0), disk)
    client.shutdown()


REFERS: dict[str, list[str]] = {
    "backing file": ["-f", "qcow2", "-b", "../secret", "-F", "raw"],
    "data file": ["-f", "qcow2", "-o", "data_file=../secret,data_file_raw=on"],
    "qcow": ["-f", "qcow", "-b", "../secret", "-F", "raw"],
    "vmdk": ["-f", "vmdk"],
    "vmdk descriptor": ["-f", "vmdk", "-o", "subformat=monolithicFlat"],
}


@pytest.mark.parametrize("name", REFERS)
def test_backing_dir_and_images_that_refer_to_other_files(tmp_path: Path, image: Image, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(stamp(66, 0, SIZE))
    qemu.qemu_img_ok("create", "-q", *REFERS[name], "base", str(SIZE), cwd=tmp_path / "in")
    built = image(size=SIZE, layout="-", backing="in/base")
    with pytest.raises(UnsupportedError, match="refer to other files: backing-dir cannot confine"):
        qedcore.open_image(built.path, policy=ANY.configured("backing-dir", str(tmp_path / "in")))
    assert not helpers(tmp_path)


@pytest.mark.parametrize("name", REFERS)
def test_named_format_does_not_lead_further(tmp_path: Path, image: Image, name: str) -> None:
    """The image names the format of its backing file, but the operator has not: QEMU opens that file alone."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(stamp(66, 0, SIZE))
    fmt = REFERS[name][1]
    qemu.qemu_img_ok("create", "-q", *REFERS[name], "base", str(SIZE), cwd=tmp_path / "in")
    stored = json.dumps({"driver": fmt, "file": {"driver": "file", "filename": "in/base"}})
    built = image(size=SIZE, layout="-", backing=f"json:{stored}")
    with pytest.raises(UnsupportedError, match=f"refer to other files: allow that with backing-format={fmt}"):
        qedcore.open_image(built.path)
    assert not helpers(tmp_path)
    if name in ("backing file", "qcow"):
        for policy in (BackingPolicy(format=fmt), BackingPolicy(format="probe"), BackingPolicy(follow="any")):
            with qedcore.open_image(built.path, policy=policy) as img:
                assert_same(img.pread(MiB, 0), stamp(66, 0, MiB))


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "vmdk"])
def test_backing_dir_and_images_that_do_not(tmp_path: Path, image: Image, fmt: str) -> None:
    (tmp_path / "in").mkdir()
    data = foreign(tmp_path / "in" / "base", fmt)
    built = image(size=SIZE, layout="-", backing="in/base")
    before = len(os.listdir("/proc/self/fd"))
    policy = BackingPolicy(format=fmt).configured("backing-dir", str(tmp_path / "in"))
    with qedcore.open_image(built.path, policy=policy) as img:
        assert_same(img.pread(SIZE, 0), data)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reference_that_is_hidden_from_us_is_not_followed(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the header changed after it was looked at, QEMU would still open nothing else."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(stamp(66, 0, SIZE))
    base = tmp_path / "in" / "base"
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", "-b", "../secret", "-F", "raw", "base", "4M", cwd=base.parent)
    built = image(size=SIZE, layout="-", backing="in/base")
    monkeypatch.setattr(BackingPolicy, "check_self_contained", lambda *args: None)
    policy = BackingPolicy(format="qcow2").configured("backing-dir", str(tmp_path / "in"))
    with qedcore.open_image(built.path, policy=policy) as img:
        assert_same(img.pread(SIZE, 0), bytes(SIZE))


@pytest.mark.parametrize("how", ["replaced", "removed", "a FIFO"])
def test_confined_file_that_is_exchanged_before_qemu_opens_it(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "in").mkdir()
    base = tmp_path / "in" / "base"
    foreign(base, "qcow2")
    foreign(tmp_path / "other", "qcow2", tag=66)
    built = image(size=SIZE, layout="-", backing="in/base")

    def exchange(*args: object) -> None:
        base.unlink()
        if how == "replaced":
            base.symlink_to(tmp_path / "other")
        elif how == "a FIFO":
            os.mkfifo(base)

    monkeypatch.setattr(BackingPolicy, "check_self_contained", exchange)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(QEDError, match="No such file" if how == "removed" else "being replaced"):
        qedcore.open_image(built.path, policy=ANY.configured("backing-dir", str(tmp_path / "in")))
    assert len(os.listdir("/proc/self/fd")) == before
    assert not helpers(tmp_path)


# Life and death of qemu-nbd


@pytest.mark.parametrize("daemon", [False, True], ids=["front", "daemon"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_qemu_nbd_ends_with_the_server(
    tmp_path: Path, image: Image, serve: Serve, daemon: bool, number: signal.Signals
) -> None:
    data = foreign(tmp_path / "base", "qcow2")
    built = image(size=SIZE, layout="-", backing="base")
    server = serve(built.path, daemon=daemon, **{"backing-format": "qcow2"})
    for _ in range(2):  # connections come and go: the first writable one opens the chain anew
        client = server.connect()
        assert_same(client.pread(MiB, 0), data[:MiB])
        client.pwrite(b"x" * 512, MiB)
        client.shutdown()
    assert len(helpers(tmp_path)) == 2  # for reading, and since the first client for writing
    server.send_signal(number)
    server.wait()
    no_helpers(tmp_path)


def test_qemu_nbd_that_dies_is_started_again(tmp_path: Path, image: Image) -> None:
    data = foreign(tmp_path / "base", "qcow2")
    built = image(size=SIZE, layout="-", backing="base")
    with qedcore.open_image(built.path, policy=ANY) as img:
        for n in range(3):
            (pid,) = helpers(tmp_path)
            os.kill(pid, signal.SIGKILL)
            assert_same(img.pread(MiB, n * 1000), data[n * 1000 :][:MiB])
        (pid,) = helpers(tmp_path)
        os.kill(pid, signal.SIGKILL)
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(StorageError, match="cannot reach .*base: .*No such file"):
            img.pread(512, 0)
        (tmp_path / "moved").rename(tmp_path / "base")
        assert_same(img.pread(MiB, 0), data[:MiB])
    no_helpers(tmp_path)


@pytest.mark.parametrize("what", ["truncated", "not that format"])
def test_failed_opens_leave_nothing(tmp_path: Path, image: Image, what: str) -> None:
    base = tmp_path / "base"
    foreign(base, "qcow2")
    base.write_bytes(base.read_bytes()[:100] if what == "truncated" else b"QFI\xfb\0\0\0\x09" + bytes(9999))
    built = image(size=SIZE, layout="-", backing="base")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StorageError, match=f"cannot open {base}: .*qcow2") as caught:
            qedcore.open_image(built.path, policy=ANY)
        assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not helpers(tmp_path)


def test_without_qemu_nbd(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "base", "qcow2")
    built = image(size=SIZE, layout="-", backing="base")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"/base needs qemu-nbd, which is not installed"):
        qedcore.open_image(built.path, policy=ANY)


def test_without_libnbd(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "base", "qcow2")
    built = image(size=SIZE, layout="-", backing="base")
    monkeypatch.setitem(sys.modules, "nbd", None)
    name = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "base")}})
    confined = image("confined.qed", size=SIZE, layout="-", backing=f"json:{name}")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsupportedError, match="python3-libnbd"):
        qedcore.open_image(built.path, policy=ANY)
    with pytest.raises(UnsupportedError, match="python3-libnbd"):
        qedcore.open_image(confined.path)
    with pytest.raises(UnsupportedError, match="python3-libnbd"):
        qedcore.open_image("nbd://localhost")
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_are_no_options(tmp_path: Path, image: Image) -> None:
    """What an image names is a name to qemu-nbd: it cannot make it do other things."""
    built = image(size=SIZE, layout="-", backing="--trace=x:,events=/dev/null")
    with pytest.raises(StorageError, match="Unknown protocol '--trace=x'"):
        qedcore.open_image(built.path, policy=ANY)


# NBD servers


@pytest.mark.parametrize("fmt", ["raw", "qed", "qcow2"])
def test_backing_file_on_a_server(tmp_path: Path, image: Image, serve: Serve, fmt: str) -> None:
    if fmt == "qed":
        base = image("base", size=SIZE, layout="DZ--D")
        data = base.read(0, SIZE)
    else:
        data = foreign(tmp_path / "base", fmt)
    with QemuNbd(tmp_path / "base", fmt="raw", args=["-r", "-x", "the export"]) as server:
        for name in (
            f"nbd+unix:///the%20export?socket={server.socket}",
            f"nbd:unix:{server.socket}:exportname=the export",
            json_name(server.socket, None if fmt == "raw" else fmt),
        ):
            built = image(size=SIZE, layout="-", backing=name)
            ours = serve(built.path, backing="any", **{"backing-format": "probe"})
            client = ours.connect()
            assert_same(client.pread(SIZE, 0), data)
            client.pwrite(b"x" * 512, 512)
            assert_same(client.pread(4096, 0), data[:512] + b"x" * 512 + data[1024:4096])
            client.shutdown()
            ours.stop()


def json_name(socket: Path, driver: str | None) -> str:
    options: dict[str, Any] = {
        "driver": "nbd",
        "server": {"type": "unix", "path": str(socket)},
        "export": "the export",
    }
    return f"json:{json.dumps({'driver': driver, 'file': options} if driver else options)}"


# The qed command


def qed(*args: str | os.PathLike[str], cwd: Path) -> Result:
    return run([sys.executable, "-m", "qedcore", *args], cwd=cwd, env={"PYTHONPATH": str(REPO)})


def qed_ok(*args: str | os.PathLike[str], cwd: Path) -> str:
    result = qed(*args, cwd=cwd)
    assert result.rc == 0, result.text
    return result.out


@pytest.fixture
def overlay(tmp_path: Path) -> tuple[Path, bytes]:
    """top.qed over base.qcow2, made by QEMU, and what it reads."""
    data = bytearray(foreign(tmp_path / "base.qcow2", "qcow2"))
    qemu.create(tmp_path / "top.qed", SIZE, backing="base.qcow2", backing_fmt="qcow2")
    qemu.qemu_io_ok(tmp_path / "top.qed", "write -q -P 9 100k 100k")
    data[100 * KiB : 200 * KiB] = b"\x09" * (100 * KiB)
    return tmp_path / "top.qed", bytes(data)


def test_convert_and_compare(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    path, data = overlay
    qed_ok("convert", "-O", "raw", path, "out.raw", cwd=tmp_path)
    assert_same((tmp_path / "out.raw").read_bytes(), data)
    assert "identical" in qed_ok("compare", path, "out.raw", cwd=tmp_path)
    shutil.copy(tmp_path / "out.raw", tmp_path / "other.raw")
    with (tmp_path / "other.raw").open("r+b") as f:
        f.seek(2 * MiB + 5)
        f.write(b"?")
    assert qed("compare", path, "other.raw", cwd=tmp_path).rc == 1
    qed_ok("convert", "-O", "qcow2", path, "out.qcow2", cwd=tmp_path)  # through nbdkit and our plugin
    qemu.to_raw(tmp_path / "out.qcow2", tmp_path / "out2.raw", "qcow2")
    assert_same((tmp_path / "out2.raw").read_bytes(), data)
    assert "identical" in qed_ok("compare", path, "out.qcow2", cwd=tmp_path)


def test_map_knows_the_holes(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    path, data = overlay
    runs = json.loads(qed_ok("map", "--output=json", path, cwd=tmp_path))
    theirs = json.loads(qemu.qemu_img_ok("map", "--output=json", path))
    assert sum(run["length"] for run in runs) == SIZE

    def zeros(found: list[dict[str, Any]]) -> list[tuple[int, int]]:
        return [(run["start"], run["length"]) for run in found if run["zero"]]

    assert zeros(runs) == zeros(theirs) == [(MiB, MiB), (3 * MiB, MiB)]
    assert {run["depth"] for run in runs} == {0, 1}


def test_info(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    text = qed_ok("info", "--backing-chain", overlay[0], cwd=tmp_path)
    assert "file format: qcow2" in text


def test_rebase(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    """Onto another qcow2 image, onto nothing, and back: the guest sees the same."""
    path, data = overlay
    foreign(tmp_path / "other.qcow2", "qcow2", tag=12)
    for name, fmt in (("other.qcow2", "qcow2"), ("", "raw"), ("base.qcow2", "qcow2")):
        qed_ok("rebase", "-b", name, *(["-F", fmt] if name else []), path, cwd=tmp_path)
        qemu.to_raw(path, tmp_path / "out.raw")
        assert_same((tmp_path / "out.raw").read_bytes(), data)


def test_create_over_qcow2(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    qed_ok("create", "-b", "base.qcow2", "-F", "qcow2", "new.qed", cwd=tmp_path)
    with qedcore.open_image(tmp_path / "new.qed", policy=ANY) as img:
        assert img.size == SIZE
        assert_same(img.pread(MiB, 0), stamp(77, 0, MiB))


def test_commit_into_qcow2_is_refused(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    path, data = overlay
    before = path.read_bytes(), (tmp_path / "base.qcow2").read_bytes()
    result = qed("commit", path, cwd=tmp_path)
    assert result.rc == 1 and result.err.count("\n") == 1, result.text
    assert "base.qcow2" in result.err
    assert (path.read_bytes(), (tmp_path / "base.qcow2").read_bytes()) == before


def test_commit_through_qed_over_qcow2(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    path, data = overlay
    qemu.create(tmp_path / "upper.qed", SIZE, backing="top.qed", backing_fmt="qed")
    qemu.qemu_io_ok(tmp_path / "upper.qed", "write -q -P 5 1M 1000k")
    data = data[:MiB] + b"\5" * 1000 * KiB + data[MiB + 1000 * KiB :]
    qed_ok("commit", "upper.qed", cwd=tmp_path)
    qemu.to_raw(path, tmp_path / "out.raw")
    assert_same((tmp_path / "out.raw").read_bytes(), data)


def test_check_opens_no_backing_file(tmp_path: Path, overlay: tuple[Path, bytes]) -> None:
    (tmp_path / "base.qcow2").unlink()
    assert qed("check", overlay[0], cwd=tmp_path).rc == 0
    with pytest.raises(QEDError):
        qedcore.open_image(overlay[0], policy=ANY)


def test_map_through_other_formats(image: Image, tmp_path: Path) -> None:
    """The places are those in the files of the other format, and names are as they were given."""
    os.mkdir(tmp_path / "sub")
    lowest, below = tmp_path / "lowest.qcow2", tmp_path / "sub" / "below.qcow2"
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", lowest, "4M")
    qemu.qemu_io_ok(lowest, "write -q -P 3 2M 64k", fmt="qcow2")
    qemu.qemu_img_ok("create", "-q", "-f", "qcow2", "-b", "../lowest.qcow2", "-F", "qcow2", below)
    qemu.qemu_io_ok(below, "write -q -P 7 1M 64k", "write -q -P 8 0 64k", "write -q -z 3M 64k", fmt="qcow2")
    image("top.qed", size=5 * MiB, layout={24: "data", 30: "zero"}, backing="sub/below.qcow2")
    for name in ("top.qed", tmp_path / "top.qed"):
        for options in ((), ("--output=json",), ("--output=json", "-s", "1M", "-l", "100k")):
            line = ["map", *options, name]
            expected, found = qemu.qemu_img(*line, cwd=tmp_path), qed(*line, cwd=tmp_path)
            assert (found.rc, found.out) == (expected.rc, expected.out)


def test_map_of_what_has_no_place(image: Image, tmp_path: Path) -> None:
    """Compressed clusters."""
    (tmp_path / "data").write_bytes(stamp(1, 0, MiB))
    qemu.qemu_img_ok("convert", "-c", "-O", "qcow2", tmp_path / "data", tmp_path / "below.qcow2")
    image("top.qed", size=MiB, backing="below.qcow2")
    for options in ((), ("--output=json",)):
        line = ["map", *options, "top.qed"]
        expected, found = qemu.qemu_img(*line, cwd=tmp_path), qed(*line, cwd=tmp_path)
        assert (found.rc, found.out) == (expected.rc, expected.out)
        assert found.err == expected.err.replace("qemu-img: ", "qed: ")
