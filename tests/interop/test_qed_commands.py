"""The qed command beside qemu-img: the same command line in two equal directories, then everything is compared."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.patterns import KiB, MiB
from support.qed_image import Built, ImageSpec, QedFile, assert_sound, build, patch_header, read_header
from support.qemu import assert_check_clean, qemu_img, qemu_img_ok
from support.qemu_words import older_output
from support.tools import Result

from qedcore.cli.main import main

Run = Callable[..., Result]


@pytest.fixture
def qed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """qed(*args, cwd=...) runs the command in this process."""

    def run(*args: str | os.PathLike[str], cwd: str | os.PathLike[str]) -> Result:
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            capfd.readouterr()
            try:
                code = main([os.fspath(arg) for arg in args])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Result(code, newlines(out), err)

    return run


def newlines(text: str) -> str:
    """What support.tools.run makes of \\r."""
    return text.replace("\r", "\n")


def words(line: str) -> list[str]:
    return shlex.split(line)


def as_qed(text: str) -> str:
    return text.replace("qemu-img: ", "qed: ").replace("qemu-img --help", "qed --help")


# -- one directory with everything that the tables below name -------------------------------------------


def populate(where: Path) -> None:
    """Sound and broken images; two calls make equal directories."""
    where.mkdir()
    (where / "sub").mkdir()
    with open(where / "base.raw", "wb") as f:
        for cluster in (0, 3, 5):
            f.seek(cluster * 8 * KiB)
            f.write(bytes([cluster + 1]) * 5000)
        f.truncate(300_123)
    (where / "text").write_text("not an image\n")
    (where / "hole.raw").touch()
    os.truncate(where / "hole.raw", MiB)
    (where / "sub" / "base.raw").write_bytes(b"\7" * 70_000)
    image = {
        "plain.qed": ImageSpec(size=MiB, layout="DD-Z D"),
        "same.qed": ImageSpec(size=MiB, layout="DD-- D", reverse=True),
        "longer.qed": ImageSpec(size=2 * MiB, layout="DD-Z D"),
        "other.qed": ImageSpec(size=MiB, layout="DD-Z D", tag=2),
        "late.qed": ImageSpec(size=MiB, layout="DD-Z DD"),
        "small.qed": ImageSpec(size=100 * KiB, cluster_size=4 * KiB, table_size=2, layout="D-ZD"),
        "empty.qed": ImageSpec(size=MiB),
        "nothing.qed": ImageSpec(size=0),
        "overlay.qed": ImageSpec(size=MiB, layout="-DZ D", backing="base.raw", no_probe=True),
        "probed.qed": ImageSpec(size=MiB, layout="-DZ D", backing="base.raw"),
        "chain.qed": ImageSpec(size=3 * MiB // 2, layout="D- --Z", backing="overlay.qed"),
        "sub/top.qed": ImageSpec(size=MiB, layout="--D", backing="base.raw", no_probe=True),
        "deep.qed": ImageSpec(size=MiB, layout=" Z", backing="sub/top.qed"),
        "last.qed": ImageSpec(size=MiB, layout={15: "data"}),
        "short.qed": ImageSpec(size=2 * MiB, backing="last.qed"),
        "void.qed": ImageSpec(size=2 * MiB, backing="empty.qed"),
        "zeros.qed": ImageSpec(size=2 * MiB, layout={15: "data", **dict.fromkeys(range(16, 32), "zero")}),
        "lost.qed": ImageSpec(size=MiB, backing="missing.raw", no_probe=True),
        "self.qed": ImageSpec(size=MiB, backing="self.qed"),
        "loop1.qed": ImageSpec(size=MiB, backing="loop2.qed"),
        "loop2.qed": ImageSpec(size=MiB, backing="loop1.qed"),
        "features.qed": ImageSpec(features=0xC),
        "cluster.qed": ImageSpec(header={"cluster_size": 5000}),
        "table.qed": ImageSpec(header={"table_size": 3}),
        "size.qed": ImageSpec(header={"image_size": 1000}),
        "l1.qed": ImageSpec(header={"l1_table_offset": 12345}),
        "name.qed": ImageSpec(backing="x", header={"backing_filename_offset": 70_000}),
        "longname.qed": ImageSpec(backing="x" * 5000),
        "on_bad.qed": ImageSpec(backing="table.qed"),
    }
    for name, spec in image.items():
        build(where / name, spec)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal directories: qemu-img works in one, qed in the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    populate(one)
    populate(two)
    return one, two


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One such directory for commands that only read."""
    path = tmp_path_factory.mktemp("shared") / "images"
    populate(path)
    return path


