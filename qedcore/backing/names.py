"""What a backing file's name means, and whether it may be opened: the names come out of images, which may be hostile.

A name is a path, file:PATH, the URI of an NBD server (also nbd:HOST:PORT and nbd:unix:PATH), or json:{...} as QEMU
writes it, for any of these with the format, and for a part of a raw file.  Everything else is for QEMU to open.

What is opened (`follow`):
    none      nothing: an image that needs a backing file is refused.  Served alone it would read zeros where there
              is data, and hide that for good with the first write to a cluster.
    files     regular files (the default).  What a name leads to is the choice of whoever wrote the image,
              so this is for images whose origin is trusted.
    any       block devices, NBD servers, and what only QEMU can open, too (the `qed` command, as in qemu-img)
With `dirs`, only what is in these directories, after resolving symbolic links; no servers.

Which format it has:
    the image says that it is raw (NO_PROBE): raw, always.  It is never probed.
    the image names it, by json:{"driver": ...}: that one; but then it may not refer to other files, unless `format`
        or `follow` says so.  Through a format that the operator has named, QEMU opens what the image there names.
    neither: the header has no room for other names.  By `format`:
        None      the first bytes decide between QED and raw; what looks like any other format is refused
        "raw"     raw
        "probe"   the first bytes decide between all formats, as in QEMU
        another   QED if it looks so, else that one
Guessing is a risk.  If the backing file is really raw, then whoever could write to its first sector, such as a guest
that once had it as its disk, chooses what it looks like.  With a header in another format that would start QEMU on
names of the writer's choice, hence the refusal.  A QED header can name any file as well; chains of QED images without
NO_PROBE are too common to refuse, and `dirs` confines them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Any, NamedTuple

from ..errors import RequestError, StorageError, UnsupportedError
from ..storage import Storage
from ..storage.open import is_uri

# Formats that QEMU reads without a secret, besides raw and QED.
FOREIGN_FORMATS = ("bochs", "cloop", "dmg", "parallels", "qcow", "qcow2", "vdi", "vhdx", "vmdk", "vpc")

_PROBE_BYTES = 512

# (offset of the magic in the file, magic, name), for formats that must not be mistaken for raw.
_MAGICS = (
    (0, b"QED\0", "qed"),
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)


def probe(storage: Storage) -> str:
    """The format of a file by its first bytes: "qed", "raw" or another format's name."""
    data = bytearray(_PROBE_BYTES)
    storage.pread_into(data, 0)
    for offset, magic, name in _MAGICS:
        if data[offset : offset + len(magic)] == magic:
            return name
    return "raw"


# -- names ----------------------------------------------------------------------------------------------


