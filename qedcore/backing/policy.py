"""What may be opened under an image, and as which format.

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
import stat
from typing import NamedTuple

from ..errors import RequestError, StorageError, UnsupportedError
from ..storage import Storage
from .foreign import FOREIGN_FORMATS, refers_to_files
from .names import BackingName
from .probe import probe

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
            self._check_device(path, what)
        elif not stat.S_ISREG(mode):  # opening a character device may already do something
            raise StorageError(f"cannot open {path}: not a file or block device", code=errno.EINVAL)
        return real

    def _check_device(self, path: str, what: str) -> None:
        if self.follow != "any" and not self.dirs:
            raise UnsupportedError(
                f"{what} is a block device: allow that with backing=any, or backing-dir={os.path.realpath(path)}"
            )

    def check_opened(self, real: str, storage: Storage, what: str) -> None:
        """Raise UnsupportedError if what was opened is not what admit() has looked at: somebody moves things."""
        if storage.fixed_size:  # the answer of the descriptor counts, not that of the path
            self._check_device(real, what)
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
        if refers_to_files(storage, format):
            advice = "backing-dir cannot confine them" if self.dirs else f"allow that with backing-format={format}"
            raise UnsupportedError(f"{what}, is a {format} image that may refer to other files: {advice}")