READING = """
info plain.qed
info -f qed plain.qed
info -fqed overlay.qed
info --output=json overlay.qed
info --output json plain.qed
info --image-opts driver=qed,file.filename=plain.qed
info --image-opts driver=qed,file.driver=file,file.filename=plain.qed
info --image-opts file.filename=plain.qed
info --image-opts driver=raw,file.filename=plain.qed
info --image-opts driver=qed,foo=1,file.filename=plain.qed
info --image-opts driver=qed,file.filename=missing
info --image-opts -f qed plain.qed
info --output=json 'json:{"driver":"qed","file":{"driver":"file","filename":"small.qed"}}'
info "json:{'driver':'qed','file':{'driver':'file','filename':'sub/top.qed'}}"
info "json:{'driver':'qed','file':{'driver':'blkdebug','image':{'driver':'file','filename':'plain.qed'}}}"
info file:plain.qed
info -U chain.qed
info --backing-chain chain.qed
info --backing-chain --output=json deep.qed
info --backing-chain plain.qed
info --backing-chain --output=json plain.qed
info sub/top.qed
info lost.qed
info --backing-chain lost.qed
info --backing-chain self.qed
info --backing-chain loop1.qed
info self.qed
info base.raw
info --output=json base.raw
info -f raw plain.qed
info nothing.qed
info missing.qed
info -f qed missing.qed
info -f qed text
info -f qed hole.raw
info features.qed
info cluster.qed
info table.qed
info size.qed
info l1.qed
info name.qed
info longname.qed
info .
info --output=xml plain.qed
info -f bogus plain.qed
map features.qed
map on_bad.qed
map lost.qed
map missing.qed
map -f qed text
map -s 1x plain.qed
map -l 1x plain.qed
map plain.qed
map -f qed --output=json chain.qed
map nothing.qed
map --output=json nothing.qed
map --output=json -s 64k -l 128k chain.qed
map --start-offset=1000 --max-length=100000 --output=json overlay.qed
map --image-opts driver=qed,file.filename=chain.qed
map --output=json base.raw
compare plain.qed same.qed
compare -s plain.qed same.qed
compare plain.qed other.qed
compare plain.qed late.qed
compare late.qed plain.qed
compare plain.qed longer.qed
compare -s plain.qed longer.qed
compare -q plain.qed other.qed
compare -p plain.qed same.qed
compare -f qed -F raw empty.qed hole.raw
compare -f qed -F qed plain.qed same.qed
compare -s empty.qed hole.raw
compare -f raw -F raw plain.qed plain.qed
compare overlay.qed probed.qed
compare -s overlay.qed probed.qed
compare -s short.qed zeros.qed
compare -s void.qed zeros.qed
compare -s short.qed longer.qed
compare -T unsafe plain.qed same.qed
compare -U plain.qed same.qed
compare -T bogus plain.qed same.qed
compare plain.qed missing.qed
compare table.qed plain.qed
compare on_bad.qed plain.qed
compare -f bogus plain.qed plain.qed
compare nothing.qed empty.qed
compare nothing.qed plain.qed
measure -O raw plain.qed
measure --output=json -O raw base.raw
measure -O qcow2 --size 1G
measure --size 1G
measure
measure --size 1G plain.qed
measure --size 1x
snapshot -l plain.qed
snapshot plain.qed
snapshot -c s1 empty.qed
snapshot -a s1 empty.qed
snapshot -d s1 empty.qed
amend -o size=1M empty.qed
amend -f qed -o cluster_size=4k empty.qed
create -f qed -o help
create -f qed -o '?'
create -f qed -o help plain.qed
convert -O qed -o help plain.qed target.qed
"""


# With damaged images.
ADVICE = "qed: 'qed check -r all' repairs what it can; 'qed salvage' rescues what is left\n"