class BackingName(NamedTuple):
    """What a name means.  One of path, uri and words is set."""

    path: str | None = None  # of a file
    uri: str | None = None  # of an NBD export
    words: str | None = None  # for QEMU, which alone can open it
    format: str | None = None  # as the name says
    offset: int = 0  # bytes: of a raw image in the file
    size: int | None = None  # bytes: of a raw image in the file; None: to its end


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"file": {"filename": X}} as {"file.filename": X}."""
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {
        key: value
        for name, part in tree.items()
        for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def json_options(text: str) -> dict[str, str]:
    """The options in JSON as QEMU takes it, by their dotted names; strings may be in single quotes.

    Raises ValueError.
    """
    import json

    def double_quoted(match: re.Match[str]) -> str:
        if match[0][0] == '"':
            return match[0]
        return json.dumps(match[0][1:-1].replace("\\'", "'"))

    try:
        options = _flat(json.loads(re.sub(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", double_quoted, text)))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    for value in options.values():
        if b"\0" in os.fsencode(value):  # also a ValueError for half a surrogate pair: no file is called so
            raise ValueError("NUL in a string")
    return options


# nbd:HOST:PORT[:exportname=NAME] and nbd:unix:PATH[:exportname=NAME]
_OLD_NBD = r"nbd:(?:unix:(?P<socket>[^:]*)|(?P<server>\[.*?\]:\d+|[^:]*:\d+))(?::exportname=(.*))?"


def resolve(name: str, overlay: str) -> str:
    """The path of the backing file called `name` in the image at path `overlay`.

    Relative names start from the overlay's directory.  Raises UnsupportedError for names that are not paths.
    """
    if re.match(r"[^/]*:", name):
        protocol, _, rest = name.partition(":")
        if protocol != "file":
            raise UnsupportedError(
                f"backing file {name!r} of {overlay} is not a local file: serve it with nbdkit or qemu-nbd, "
                f"copy it to a raw file, and rebase onto that"
            )
        name = rest
    if is_uri(overlay) and not os.path.isabs(name):
        raise UnsupportedError(f"backing file {name!r} of {overlay}: a relative name means nothing on a server")
    return os.path.join(os.path.dirname(overlay), name)


def parse_name(name: str, overlay: str) -> BackingName:
    """What the name of a backing file in the image at `overlay` means.  Raises UnsupportedError."""
    where = _parse(name, overlay)
    try:
        text = os.fsencode(where.path or "") + (where.uri or "").encode()
    except UnicodeEncodeError:
        text = b"\0"
    if b"\0" in text:  # JSON can say what no system call takes
        raise UnsupportedError(f"backing file {name!r} of {overlay}: not the name of anything")
    return where


def _parse(name: str, overlay: str) -> BackingName:
    if name.startswith("json:"):
        try:
            options = json_options(name[len("json:") :])
        except ValueError as error:
            raise UnsupportedError(f"backing file {name!r} of {overlay}: cannot parse the JSON: {error}") from None
        return from_options(options, name, overlay)
    if is_uri(name):
        return BackingName(uri=name)
    match = re.fullmatch(_OLD_NBD, name)
    if match is not None:
        return BackingName(uri=_uri(match["server"], match["socket"], match[3] or ""))
    if re.match(r"(?!file:)[^/]*:", name):
        return BackingName(words=name)
    return BackingName(path=resolve(name, overlay))


def _uri(server: str | None, socket: str | None, export: str) -> str:
    from urllib.parse import quote

    export = quote(export)
    if socket is not None:
        return f"nbd+unix:///{export}?socket={quote(socket)}"
    return f"nbd://{server}/{export}"


# Options that change nothing here.
_HARMLESS = frozenset("node-name read-only auto-read-only locking aio discard detect-zeroes force-share".split())


def from_options(options: dict[str, str], name: str, overlay: str) -> BackingName:
    """What json:{...} means: {format driver} over {protocol driver}, or the latter alone."""
    options = {
        key: value
        for key, value in options.items()
        if key.rpartition(".")[2] not in _HARMLESS and ".cache." not in f".{key}"
    }
    driver = options.pop("driver", None)
    if driver in ("file", "host_device", "nbd"):  # a protocol by itself: its bytes are the image
        options = {f"file.{key}": value for key, value in options.items()}
        options["file.driver"], driver = driver, "raw"
    protocol = options.pop("file.driver", "file")
    try:
        offset = int(options.pop("offset", "0")) if driver == "raw" else 0
        size = int(options.pop("size")) if driver == "raw" and "size" in options else None
        export = options.pop("file.export", "")
        if protocol in ("file", "host_device"):
            path = options.pop("file.filename")
            if not options:
                path = resolve(path if os.path.isabs(path) else f"./{path}", overlay)
                return BackingName(path=path, format=driver, offset=offset, size=size)
        elif protocol == "nbd" and driver in ("raw", "qed", None):
            host = options.pop("file.server.host", None) or options.pop("file.host", None)
            port = options.pop("file.server.port", None) or options.pop("file.port", "10809")
            socket = options.pop("file.server.path", None) or options.pop("file.path", None)
            options.pop("file.server.type", None)
            if not options and (host is None) != (socket is None):
                server = f"[{host}]:{port}" if host and ":" in host else f"{host}:{port}"
                return BackingName(uri=_uri(server, socket, export), format=driver, offset=offset, size=size)
    except (KeyError, ValueError):
        pass
    if driver == "qed":
        raise UnsupportedError(f"backing file {name!r} of {overlay}: such a name is not understood")
    return BackingName(words=name, format=driver)


# -- what is allowed ------------------------------------------------------------------------------------

FOLLOW = ("none", "files", "any")


class BackingPolicy(NamedTuple):
    """What may be opened under an image, and how: see the module's description."""

    follow: str = "files"  # one of FOLLOW
    format: str | None = None
    dirs: tuple[str, ...] = ()  # real paths, of files too

    def configured(self, name: str, value: str) -> BackingPolicy:
        """With the parameter backing, backing-dir (directories with colons between them) or backing-format.

        Raises RequestError.
        """
        if name == "backing":
            if value not in FOLLOW:
                raise RequestError(f"backing={value} is not one of {', '.join(FOLLOW)}")
            return self._replace(follow=value)
        if name == "backing-format":
            formats = ("raw", "qed", "probe", *FOREIGN_FORMATS)
            if value not in formats:
                raise RequestError(f"backing-format={value} is not one of {', '.join(formats)}")
            return self._replace(format=value)
        dirs = tuple(os.path.realpath(part) for part in value.split(":") if part)
        if not dirs:
            raise RequestError(f"{name}= needs a value")
        for part in dirs:
            if not os.path.exists(part):
                raise RequestError(f"{name}={value}: there is no {part}")
        return self._replace(dirs=dirs)

    def check_name(self, name: BackingName, what: str) -> None:
        """Raise UnsupportedError unless such a name may be followed; `what` is for messages."""
        if self.follow == "none":
            raise UnsupportedError(f"{what} is needed, and backing=none allows none")
        if name.path is None and self.dirs:
            raise UnsupportedError(f"{what} is not in {':'.join(self.dirs)} (backing-dir): it is not a file")
        if name.path is None and self.follow != "any":
            raise UnsupportedError(f"{what} is not a local file: allow that with backing=any")

    def admit(self, path: str, what: str) -> str:
        """The path under which to open the file at `path`.  Raises UnsupportedError if that is not allowed."""
        real = os.path.realpath(path) if self.dirs else path
        if self.dirs and not any(os.path.commonpath((real, allowed)) == allowed for allowed in self.dirs):
            raise UnsupportedError(f"{what} is not in {':'.join(self.dirs)} (backing-dir): it is {real}")
        try:
            mode = os.stat(real).st_mode
        except OSError:
            return real  # opening it will tell
        if stat.S_ISBLK(mode):
            if self.follow != "any" and not self.dirs:
                raise UnsupportedError(
                    f"{what} is a block device: allow that with backing=any, or backing-dir={os.path.realpath(path)}"
                )
        elif not stat.S_ISREG(mode):  # opening a character device may already do something
            raise StorageError(f"cannot open {path}: not a file or block device", code=errno.EINVAL)
        return real

    def check_opened(self, real: str, storage: Storage, what: str) -> None:
        """Raise UnsupportedError if what was opened is not what admit() has looked at: somebody moves things."""
        if self.dirs:
            info = os.lstat(real)
            if os.path.realpath(real) != real or storage.identity() != (info.st_dev, info.st_ino):
                raise UnsupportedError(f"{what} is being replaced")

    def choose_format(self, storage: Storage, what: str) -> str:
        """The format of a file for which the image records none.  Raises UnsupportedError, StorageError."""
        if self.format in ("raw", "qed"):
            return self.format
        found = probe(storage)
        if found == "qed" or self.format == "probe":
            return found
        if self.format is None and found != "raw":
            advice = f"backing-format={found} if it is one, and " if found in FOREIGN_FORMATS else ""
            raise UnsupportedError(
                f"{what}, looks like a {found} image, but a guest can make a raw one look so: "
                f"say {advice}backing-format=raw if it is raw"
            )
        return self.format or found

    def confines(self, format: str) -> bool:
        """An image in this format, which is for QEMU to open, may not refer to anything else."""
        return bool(self.dirs) or (self.follow != "any" and self.format not in (format, "probe"))

    def check_self_contained(self, storage: Storage, format: str, what: str) -> None:
        """Raise UnsupportedError if an image in another format may refer to other files, and that is not allowed."""
        if not self.confines(format):
            return
        header = bytearray(_PROBE_BYTES)
        storage.pread_into(header, 0)
        refers = format == "vmdk"
        if format in ("qcow", "qcow2"):
            version, backing = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:16], "big")
            refers = backing != 0 or (version >= 3 and bool(header[79] & 4))  # incompatible feature: data file
        if refers:
            advice = "backing-dir cannot confine them" if self.dirs else f"allow that with backing-format={format}"
            raise UnsupportedError(f"{what}, is a {format} image that may refer to other files: {advice}")
