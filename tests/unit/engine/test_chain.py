"""Opening images with everything under them: probing, names, loops, depth, and nothing left open after errors."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import F_NEED_CHECK, Built, QedFile

import qedcore
from qedcore.backing.foreign import FOREIGN_FORMATS
from qedcore.backing.names import BackingName, parse_name, resolve
from qedcore.backing.policy import BackingPolicy
from qedcore.backing.probe import probe
from qedcore.errors import QEDError, RequestError, StorageError, UnsupportedError
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.open import open_storage
from unit.fakes import CHANGES, FailAt, MemoryStorage, Tap, extents, open_fds

Image = Callable[..., Built]
CS = 64 * KiB

# First bytes (at offset) -> format.  Written from the formats' own documents, not from the engine's table.
MAGICS: dict[str, tuple[int, bytes, str]] = {
    "qed": (0, b"QED\0", "qed"),
    "qcow2": (0, b"QFI\xfb\0\0\0\3", "qcow2"),
    "qcow": (0, b"QFI\xfb\0\0\0\1", "qcow"),
    "vmdk sparse": (0, b"KDMV", "vmdk"),
    "vmdk ESX": (0, b"COWD", "vmdk"),
    "vmdk descriptor": (0, b"# Disk DescriptorFile\n", "vmdk"),
    "vhdx": (0, b"vhdxfile", "vhdx"),
    "vpc": (0, b"conectix", "vpc"),
    "luks": (0, b"LUKS\xba\xbe\0\2", "luks"),
    "parallels": (0, b"WithoutFreeSpace", "parallels"),
    "parallels ext": (0, b"WithouFreSpacExt", "parallels"),
    "vdi": (64, b"\x7f\x10\xda\xbe", "vdi"),
    "zeros": (0, bytes(16), "raw"),
    "nothing": (0, b"", "raw"),
    "boot sector": (510, b"\x55\xaa", "raw"),
    "QED without its NUL": (0, b"QED1", "raw"),
    "short QED": (0, b"QE", "raw"),
    "magic elsewhere": (1, b"QED\0QFI\xfb", "raw"),
    "vdi magic elsewhere": (0, b"\x7f\x10\xda\xbe", "raw"),
}


@pytest.mark.parametrize("name", MAGICS)
@pytest.mark.parametrize("size", [0, 600])
def test_probe(name: str, size: int) -> None:
    at, magic, want = MAGICS[name]
    data = bytearray(max(size, at + len(magic)))
    data[at : at + len(magic)] = magic
    assert probe(MemoryStorage(bytes(data))) == want


# (name, overlay) -> path, or what is wrong
RESOLVED = {
    ("base.raw", "top.qed"): "base.raw",
    ("base.raw", "dir/top.qed"): "dir/base.raw",
    ("base.raw", "/a/b/top.qed"): "/a/b/base.raw",
    ("sub/base.raw", "/a/top.qed"): "/a/sub/base.raw",
    ("../base.raw", "/a/b/top.qed"): "/a/b/../base.raw",
    ("/x/base.raw", "/a/top.qed"): "/x/base.raw",
    ("/x/a:b", "/a/top.qed"): "/x/a:b",
    ("./a:b", "/d/top.qed"): "/d/./a:b",  # how a name with a colon is written
    ("file:base.raw", "/a/top.qed"): "/a/base.raw",
    ("file:/x/base.raw", "/a/top.qed"): "/x/base.raw",
    ("file:a:b", "/a/top.qed"): "/a/a:b",
}
NOT_PATHS = (
    "nbd://localhost/x", "nbd:localhost:10809", "json:{\"driver\": \"qed\"}", "http://x/y", "https:x", "rbd:pool/x",
    "fat:rw:/tmp", "a:b", ":x", "c:\\disk.raw", "FILE:x", "nbd+unix:///?socket=/s",
)  # fmt: skip


@pytest.mark.parametrize(("name", "overlay"), RESOLVED)
def test_resolve(name: str, overlay: str) -> None:
    assert resolve(name, overlay) == RESOLVED[name, overlay]


@pytest.mark.parametrize("name", NOT_PATHS)
def test_names_that_are_not_paths(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve(name, "/a/top.qed")
    assert caught.value.errno == errno.ENOTSUP
    assert "/a/top.qed" in str(caught.value) and "nbdkit" in str(caught.value)


# What names mean.  Overlay: /a/top.qed
PARSED: dict[str, BackingName] = {
    "base": BackingName(path="/a/base"),
    "file:b:c": BackingName(path="/a/b:c"),
    "nbd://h/x": BackingName(uri="nbd://h/x"),
    "nbds://h/x": BackingName(uri="nbds://h/x"),
    "nbd+unix:///x?socket=/s": BackingName(uri="nbd+unix:///x?socket=/s"),
    "nbd:host:10809": BackingName(uri="nbd://host:10809/"),
    "nbd:[::1]:5:exportname=a b": BackingName(uri="nbd://[::1]:5/a%20b"),
    "nbd:unix:/run/s:exportname=x?y": BackingName(uri="nbd+unix:///x%3Fy?socket=/run/s"),
    "http://h/x": BackingName(words="http://h/x"),
    "rbd:pool/x": BackingName(words="rbd:pool/x"),
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"/x/b"}}': BackingName(path="/x/b", format="qcow2"),
    "json:{'driver':'qed','file.filename':'b:c'}": BackingName(path="/a/./b:c", format="qed"),
    'json:{"driver":"file","filename":"/x"}': BackingName(path="/x", format="raw"),
    'json:{"file":{"filename":"/x","locking":"off"},"node-name":"n"}': BackingName(path="/x"),
    'json:{"driver":"raw","offset":512,"size":"1024","file.filename":"/x"}': BackingName(
        path="/x", format="raw", offset=512, size=1024
    ),
    'json:{"driver":"nbd","host":"h","port":"5","export":"e"}': BackingName(uri="nbd://h:5/e", format="raw"),
    'json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"inet","host":"::1","port":"5"}}}': BackingName(
        uri="nbd://[::1]:5/", format="raw"
    ),
    'json:{"driver":"nbd","server.type":"unix","server.path":"/s","export":"e"}': BackingName(
        uri="nbd+unix:///e?socket=/s", format="raw"
    ),
}  # fmt: skip
ONLY_QEMU: dict[str, str | None] = {
    'json:{"driver":"nbd","host":"h","tls-creds":"t"}': "raw",
    'json:{"driver":"qcow2","file":{"driver":"nbd","host":"h"}}': "qcow2",
    'json:{"driver":"qcow2","backing":{"driver":"null-co"},"file.filename":"/x"}': "qcow2",
    'json:{"file.driver":"https","file.url":"x"}': None,
    'json:{"driver":"raw","offset":"x","file.filename":"/x"}': "raw",
}
NO_NAMES = (
    "json:{",
    'json:{"driver": "qed"}',
    "json:{'driver':'qed','file.filename':'x','y':'z'}",
    "json:" + "[" * 99999,
    r'json:{"driver":"raw","file.filename":"/x\u0000y"}',
    r'json:{"driver":"raw","file.filename":"/x\ud800"}',
    r'json:{"driver":"nbd","host":"h\u0000"}',
    r'json:{"driver":"nbd","host":"h\ud800"}',
    os.fsdecode(b"nbd://h/\xff"),
)


@pytest.mark.parametrize("name", PARSED)
def test_names(name: str) -> None:
    assert parse_name(name, "/a/top.qed") == PARSED[name]


@pytest.mark.parametrize("name", ONLY_QEMU)
def test_names_for_qemu(name: str) -> None:
    assert parse_name(name, "/a/top.qed") == BackingName(words=name, format=ONLY_QEMU[name])


@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
def test_names_without_meaning(name: str) -> None:
    with pytest.raises(UnsupportedError, match="/a/top.qed"):
        parse_name(name, "/a/top.qed")


@pytest.mark.parametrize("name", ["base", "./base", "file:base"])
def test_relative_names_on_a_server(name: str) -> None:
    with pytest.raises(UnsupportedError, match="relative"):
        parse_name(name, "nbd://host/dir/x")
    assert parse_name("/abs", "nbd://host/dir/x").path == "/abs"


# What is allowed


def test_backing_none(image: Image, tmp_path: Path) -> None:
    """Refused, not served alone: that would read zeros where there is data."""
    raw(tmp_path / "base.raw")
    built = image(backing="base.raw", no_probe=True)
    nothing = BackingPolicy(follow="none")
    with pytest.raises(UnsupportedError, match="'base.raw'.*backing=none"):
        qedcore.open_image(built.path, policy=nothing)
    with qedcore.open_image(image("alone.qed").path, policy=nothing) as img:
        assert img.backing is None


def confined(path: Path) -> BackingPolicy:
    return BackingPolicy().configured("backing-dir", str(path))


# name in the image -> may it be opened when only `tmp_path/in` is allowed?
INSIDE = {
    "in/base": True,
    "./in/../in/base": True,
    "{tmp}/in/base": True,
    "link-in": True,
    "file:in/base": True,
    'json:{{"driver":"raw","file":{{"filename":"{tmp}/in/base"}}}}': True,
    "out/base": False,
    "in/../out/base": False,
    "{tmp}/out/base": False,
    "/etc/passwd": False,
    "in/link-out": False,
    "in/dir-out/base": False,
    "in2/base": False,
    "in/up/out/base": False,
    "nbd://localhost": False,
    "nbd+unix:///?socket={tmp}/in/s": False,
    "fat:{tmp}/in": False,
    'json:{{"driver":"raw","file":{{"filename":"{tmp}/out/base"}}}}': False,
}


@pytest.mark.parametrize("follow", ["files", "any"])
@pytest.mark.parametrize("name", INSIDE)
def test_backing_dir(image: Image, tmp_path: Path, name: str, follow: str) -> None:
    for directory in ("in", "out", "in2"):
        (tmp_path / directory).mkdir()
        raw(tmp_path / directory / "base")
    (tmp_path / "link-in").symlink_to("in/base")
    (tmp_path / "in" / "link-out").symlink_to("../out/base")
    (tmp_path / "in" / "dir-out").symlink_to("../out")
    (tmp_path / "in" / "up").symlink_to("..")
    built = image(backing=name.format(tmp=tmp_path), no_probe=True)
    opened: list[str] = []

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        opened.append(path)
        return open_storage(path, writable, mode)

    policy = confined(tmp_path / "in").configured("backing", follow)
    before = open_fds()
    if INSIDE[name]:
        with qedcore.open_image(built.path, policy=policy, opener=opener) as img:
            assert_same(img.pread(CS, 0), stamp(9, 0, CS))
        assert opened[1] == f"{tmp_path}/in/base"  # by its real path: no link that may change
    else:
        with pytest.raises(UnsupportedError, match="backing-dir"):
            qedcore.open_image(built.path, policy=policy, opener=opener)
        assert len(opened) == 1  # not even opened
    assert open_fds() == before


def test_backing_dir_confines_the_whole_chain(image: Image, tmp_path: Path) -> None:
    """A guest may have disguised its raw disk as QED, naming any file."""
    (tmp_path / "in").mkdir()
    raw(tmp_path / "secret")
    image("in/base", backing="../secret", no_probe=True)
    built = image(backing="in/base")
    with pytest.raises(UnsupportedError, match="'../secret' .*backing-dir"):
        qedcore.open_image(built.path, policy=confined(tmp_path / "in"))


def test_backing_dir_takes_several_and_files(image: Image, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    raw(tmp_path / "base.raw")
    built = image(backing="base.raw", no_probe=True)
    policy = BackingPolicy().configured("backing-dir", f"{tmp_path}/a:{tmp_path}/base.raw")
    qedcore.open_image(built.path, policy=policy).close()
    with pytest.raises(UnsupportedError):
        qedcore.open_image(built.path, policy=confined(tmp_path / "a"))


@pytest.mark.parametrize("trick", ["directory", "file"])
def test_file_that_is_exchanged_while_it_is_opened(image: Image, tmp_path: Path, trick: str) -> None:
    """Between the look at the path and the open, somebody puts a link in its place, and takes it back."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    raw(tmp_path / "in" / "sub" / "base")
    raw(tmp_path / "out" / "base")
    built = image(backing="in/sub/base", no_probe=True)
    place = tmp_path / "in" / "sub" if trick == "directory" else tmp_path / "in" / "sub" / "base"
    target = tmp_path / "out" if trick == "directory" else tmp_path / "out" / "base"

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        if path.endswith(".qed"):
            return open_storage(path, writable, mode)
        place.rename(tmp_path / "kept")
        place.symlink_to(target)
        try:
            return open_storage(path, writable, mode)
        finally:
            place.unlink()
            (tmp_path / "kept").rename(place)

    before = open_fds()
    with pytest.raises(UnsupportedError, match="being replaced"):
        qedcore.open_image(built.path, policy=confined(tmp_path / "in"), opener=opener)
    assert open_fds() == before