@pytest.mark.parametrize("line", READING.strip().splitlines())
def test_reading(line: str, shared: Path, qed: Run) -> None:
    expected = qemu_img(*words(line), cwd=shared)
    found = qed(*words(line), cwd=shared)
    err = found.err.replace(ADVICE, "")
    assert (found.rc, found.out, err) == (expected.rc, expected.out, as_qed(expected.err))
    if "QED " in err and "is invalid" in err and "backing file:" not in err:
        assert ADVICE in found.err


# Where qemu-img would hang, or says less: qed alone.
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("map loop1.qed", "loop"),
        ("map self.qed", "loop"),
        ("convert self.qed x.raw", "loop"),
        ("info", "Expecting one image file name"),
        ("info plain.qed small.qed", "Expecting one image file name"),
        ("info --nonsense plain.qed", "--nonsense"),
        ("compare plain.qed", "Expecting two image file names"),
        ("nonsense plain.qed", "Command not found: nonsense"),
        ("", "Not enough arguments"),
        ("bitmap --add empty.qed b0", "Operation add on bitmap b0 failed"),
        ("info nbd+unix:///?socket=missing", "missing"),
        ("convert -c -O qed plain.qed x.qed", "Compression not supported for this file format"),
        ("convert plain.qed plain.qed", "the target is the source"),
        ("convert chain.qed overlay.qed", "the target is the source"),
    ],
)
def test_one_line_and_code_1(line: str, message: str, shared: Path, qed: Run) -> None:
    before = {path.name for path in shared.iterdir()}
    found = qed(*words(line), cwd=shared)
    assert found.rc == 1
    assert message in found.err and found.err.count("\n") == 1 and found.out == ""
    assert {path.name for path in shared.iterdir()} == before


# -- create ---------------------------------------------------------------------------------------------

CREATING = """
create -f qed x.qed 1G
create -q -f qed x.qed 1G
create -f qed x.qed 1000
create -f qed x.qed 1.5M
create -f qed x.qed 0x10000
create -f qed x.qed 10b
create -f qed x.qed 0
create -f qed x.qed 64T
create -f qed x.qed 65T
create -f qed x.qed 7.5E
create -f qed x.qed 8E
create -f qed x.qed 1e3
create -f qed x.qed 1.5
create -f qed x.qed abc
create -f qed x.qed
create -f qed x.qed -o size=1M
create -f qed -o size=1M x.qed 2M
create -f qed -o size=abc x.qed
create -f qed -o cluster_size=4k,table_size=2 x.qed 4G
create -f qed -o cluster_size=4k,table_size=2 x.qed 1T
create -f qed -o cluster_size=4k -o table_size=8 x.qed 1M
create -f qed -o cluster_size=2k x.qed 1M
create -f qed -o cluster_size=0 x.qed 1M
create -f qed -o cluster_size=6k x.qed 1M
create -f qed -o cluster_size=128M x.qed 1M
create -f qed -o cluster_size=1.5k x.qed 1M
create -f qed -o cluster_size=abc x.qed 1M
create -f qed -o cluster_size=-1 x.qed 1M
create -f qed -o cluster_size x.qed 1M
create -f qed -o table_size=3 x.qed 1M
create -f qed -o table_size=0 x.qed 1M
create -f qed -o table_size=32 x.qed 1M
create -f qed -o encryption=on x.qed 1M
create -f qed -o compat=1.1 x.qed 1M
create -f qed -o preallocation=full x.qed 1M
create -f qed -o preallocation=off x.qed 1M
create -f qed -o preallocation=bogus x.qed 1M
create -f qed -o nocow=on x.qed 1M
create -f qed -o nocow=perhaps x.qed 1M
create -f qed -o extent_size_hint=1M x.qed 1M
create -f qed -b base.raw -F raw x.qed
create -f qed -b base.raw -F raw x.qed 10k
create -f qed -b base.raw -F raw x.qed 10M
create -f qed -b plain.qed -F qed x.qed
create -f qed -b chain.qed -F qed x.qed
create -f qed -o backing_file=base.raw,backing_fmt=raw x.qed
create -f qed -b base.raw -F raw sub/x.qed
create -f qed -F raw x.qed 1M
create -f qed -u -b missing -F raw x.qed 1M
create -f qed -u -b missing -F raw x.qed
create -f qed -u -b missing x.qed 1M
create -f qed -u -b 'a,b' -F raw x.qed 1M
create -f qed -b missing x.qed
create -f qed -b missing -F raw x.qed
create -f qed -b missing -F raw x.qed 1M
create -f qed -b base.raw -F bogus x.qed
create -f qed -b base.raw -F qed x.qed
create -f qed -b table.qed -F qed x.qed
create -f qed -b on_bad.qed -F qed x.qed
create -f qed -b file:base.raw -F raw x.qed
create -f qed -b null-co:// -F raw x.qed 1M
create -f qed -b "json:{'driver':'null-co','size':12345344}" -F raw x.qed
create -f qed -b 'json:{"driver":"qed","file":{"driver":"file","filename":"plain.qed"}}' -F qed x.qed
create -f qed -b nbd:unix:missing -F raw x.qed 1M
create -f qed -b bogus:x -F raw x.qed 1M
create -f qed -b '' x.qed
create -f qed -b x.qed x.qed
create -f qed missing/x.qed 1M
create -f qed . 1M
create -f raw x.raw 1M
create -f bogus x.qed 1M
"""


