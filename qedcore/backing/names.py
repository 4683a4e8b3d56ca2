"""What a backing file's name means: the names come out of images, which may be hostile.

A name is a path, file:PATH, the URI of an NBD server (also nbd:HOST:PORT and nbd:unix:PATH), or json:{...} as QEMU
writes it, for any of these with the format, and for a part of a raw file.  Everything else is for QEMU to open.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from ..errors import RequestError, UnsupportedError
from ..storage.open import is_uri


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

    text = os.fsencode(text).decode("utf-8", "surrogateescape")  # JSON is UTF-8, whatever this system's locale

    def double_quoted(match: re.Match[str]) -> str:
        if match[0][0] == '"':
            return match[0]
        return json.dumps(match[0][1:-1].replace("\\'", "'"))

    try:
        options = _flat(json.loads(re.sub(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", double_quoted, text)))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    for key, value in options.items():
        data = value.encode(
            "utf-8", "surrogateescape"
        )  # a ValueError for half a surrogate pair: no file is called so
        if b"\0" in data:
            raise ValueError("NUL in a string")
        options[key] = os.fsdecode(data)
    return options


def json_name(path: str) -> str:
    """The name of a QED image at `path` in ASCII: bytes that are not UTF-8 are written as U+DC80 to U+DCFF."""
    import json

    path = os.fsencode(path).decode("utf-8", "surrogateescape")
    return "json:" + json.dumps({"driver": "qed", "file": {"driver": "file", "filename": path}})


def from_json_name(name: str) -> str:
    """The path or URI of the QED image that json:{...} names.  Raises RequestError."""
    try:
        where = from_options(json_options(name[len("json:") :]), name, "")
    except (ValueError, UnsupportedError) as error:
        raise RequestError(f"{name} is not the name of a QED image: {error}") from None
    place = where.path or where.uri
    if place is None or where.format not in (None, "qed"):
        raise RequestError(f"{name} is not the name of a QED image in a file or on an NBD server")
    return place


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
    return BackingName(words=name, format=driver)
