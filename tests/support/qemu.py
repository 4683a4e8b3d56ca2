"""qemu-img and qemu-io as independent oracles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from support.patterns import Op, stamp
from support.qed_image import Geometry, QedFile, assert_sound
from support.qemu_words import older_error, older_output
from support.tools import Result, run


def qemu_img(*args: str | os.PathLike[str], cwd: str | os.PathLike[str] | None = None) -> Result:
    """Run qemu-img; what it says is in the words of QEMU 7.2."""
    said = run(["qemu-img", *args], cwd=cwd)
    return Result(said.rc, older_output(said.out), older_error(said.err))


def qemu_img_ok(*args: str | os.PathLike[str], cwd: str | os.PathLike[str] | None = None) -> str:
    result = qemu_img(*args, cwd=cwd)
    assert result.rc == 0, f"qemu-img {args}: rc {result.rc}\n{result.text}"
    return result.out


def qemu_io(image: str | os.PathLike[str], *commands: str, fmt: str = "qed", read_only: bool = False) -> Result:
    """Run qemu-io commands; its exit code alone does not tell a failed command, so text is looked at too."""
    args: list[str | os.PathLike[str]] = ["qemu-io", "-f", fmt]
    if read_only:
        args.append("-r")
    for command in commands:
        args += ["-c", command]
    return run([*args, image])


def qemu_io_ok(image: str | os.PathLike[str], *commands: str, fmt: str = "qed", read_only: bool = False) -> str:
    result = qemu_io(image, *commands, fmt=fmt, read_only=read_only)
    failed = [w for w in ("failed", "error", "can't open", "Pattern verification") if w in result.text]
    assert result.rc == 0 and not failed, f"qemu-io {image}: rc {result.rc}\n{result.text}"
    return result.out


def create(
    path: str | os.PathLike[str],
    size: int,
    geometry: Geometry | None = None,
    *,
    backing: str | None = None,
    backing_fmt: str = "raw",
) -> None:
    """qemu-img create -f qed; the backing name is stored as given."""
    args: list[str | os.PathLike[str]] = ["create", "-q", "-f", "qed"]
    if geometry is not None:
        args += ["-o", f"cluster_size={geometry.cluster_size},table_size={geometry.table_size}"]
    if backing is not None:
        args += ["-b", backing, "-F", backing_fmt]
    qemu_img_ok(*args, path, str(size), cwd=Path(path).parent)


def apply(image: str | os.PathLike[str], ops: Iterable[Op], scratch: Path) -> None:
    """Do guest requests with qemu-io, position-stamped data included."""
    commands = []
    for i, op in enumerate(ops):
        if op.kind == "zero":
            commands.append(f"write -q -z {op.pos} {op.length}")
            continue
        source = scratch / f"op{i}.bin"
        source.write_bytes(stamp(op.tag, op.pos, op.length))
        commands.append(f"write -q -s {source} {op.pos} {op.length}")
    qemu_io_ok(image, *commands)


def to_raw(source: str | os.PathLike[str], target: str | os.PathLike[str], fmt: str = "qed") -> None:
    """qemu-img convert to raw; source may be an NBD URI with fmt raw."""
    qemu_img_ok("convert", "-f", fmt, "-O", "raw", source, target)


def info(path: str | os.PathLike[str]) -> dict[str, object]:
    parsed = json.loads(qemu_img_ok("info", "--output=json", "-f", "qed", path))
    assert isinstance(parsed, dict)
    return parsed


def assert_check_clean(path: str | os.PathLike[str]) -> None:
    """qemu-img check finds nothing but the leaks it invents.

    These are one per cluster_size - 1 clusters (B4d), and the header's own cluster if header_size is 0.
    """
    report = assert_sound(path)
    result = qemu_img("check", "--output=json", "-f", "qed", path)
    assert result.rc in (0, 3), result.text
    found = json.loads(result.out)
    with QedFile(path) as image:
        invented = report.file_clusters // (image.geometry.cluster_size - 1)
        invented += image.header["header_size"] == 0
    assert found.get("corruptions", 0) == 0, result.text
    assert found["check-errors"] == 0, result.text
    assert found.get("leaks", 0) <= invented, result.text