@pytest.mark.parametrize("line", CREATING.strip().splitlines())
def test_create(line: str, both: tuple[Path, Path], qed: Run) -> None:
    expected, found = qemu_img(*words(line), cwd=both[0]), qed(*words(line), cwd=both[1])
    assert (found.rc, found.out, found.err) == (expected.rc, expected.out, as_qed(expected.err))
    if expected.rc == 0 and "raw x.raw" not in line:
        name = "sub/x.qed" if "sub/x.qed" in line else "x.qed"
        assert (both[1] / name).read_bytes() == (both[0] / name).read_bytes()
    elif expected.rc:
        assert not (both[1] / "x.qed").exists()


@pytest.mark.parametrize(
    "line",
    [
        "create -o cluster_size=2k plain.qed 1M",
        "create -o nonsense=1 plain.qed 1M",
        "create -b missing -F raw plain.qed 1M",
        "create plain.qed 9999T",
        "create -b ./plain.qed -F qed plain.qed",  # itself, under another name
        f"create -u -b {'n' * 4033} -F raw -o cluster_size=4k plain.qed 1M",  # no room in the header (B7)
        f"create -u -b {'n' * 4096} -F raw plain.qed 1M",  # longer than QEMU reads (B7)
        "convert -O qed -o cluster_size=2k same.qed plain.qed",
        "convert -O qed -B missing -F raw same.qed plain.qed",
        "convert -O qed table.qed plain.qed",
        "convert -O raw on_bad.qed plain.qed",
    ],
)
def test_refusals_leave_the_existing_file(line: str, shared: Path, qed: Run) -> None:
    """B10: qemu-img empties the file first."""
    before = (shared / "plain.qed").read_bytes()
    names = {path.name for path in shared.iterdir()}
    assert qed(*words(line), cwd=shared).rc == 1
    assert (shared / "plain.qed").read_bytes() == before
    assert {path.name for path in shared.iterdir()} == names


def test_create_says_which_format_the_backing_file_has(shared: Path, qed: Run) -> None:
    found = qed("create", "-b", "base.raw", "x.qed", cwd=shared)
    expected = qemu_img("create", "-f", "qed", "-b", "base.raw", "x.qed", cwd=shared)
    assert found.rc == expected.rc == 1
    assert found.err == as_qed(expected.err) + "\n"  # which qemu-img forgets


@pytest.mark.parametrize("command", ["create -o {} x.qed 1M", "convert -O qed -o {} hole.raw x.qed"])
@pytest.mark.parametrize(
    "options",
    [
        "table_size=1",
        "table_size=2",
        "cluster_size=2M",
        "cluster_size=2M,table_size=8",
        "cluster_size=2M,table_size=16",
        "cluster_size=4M",
        "cluster_size=4M,table_size=2",
        "cluster_size=64M,table_size=16",
    ],
)
def test_warned_of_what_qemu_cannot_open(tmp_path: Path, qed: Run, options: str, command: str) -> None:
    (tmp_path / "hole.raw").touch()
    os.truncate(tmp_path / "hole.raw", MiB)
    found = qed(*command.format(options).split(), cwd=tmp_path)
    assert found.rc == 0 and qed("info", "x.qed", cwd=tmp_path).rc == 0
    if qemu_img("info", "x.qed", cwd=tmp_path).rc:  # B3
        assert found.err.startswith("qed: warning: QEMU cannot open images ")
    else:
        assert found.err == ""