def test_special_files_are_not_opened(image: Image, tmp_path: Path) -> None:
    """Opening a device can have effects; whatever the operator allows."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "/dev/null", "."):
        built = image(backing=name, no_probe=True)
        opened: list[str] = []

        def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
            opened.append(path)  # noqa: B023
            return open_storage(path, writable, mode)

        for policy in (BackingPolicy(), BackingPolicy(follow="any"), confined(Path("/"))):
            with pytest.raises(StorageError, match="not a file or block device"):
                qedcore.open_image(built.path, policy=policy, opener=opener)
        assert opened == [str(built.path)] * 3


def test_block_devices_need_permission(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stands for a device: making a real one takes root."""
    base = raw(tmp_path / "base")
    built = image(backing="base", no_probe=True)
    monkeypatch.setattr("qedcore.backing.policy.stat.S_ISBLK", lambda mode: mode == base.stat().st_mode)
    with pytest.raises(UnsupportedError, match=f"block device: .*backing=any, or backing-dir={base}"):
        qedcore.open_image(built.path)
    for policy in (BackingPolicy(follow="any"), confined(base), confined(tmp_path)):
        qedcore.open_image(built.path, policy=policy).close()


@pytest.mark.parametrize("name", ["nbd://localhost", "nbd:localhost:1", "http://h/x", "nbd+unix:///?socket=/s"])
def test_servers_need_permission(image: Image, name: str) -> None:
    with pytest.raises(UnsupportedError, match="not a local file: .*backing=any"):
        qedcore.open_image(image(backing=name).path)


