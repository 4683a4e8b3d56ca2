"""What the names of backing files mean."""

from __future__ import annotations

import errno
import os

import pytest

from qedcore.backing.names import BackingName, parse_name, resolve
from qedcore.errors import UnsupportedError

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
    'json:{"driver":"qed","file":{"driver":"blkdebug","image":{"driver":"file","filename":"x"}}}': "qed",
    "json:{'driver':'qed','file.filename':'x','y':'z'}": "qed",
}


NO_NAMES = (
    "json:{",
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