def test_create_keeps_permissions(both: tuple[Path, Path], qed: Run) -> None:
    path = both[1] / "plain.qed"
    path.chmod(0o640)
    assert qed("create", "plain.qed", "1M", cwd=both[1]).rc == 0
    assert path.stat().st_mode & 0o777 == 0o640


def test_names_are_bytes(tmp_path: Path, qed: Run) -> None:
    name = os.fsdecode(b"\xff.qed")
    assert qed("create", name, "1M", cwd=tmp_path).rc == 0
    assert qed("info", name, cwd=tmp_path).rc == qed("map", name, cwd=tmp_path).rc == 0


# -- info, beyond qemu-img ------------------------------------------------------------------------------


def test_info_dirty_and_verbose(tmp_path: Path, image: Callable[..., object], qed: Run) -> None:
    image(size=MiB, layout="DDZ-D", leaks=2)
    clean = qed("info", "image.qed", cwd=tmp_path)
    assert "dirty" not in clean.out and "table_size" not in clean.out
    patch_header(tmp_path / "image.qed", features=2)
    assert "\ndirty: " in qed("info", "image.qed", cwd=tmp_path).out
    facts = json.loads(qed("info", "--output=json", "-v", "image.qed", cwd=tmp_path).out)
    assert facts["dirty-flag"] is True
    assert facts["table-size"] == 4 and facts["features"] == ["need_check"]
    assert facts["allocated-clusters"] == 3 and facts["free-clusters"] == 2
    human = qed("info", "--verbose", "image.qed", cwd=tmp_path).out
    for line in ("table_size: 4", "features: need_check", "allocated clusters: 3", "free clusters: 2"):
        assert f"\n{line}\n" in human


def test_info_describes_a_foreign_backing_file(tmp_path: Path, image: Callable[..., object], qed: Run) -> None:
    qemu_img_ok("create", "-q", "-f", "qcow2", "base.qcow2", "1M", cwd=tmp_path)
    image(size=MiB, backing="base.qcow2")
    for output in ("human", "json"):
        line = ["info", "--backing-chain", f"--output={output}", "image.qed"]
        found = qed(*line, cwd=tmp_path)
        # What is said of the backing file is QEMU's own.
        assert (found.rc, older_output(found.out)) == (0, qemu_img_ok(*line, cwd=tmp_path))


# -- map ------------------------------------------------------------------------------------------------


def random_chain(where: Path, rng: random.Random) -> list[str]:
    """A raw file and three images on it, of any sizes; their names."""
    with open(where / "r.raw", "wb") as f:
        for i in range(30):
            if rng.random() < 0.5:
                f.seek(i * 8192)
                f.write(b"x" * rng.choice((4096, 8192, 100)))
        f.truncate(rng.randrange(1, 600_000))
    names = ["r.raw"]
    for depth in range(3):
        spec = ImageSpec(
            size=rng.randrange(1, 100) * 512 * rng.choice((1, 64)),
            cluster_size=rng.choice((4 * KiB, 64 * KiB)),
            table_size=rng.choice((2, 4)),
            layout="".join(rng.choice("DDZ-- ") for _ in range(8)),
            backing=names[-1],
            no_probe=depth == 0,
            reverse=rng.random() < 0.3,
        )
        names.append(f"{depth}.qed")
        build(where / names[-1], spec)
    return names


def test_map_of_random_chains(tmp_path: Path, rng: random.Random, qed: Run) -> None:
    for _ in range(6):
        top = random_chain(tmp_path, rng)[-1]
        for options in ([], ["--output=json"], ["--output=json", "-s", "8k", "-l", "70000"]):
            line = ["map", *options, top]
            assert qed(*line, cwd=tmp_path).out == qemu_img_ok(*line, cwd=tmp_path)


def test_compare_of_random_chains(tmp_path: Path, rng: random.Random, qed: Run) -> None:
    """Also what strict mode says of copies, which are allocated in another way."""
    for _ in range(3):
        names = random_chain(tmp_path, rng)
        for fmt in ("qed", "raw"):
            qemu_img_ok("convert", "-O", fmt, names[-1], f"copy.{fmt}", cwd=tmp_path)
        for options in ([], ["-s"]):
            for other in ("copy.qed", "copy.raw", *names[:-1]):
                line = ["compare", *options, names[-1], other]
                expected, found = qemu_img(*line, cwd=tmp_path), qed(*line, cwd=tmp_path)
                assert (found.rc, found.out, found.err) == (expected.rc, expected.out, expected.err)