WRONG_PARAMETERS = [
    ("backing", "follow"), ("backing", ""), ("backing-format", "luks"), ("backing-format", ""), ("backing-dir", ""),
    ("backing-dir", ":"), ("backing-dir", "/no/such/directory"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_PARAMETERS)
def test_wrong_parameters(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"{name}="):
        BackingPolicy().configured(name, value)


def test_part_of_a_raw_file(image: Image, tmp_path: Path) -> None:
    base = raw(tmp_path / "base", 3 * CS).read_bytes()
    options = {"driver": "raw", "offset": 1000, "size": CS + 5, "file": {"driver": "file", "filename": "base"}}
    with qedcore.open_image(image(backing=f"json:{json.dumps(options)}").path, writable=False) as img:
        assert_same(img.pread(2 * CS, 0), base[1000 : 1000 + CS + 5] + bytes(CS - 5))
        assert_same(img.pread(100, 50), base[1050:1150])
    del options["size"]
    with qedcore.open_image(image(backing=f"json:{json.dumps(options)}").path, writable=False) as img:
        assert_same(img.pread(3 * CS, 0), base[1000:] + bytes(1000))
    for wrong in ({"offset": 3 * CS + 1}, {"offset": 0, "size": 3 * CS + 1}, {"offset": -1}, {"size": -1}):
        built = image(backing=f"json:{json.dumps({**options, **wrong})}")
        with pytest.raises(UnsupportedError, match=f"has {3 * CS} bytes"):
            qedcore.open_image(built.path)


def test_named_format_is_not_probed(image: Image, tmp_path: Path) -> None:
    """json: says raw, whatever the first bytes say; and a name that says QED is believed, too."""
    base = image("base", layout="D")
    name = 'json:{"driver":"%s","file":{"driver":"file","filename":"base"}}'
    with qedcore.open_image(image(backing=name % "raw").path, writable=False) as img:
        assert_same(img.pread(CS, 0), base.path.read_bytes()[:CS])
    with qedcore.open_image(image(backing=name % "qed").path, writable=False) as img:
        assert_same(img.pread(CS, 0), stamp(1, 0, CS))
    # NO_PROBE is stronger, as in QEMU, where it becomes the driver
    with qedcore.open_image(image(backing=name % "qed", no_probe=True).path, writable=False) as img:
        assert_same(img.pread(CS, 0), base.path.read_bytes()[:CS])


# Backing formats


def raw(path: Path, size: int = MiB, start: bytes = b"") -> Path:
    path.write_bytes(start + stamp(9, 0, size)[len(start) :])
    return path


@pytest.mark.parametrize("name", MAGICS)
def test_probed_backing_file(image: Image, tmp_path: Path, name: str) -> None:
    """Raw is served; what looks like another format is refused, with the parameter that decides."""
    at, magic, want = MAGICS[name]
    if want == "qed":
        image("base", layout="D")
    else:
        base = raw(tmp_path / "base")
        with base.open("r+b") as f:
            f.seek(at)
            f.write(magic)
    built = image(backing="base")
    if want in ("raw", "qed"):
        with qedcore.open_image(built.path, writable=False) as img:
            expected = (tmp_path / "base").read_bytes() if want == "raw" else stamp(1, 0, CS)
            assert_same(img.pread(CS, 0), expected[:CS])
        return
    before = open_fds()
    with pytest.raises(UnsupportedError, match=f"{tmp_path}/base, .* looks like a {want} image") as caught:
        qedcore.open_image(built.path)
    assert caught.value.errno == errno.ENOTSUP
    assert "backing-format=raw if" in str(caught.value)
    assert (f"backing-format={want} if" in str(caught.value)) == (want in FOREIGN_FORMATS)
    assert open_fds() == before
    with qedcore.open_image(built.path, writable=False, policy=BackingPolicy(format="raw")) as img:
        assert_same(img.pread(CS, 0), (tmp_path / "base").read_bytes()[:CS])


@pytest.mark.parametrize("name", [name for name, row in MAGICS.items() if row[2] != "raw"])
def test_no_probe_means_raw(image: Image, tmp_path: Path, name: str) -> None:
    """A guest can write any magic into the first sector of its raw disk."""
    at, magic, _ = MAGICS[name]
    base = raw(tmp_path / "base")
    with base.open("r+b") as f:
        f.seek(at)
        f.write(magic)
    built = image(backing="base", no_probe=True)
    with qedcore.open_image(built.path, writable=False) as img:
        assert_same(img.pread(MiB, 0), base.read_bytes())


def test_top_image_is_not_probed(tmp_path: Path) -> None:
    with pytest.raises(QEDError, match="not in QED format"):
        qedcore.open_image(raw(tmp_path / "x.raw"))


# Layers: what is read through several files


def test_layers(image: Image, tmp_path: Path) -> None:
    """Each layer gives what it has; zero clusters hide what is below; lower files may be shorter."""
    base = raw(tmp_path / "base.raw", 5 * CS + 100)
    low = image("low.qed", layout="-DZ--- ", backing="base.raw", no_probe=True, tag=2, size=6 * CS)
    top = image("top.qed", layout="--- ZD--", backing="low.qed", tag=3, size=8 * CS)
    want = bytearray(8 * CS)
    want[: 5 * CS + 100] = base.read_bytes()
    want[CS : 2 * CS] = stamp(2, CS, CS)
    want[2 * CS : 3 * CS] = bytes(CS)
    want[4 * CS : 5 * CS] = bytes(CS)
    want[5 * CS : 6 * CS] = stamp(3, 5 * CS, CS)
    with qedcore.open_image(top.path, writable=False) as img:
        assert_same(img.pread(8 * CS, 0), bytes(want))
        for pos in (0, CS - 1, 5 * CS - 1, 6 * CS - 1):
            assert_same(img.pread(2 * CS, pos), bytes(want[pos : pos + 2 * CS]), pos)
        kinds = extents(img, 0, 8 * CS)
    assert kinds == [(2 * CS, "FOUND"), (CS, "ZERO"), (CS, "FOUND"), (CS, "ZERO"), (CS, "FOUND"), (2 * CS, "ZERO")]
    with QedFile(low.path) as oracle:
        assert_same(bytes(want[:CS]), oracle.read(0, CS))


def test_lower_images_are_opened_read_only(image: Image, tmp_path: Path) -> None:
    opened: list[tuple[str, bool]] = []

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        opened.append((os.path.basename(path), writable))
        return open_storage(path, writable, mode)

    raw(tmp_path / "base.raw")
    low = image("low.qed", layout="D-", backing="base.raw", features=F_NEED_CHECK, leaks=1)
    top = image("top.qed", backing="low.qed")
    before = low.path.read_bytes()
    for writable in (True, False):
        opened.clear()
        with qedcore.open_image(top.path, writable, opener=opener) as img:
            if writable:
                img.pwrite(b"x" * 1000, 500)
        assert opened == [("top.qed", writable), ("low.qed", False), ("base.raw", False)]
    assert low.path.read_bytes() == before  # a dirty one is not repaired behind its back


def test_name_may_be_a_symlink(image: Image, tmp_path: Path) -> None:
    """Relative names start from the directory of the name that was opened, as in QEMU."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    raw(tmp_path / "b" / "base.raw")
    image("a/top.qed", backing="base.raw")
    (tmp_path / "b" / "link.qed").symlink_to("../a/top.qed")
    with qedcore.open_image(tmp_path / "b" / "link.qed", writable=False) as img:
        assert_same(img.pread(CS, 0), stamp(9, 0, CS))
    with pytest.raises(StorageError) as caught:
        qedcore.open_image(tmp_path / "a" / "top.qed")
    assert caught.value.errno == errno.ENOENT


def test_without_following(image: Image) -> None:
    built = image(backing="gone.raw")
    with qedcore.open_image(built.path, writable=False, follow=False) as img:
        assert img.backing_name == "gone.raw"
    with pytest.raises(ValueError):
        qedcore.open_image(built.path, writable=True, follow=False)


def make_self(image: Image, tmp_path: Path) -> Path:
    return image("a.qed", backing="a.qed").path


def make_two(image: Image, tmp_path: Path) -> Path:
    image("b.qed", backing="a.qed")
    return image("a.qed", backing="b.qed").path


def make_long(image: Image, tmp_path: Path) -> Path:
    for i in range(10):
        image(f"{i}.qed", backing=f"{(i + 1) % 10 or 3}.qed")
    return tmp_path / "0.qed"


def make_symlink(image: Image, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to("a.qed")
    return image("a.qed", backing="link").path


def make_hard_link(image: Image, tmp_path: Path) -> Path:
    path = image("a.qed", backing="sub/b.qed").path
    (tmp_path / "sub").mkdir()
    os.link(path, tmp_path / "sub" / "b.qed")
    return path


def make_raw_loop(image: Image, tmp_path: Path) -> Path:
    """Read as raw there would be no endless loop, but writes would change what is below."""
    return image("a.qed", backing="a.qed", no_probe=True).path


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize(
    "make", [make_self, make_two, make_long, make_symlink, make_hard_link, make_raw_loop], ids=lambda f: f.__name__
)
def test_loops(image: Image, tmp_path: Path, make: Callable[[Image, Path], Path], writable: bool) -> None:
    path = make(image, tmp_path)
    before = open_fds()
    with pytest.raises(UnsupportedError, match="form a loop") as caught:
        qedcore.open_image(path, writable)
    assert "\n" not in str(caught.value)
    assert open_fds() == before


@pytest.mark.parametrize("depth", [60])
def test_deep_chain(image: Image, tmp_path: Path, depth: int) -> None:
    """Every layer owns one cluster; the lowest is read through all of the others."""
    raw(tmp_path / "base.raw", (depth + 1) * 4096)
    name = "base.raw"
    for i in range(depth):
        layout = {i: "data"}
        spec = {"cluster_size": 4096, "table_size": 1, "size": MiB, "tag": i + 1, "layout": layout}
        image(f"{i}.qed", backing=name, **spec)
        name = f"{i}.qed"
    before = open_fds()
    with qedcore.open_image(tmp_path / name) as img:
        assert open_fds() == before + depth + 1
        want = b"".join(stamp(i + 1, i * 4096, 4096) for i in range(depth)) + stamp(9, depth * 4096, 4096)
        assert_same(img.pread(len(want), 0), want)
        assert extents(img, 0, MiB) == [(len(want), "FOUND"), (MiB - len(want), "ZERO")]
        img.pwrite(b"new", depth * 4096 + 100)
        want = want[: depth * 4096 + 100] + b"new" + want[depth * 4096 + 103 :]
        assert_same(img.pread(len(want), 0), want)
    assert open_fds() == before


def test_broken_layer(image: Image, tmp_path: Path) -> None:
    """The message names the file."""
    image("low.qed", header={"table_size": 3})
    top = image("top.qed", backing="low.qed")
    with pytest.raises(QEDError, match="low.qed: QED table size is invalid") as caught:
        qedcore.open_image(top.path)
    assert caught.value.errno == errno.EINVAL


# Descriptors after errors

BROKEN: dict[str, dict[str, Any]] = {
    "missing": {"backing": "gone"},
    "directory": {"backing": "."},
    "not a path": {"backing": "nbd://localhost"},
    "bad header": {"header": {"cluster_size": 5}},
    "bad table": {"header": {"l1_table_offset": 12345}},
    "unknown feature": {"features": 8},
    "bad name": {"features": 1, "header": {"backing_filename_offset": CS, "backing_filename_size": 9}},
}


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("name", BROKEN)
def test_descriptors_after_errors(image: Image, tmp_path: Path, name: str, layers: int) -> None:
    image("0.qed", layout="D", **BROKEN[name])
    for i in range(layers):
        image(f"{i + 1}.qed", backing=f"{i}.qed")
    before = open_fds()
    with pytest.raises(QEDError):
        qedcore.open_image(tmp_path / f"{layers}.qed")
    assert open_fds() == before


def test_out_of_descriptors(image: Image, tmp_path: Path) -> None:
    image("0.qed")
    for i in range(1, 6):
        image(f"{i}.qed", backing=f"{i - 1}.qed")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest + 3, limits[0]), limits[1]))
        with pytest.raises(StorageError) as caught:
            for _ in range(highest):  # gaps below the highest are filled first
                opened.append(qedcore.open_image(tmp_path / "5.qed", writable=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert open_fds() == before + 6 * len(opened)
    for img in opened:
        img.close()
    assert open_fds() == before


@pytest.mark.parametrize("bottom", ["raw", "qed"])
def test_every_failure_of_an_open_closes_everything(image: Image, tmp_path: Path, bottom: str) -> None:
    """Three files, the top one to be repaired; the n-th call of any storage fails, for every n."""
    raw(tmp_path / "0") if bottom == "raw" else image("0", layout="D")
    image("1.qed", layout="-D", backing="0")
    spec: dict[str, Any] = {"features": F_NEED_CHECK, "leaks": 1, "entries": {3: lambda b: b.end + CS}}
    top = image("2.qed", layout="D", backing="1.qed", autoclear_features=1, **spec)
    original = top.path.read_bytes()
    leaked = []
    for n in range(1, 200):
        top.path.write_bytes(original)
        fault = FailAt(n, [*CHANGES, "pread", "size"], errno.ENOMEM)
        taps: list[Tap] = []

        def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
            taps.append(Tap(open_storage(path, writable, mode), fault))  # noqa: B023
            return taps[-1]  # noqa: B023

        try:
            img = qedcore.open_image(top.path, opener=opener)
        except StorageError as error:
            assert error.errno == errno.ENOMEM
            leaked += [(n, fault.hit, os.path.basename(tap.name)) for tap in taps if not tap.closed]
            for tap in taps:
                tap.inner.close()
        else:
            fault.armed = False
            img.close()
            assert all(tap.closed for tap in taps)
            break
    assert n > 15
    assert not leaked