def test_map_of_runs_of_4_gib(tmp_path: Path, image: Callable[..., object], qed: Run) -> None:
    """B4b: qemu-img aborts when a run is a multiple of 4 GiB long."""
    size = 100 << 30
    image(size=size, cluster_size=MiB, layout={4096: "data", 4095: "-"})
    rows = json.loads(qed("map", "--output=json", "image.qed", cwd=tmp_path).out)
    assert [(row["start"], row["length"], row["data"]) for row in rows] == [
        (0, 4 << 30, False),
        (4 << 30, MiB, True),
        ((4 << 30) + MiB, size - (4 << 30) - MiB, False),
    ]


def test_map_of_a_damaged_table(tmp_path: Path, image: Callable[..., Built], qed: Run) -> None:
    built = image(size=MiB, layout="D", entries={3: 0x123})
    found = qed("map", "image.qed", cwd=tmp_path)
    assert found.rc == qemu_img("map", "image.qed", cwd=tmp_path).rc == 1
    assert "Could not read file metadata: L2 entry 3" in found.err
    assert qed("compare", "image.qed", "image.qed", cwd=tmp_path).rc == 3
    failed = qed("convert", "image.qed", "x.raw", cwd=tmp_path)
    assert failed.rc == 1 and "error while reading block status at offset" in failed.err
    assert os.listdir(tmp_path) == ["image.qed"]

    salvaged = qed("convert", "--salvage", "image.qed", "x.raw", cwd=tmp_path)
    assert (salvaged.rc, salvaged.out) == (0, "")
    warning = f"qed: warning: error while reading offset {3 * 64 * KiB}: L2 entry 3 at .* points to 0x123: .*\n"
    assert re.fullmatch(warning, salvaged.err)  # what is lost, once
    assert qed("convert", "-q", "--salvage", "image.qed", "y.raw", cwd=tmp_path).text == ""
    assert qed("convert", "--salvage", "-O", "qcow2", "image.qed", "z.qcow2", cwd=tmp_path).rc == 0
    qemu.to_raw(tmp_path / "z.qcow2", tmp_path / "z.raw", "qcow2")
    want = built.read(0, 64 * KiB) + bytes(MiB - 64 * KiB)
    for name in ("x.raw", "y.raw", "z.raw"):
        assert (tmp_path / name).read_bytes() == want, name


# -- dump -----------------------------------------------------------------------------------------------


def test_dump(tmp_path: Path, image: Callable[..., object], qed: Run) -> None:
    built = image(size=MiB, layout="D-Z", entries={5: 0x123, 6: 1 << 40, 7: 4096 * 16})
    facts = json.loads(qed("dump", "--header", "--l1", "--l2", "0", "--output=json", "image.qed", cwd=tmp_path).out)
    for name, value in read_header(tmp_path / "image.qed").items():
        if name in ("magic", "features"):
            assert facts["header"][name] == value
    assert facts["l1"]["entries"][0]["value"] == built.l2_offsets[0]  # type: ignore[attr-defined]
    assert [(row["index"], row["what"]) for row in facts["l2"][0]["entries"]] == [
        (0, "data"),
        (2, "zero cluster"),
        (5, "not aligned to a cluster"),
        (6, "past the end of the file"),
        (7, "data"),
    ]
    human = qed("dump", "--l2", "0", "image.qed", cwd=tmp_path).out
    assert "not aligned to a cluster" in human and "L2 table 0 at" in human


def test_dump_of_offsets_that_no_file_has(tmp_path: Path, image: Callable[..., object], qed: Run) -> None:
    image("a.qed", header={"l1_table_offset": 2**64 - 8, "cluster_size": 2**32 - 1, "table_size": 2**32 - 1})
    image("b.qed", l1_entries={0: 2**64 - 8})
    for name in ("a.qed", "b.qed"):
        found = qed("dump", "--header", "--l1", "--l2", "0", name, cwd=tmp_path)
        assert (found.rc, found.err) == (0, "")


@pytest.mark.parametrize(
    "name", ["features.qed", "cluster.qed", "table.qed", "l1.qed", "name.qed", "text", "hole.raw"]
)
def test_dump_takes_anything(name: str, shared: Path, qed: Run) -> None:
    before = (shared / name).read_bytes()
    found = qed("dump", "--header", "--l1", name, cwd=shared)
    assert found.rc == 0 and "problem: " in found.out
    assert (shared / name).read_bytes() == before


# -- convert --------------------------------------------------------------------------------------------

SOURCES = ("plain.qed", "small.qed", "empty.qed", "nothing.qed", "overlay.qed", "chain.qed", "deep.qed", "base.raw")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options", ["-O raw", "-O qed", "-O qed -S 0", "-O qed -o cluster_size=4k,table_size=2", "-p"]
)
def test_convert(source: str, options: str, both: tuple[Path, Path], qed: Run) -> None:
    line = ["convert", *words(options), source, "target"]
    expected, found = qemu_img(*line, cwd=both[0]), qed(*line, cwd=both[1])
    assert (found.rc, found.err) == (expected.rc, expected.err) == (0, "")
    if "-p" not in options:
        assert found.out == expected.out
    if "qed" in options:
        assert_check_clean(both[1] / "target")
        qemu_img_ok("compare", both[0] / "target", both[1] / "target")
        with QedFile(both[0] / "target") as theirs, QedFile(both[1] / "target") as ours:
            assert ours.header["image_size"] == theirs.header["image_size"]
            assert ours.header["features"] == theirs.header["features"]
        allocated = [assert_sound(path / "target").allocated for path in both]
        assert allocated[1] <= allocated[0] if "-S" not in options else allocated[1] == allocated[0]
    else:
        assert (both[1] / "target").read_bytes() == (both[0] / "target").read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        "convert -O qed -B base.raw -F raw overlay.qed x.qed",
        "convert -O qed -o backing_file=base.raw,backing_fmt=raw overlay.qed x.qed",
        "convert -O qed -B plain.qed -F qed longer.qed x.qed",
        "convert -O qed base.raw plain.qed x.qed",
        "convert -O qed -S 0 \"json:{'driver':'null-co','size':1048576,'read-zeroes':true}\" x.qed",
        "convert -n -O qed small.qed plain.qed",
        "convert -n --target-is-zero -O qed small.qed empty.qed",
        "convert -n -O raw small.qed hole.raw",
        "convert -O qed -t writeback -T unsafe -W -m 4 -C chain.qed x.qed",
        "convert -f raw -O qed -r 1G hole.raw x.qed",
        "convert --image-opts -O qed driver=qed,file.filename=plain.qed x.qed",
        "convert -n --image-opts --target-image-opts file.filename=plain.qed driver=qed,file.filename=late.qed",
    ],
)
def test_convert_options(line: str, both: tuple[Path, Path], qed: Run) -> None:
    expected, found = qemu_img(*words(line), cwd=both[0]), qed(*words(line), cwd=both[1])
    assert (found.rc, found.out, found.err) == (expected.rc, expected.out, expected.err) == (0, "", "")
    target = words(line)[-1].rpartition("=")[2]
    fmt = "raw" if target.endswith("raw") else "qed"
    qemu_img_ok("compare", "-f", fmt, "-F", fmt, both[0] / target, both[1] / target)
    if fmt == "qed":
        assert_sound(both[1] / target)


@pytest.mark.parametrize(
    "line",
    [
        "convert -O qed -o foo=1 plain.qed x.qed",
        "convert -O qed -o cluster_size=1 plain.qed x.qed",
        "convert -O qed -B base.raw plain.qed x.qed",
        "convert -n -O qed plain.qed x.qed",
        "convert -n -O raw plain.qed base.raw",
        "convert -O qed -S 1x plain.qed x.qed",
        "convert -O qed -S 1 plain.qed x.qed",
        "convert -O raw plain.qed missing/x",
        "convert -O qed plain.qed missing/x",
        "convert -n -o cluster_size=4k -O qed plain.qed same.qed",
        "convert --target-is-zero plain.qed x.qed",
        "convert -m 40 plain.qed x.qed",
        "convert -t bogus plain.qed x.qed",
        "convert --bitmaps plain.qed x.qed",
        "convert plain.qed",
        "convert",
        "convert -O qed missing x.qed",
        "convert -O qed on_bad.qed x.qed",
        "convert -O bogus plain.qed x.qed",
    ],
)
def test_convert_refusals(line: str, shared: Path, qed: Run) -> None:
    expected = qemu_img(*words(line), cwd=shared)
    (shared / "x.qed").unlink(missing_ok=True)
    found = qed(*words(line), cwd=shared)
    assert (found.rc, found.out, found.err) == (expected.rc, expected.out, as_qed(expected.err))
    assert not (shared / "x.qed").exists()


def test_convert_onto_a_shorter_backing_file(both: tuple[Path, Path], qed: Run) -> None:
    """What that cannot have is copied; qemu-img loses it."""
    path = both[1]
    (path / "long.raw").write_bytes((path / "base.raw").read_bytes() + bytes(range(1, 256)) * 1000)
    build(path / "source.qed", ImageSpec(size=MiB // 2, layout="-D", backing="long.raw", no_probe=True))
    assert qed("convert", "-O", "qed", "-B", "base.raw", "-F", "raw", "source.qed", "x.qed", cwd=path).rc == 0
    qemu_img_ok("compare", "source.qed", "x.qed", cwd=path)
    assert assert_sound(path / "x.qed").allocated < 8


def test_convert_other_formats(both: tuple[Path, Path], qed: Run) -> None:
    """Through nbdkit and qemu-img, both ways."""
    path = both[1]
    assert qed("convert", "-O", "qcow2", "chain.qed", "x.qcow2", cwd=path).rc == 0
    qemu_img_ok("compare", "-f", "qcow2", "-F", "qed", "x.qcow2", "chain.qed", cwd=path)
    assert qed("convert", "-O", "qed", "x.qcow2", "back.qed", cwd=path).rc == 0
    qemu_img_ok("compare", "back.qed", "chain.qed", cwd=path)
    assert_check_clean(path / "back.qed")
    assert qed("compare", "chain.qed", "x.qcow2", cwd=path).out == "Images are identical.\n"
    assert qed("compare", "x.qcow2", "other.qed", cwd=path).rc == 1
    assert qed("measure", "-O", "qcow2", "chain.qed", cwd=path).rc == 0
    before = sorted(os.listdir(path))
    failed = qed("convert", "-O", "qcow2", "-o", "nonsense=1", "chain.qed", "y.qcow2", cwd=path)
    assert failed.rc == 1 and "nonsense" in failed.err and sorted(os.listdir(path)) == before


def test_other_formats_need_programs(shared: Path, qed: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for line in ("convert -O qcow2 plain.qed x.qcow2", "create -f qcow2 x.qcow2 1M", "info -f vmdk plain.qed"):
        found = qed(*words(line), cwd=shared)
        assert found.rc == 1 and found.err.count("\n") == 1 and "qemu-img" in found.err
    assert not (shared / "x.qcow2").exists()


# -- measure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", ["", "-o cluster_size=4k,table_size=2"])
def test_measure_is_what_convert_needs(source: str, options: str, both: tuple[Path, Path], qed: Run) -> None:
    path = both[1]
    found = json.loads(qed("measure", "--output=json", "-O", "qed", *words(options), source, cwd=path).out)
    # -S 0 writes all; the default leaves out clusters of zeros that the source stores
    assert qed("convert", "-O", "qed", *words(options), source, "x.qed", cwd=path).rc == 0
    assert (path / "x.qed").stat().st_size <= found["required"]
    assert qed("convert", "-O", "qed", "-S", "0", *words(options), source, "full.qed", cwd=path).rc == 0
    assert (path / "full.qed").stat().st_size == found["fully-allocated"]
    human = qed("measure", "-O", "qed", *words(options), source, cwd=path).out
    assert human == f"required size: {found['required']}\nfully allocated size: {found['fully-allocated']}\n"


def test_measure_of_an_empty_device(tmp_path: Path, qed: Run) -> None:
    found = json.loads(qed("measure", "--output=json", "-O", "qed", "--size", "1G", cwd=tmp_path).out)
    fixed = 64 * KiB * 5
    assert found == {"required": fixed, "fully-allocated": fixed + 4 * 64 * KiB + (1 << 30)}
