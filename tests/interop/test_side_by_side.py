"""The command line next to qemu-img's: exit codes, which files there are afterwards, and facts in JSON.

No wording, which is another one in each version of QEMU.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from support.patterns import KiB, MiB, stamp
from support.qed_image import ImageSpec, build
from support.tools import PYTHON, REPO, Result, run

GETOPT = """
info -- -d.qed
info -fqed disk.qed
info -f qed -- disk.qed
info disk.qed -f qed
info --form qed disk.qed
info --format=qed disk.qed
info --outp=json disk.qed
info --outp json disk.qed
info --out=json --back disk.qed
info --f qed disk.qed
info --backing-chain=yes disk.qed
info --nonsense disk.qed
info -Z disk.qed
info -f
info --output
info --output= disk.qed
info -U -- disk.qed
info --image-opts -- driver=qed,file.filename=-d.qed
info --im driver=qed,file.filename=disk.qed
info -- disk.qed -U
info --
info - disk.qed
info ''
info -f '' disk.qed
check -- -d.qed
check -qU -- -d.qed
check -rleaks -- -d.qed
check --output=json disk.qed
check -q -f qed -T none disk.qed
check -T -q disk.qed
map -- -d.qed
map --start=64k --max=64k disk.qed
map --output=json --start-offset 1M disk.qed
map --start-offset -1 disk.qed
measure -- -d.qed
measure --size 1M
measure --size -1
measure --size=1M --size=2M
compare -- -d.qed disk.qed
compare disk.qed -- -d.qed
compare -s disk.qed -- -d.qed
compare disk.qed
compare disk.qed disk.qed disk.qed
compare -F raw disk.qed base.raw
convert -- -d.qed out
convert -O raw -- disk.qed -out
convert -Oqed -- disk.qed out
convert -o -x -O qed disk.qed out
convert -O qed -B -base.raw -F raw over.qed out
convert -O -f disk.qed out
convert -S -1 disk.qed out
convert -n disk.qed
convert disk.qed
convert -l -x disk.qed out
convert -m 0 disk.qed out
convert -m 17 disk.qed out
convert -m 4 -W disk.qed out
convert --target-is-zero disk.qed out
convert --target-image-opts disk.qed driver=raw,file.filename=out
create -f qed -- -n.qed 1M
create -f qed n.qed -- 1M
create -f qed n.qed 1M 2M
create -f qed n.qed -1M
create -f qed -- n.qed -1M
create -f qed -b -base.raw -F raw n.qed
create -fqed -b-base.raw -Fraw n.qed
create -f qed -o -x n.qed 1M
create -f qed -o backing_file=-base.raw,backing_fmt=raw n.qed
create -q9 n.qed 1M
create
commit -- -t.qed
commit -d over.qed
commit -b -base.raw -q -- -t.qed
commit -b nothing over.qed
rebase -u -b -x -F raw over.qed
rebase -b -base.raw -F raw over.qed
rebase -b '' over.qed
rebase over.qed
resize -- -d.qed +1M
resize -- -d.qed 2M
resize disk.qed -1
resize --shrink x
resize
bench -c 1 -- -d.qed
bench -c -1 disk.qed
bench --patt=7 -w -c 1 disk.qed
bench --flush-interval -c disk.qed
snapshot -- -d.qed
snapshot -l -- -d.qed
snapshot -l -c x disk.qed
snapshot -c -x disk.qed
snapshot -d -x disk.qed
amend -o -x disk.qed
amend -- -d.qed
dd if=-d.qed of=out
dd -- if=-d.qed of=-out
dd if=disk.qed of=out count=-1
frobnicate
--frobnicate
-T
"""

SIZES = """
create -f qed n.qed 16E
create -f qed n.qed 8E
create -f qed n.qed 99999999999999999999
create -f qed n.qed 0x7fffffffffffffff
create -f qed -o size=16E n.qed
create -f qed -o cluster_size=16E n.qed 1M
create -f qed n.qed 1.5M
create -f qed n.qed 1.5
create -f qed n.qed 1x
create -f qed n.qed 1kk
create -f qed n.qed ' 1M'
create -f qed n.qed +1M
create -f qed n.qed 1m
create -f qed n.qed 0x10000
create -f qed n.qed ''
measure --size 16E
measure -O raw --size 8E
map -s 16E disk.qed
map -l 16E disk.qed
bench -c 1 -o 16E disk.qed
bench -c 1 -s 16E disk.qed
bench -c 1 -S 4G disk.qed
convert -S 16E disk.qed out
convert -r 16E disk.qed out
convert -S 513 disk.qed out
dd bs=16E if=disk.qed of=out
dd count=16E if=disk.qed of=out
dd skip=16E if=disk.qed of=out
resize disk.qed 16E
resize disk.qed +16E
resize disk.qed 8E
resize disk.qed 1.5M
resize disk.qed x
"""

PROTOCOLS = """
info a:b
info a:
info :b
info -f qed a:b
info ./a:b
info file:disk.qed
check a:b
check -f qed a:b
check -r all a:b
map a:b
measure a:b
compare a:b disk.qed
compare disk.qed a:b
convert a:b out
convert disk.qed a:b
convert -O qed disk.qed a:b
convert -O qcow2 disk.qed a:b
convert -n disk.qed a:b
create -f qed a:b 1M
create -f raw a:b 1M
create -f qed -b a:b -F raw n.qed
create -f qed -b a:b -F raw n.qed 1M
create -f qed -u -b a:b -F raw n.qed 1M
commit a:b
commit -b a:b over.qed
rebase -b a:b -F raw over.qed
rebase -u -b a:b -F raw over.qed
rebase -b '' a:b
resize a:b 1M
bench -c 1 a:b
snapshot -l a:b
amend -o x=1 a:b
bitmap --add a:b x
dd if=a:b of=out
dd if=disk.qed of=a:b
"""

OPTIONS = """
create -f qed -o nonsense=1 n.qed 1M
create -f qed -o cluster_siz=64k n.qed 1M
create -f qed -o encryption=on n.qed 1M
create -f qed -o cluster_size=64k,,table_size=4 n.qed 1M
create -f qed -o cluster_size n.qed 1M
create -f qed -o '' n.qed 1M
create -f qed -o help
create -f qed -o help n.qed
create -f nonsense n.qed 1M
convert -O qed -o nonsense=1 disk.qed out
convert -O raw -o nonsense=1 disk.qed out
convert -O qcow2 -o nonsense=1 disk.qed out
convert -O qed -o table_size=3 disk.qed out
convert -O nonsense disk.qed out
convert -f nonsense disk.qed out
convert -O qcow2 -o help
convert -O qed -o help
convert -O raw -o help
convert -O qcow2 --object secret,id=s,data=abc disk.qed out
convert -O qcow2 --object nonsense,id=s disk.qed out
create -f qcow2 --object nonsense,id=s n.qcow2 1M
convert -O qed --object nonsense,id=s other.qcow2 out
compare --object nonsense,id=s disk.qed other.qcow2
measure -O qcow2 --object nonsense,id=s disk.qed
measure -O qcow2 -o nonsense=1 disk.qed
measure -O qcow2 --size 1M
measure -O raw -o nonsense=1 --size 1M
check --object secret,id=s,data=abc disk.qed
info --object secret,id=s,data=abc --image-opts driver=qed,file.filename=disk.qed
info --image-opts driver=qed,file.filename=disk.qed,nonsense=1
info --image-opts -f qed driver=qed,file.filename=disk.qed
info --image-opts disk.qed
info json:{
info 'json:{"driver":"qed","file":{"driver":"file","filename":"disk.qed"}}'
check -f raw disk.qed
check -r some disk.qed
check base.raw
check other.qcow2
check --output=xml disk.qed
map other.qcow2
compare disk.qed other.qcow2
compare -t none disk.qed disk.qed
convert -t none disk.qed out
convert -t nonsense disk.qed out
convert -T nonsense disk.qed out
convert -c disk.qed out
convert -n disk.qed missing
convert missing out
convert -O qed missing out
convert disk.qed missing/out
convert -f raw disk.qed out
convert -f qed base.raw out
resize --preallocation=full disk.qed 1M
resize --preallocation=nonsense disk.qed 2M
resize missing 1M
rebase -b missing -F raw over.qed
commit disk.qed
commit missing
"""


def qed(*args: str, cwd: Path) -> Result:
    return run([PYTHON, "-m", "qedcore", *args], cwd=cwd, env={"PYTHONPATH": str(REPO)})


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal directories: qemu-img works in one, qed in the other."""
    paths = tmp_path / "qemu", tmp_path / "qed"
    for path in paths:
        path.mkdir()
        for name in ("base.raw", "-base.raw"):
            (path / name).write_bytes(stamp(1, 0, MiB))
        for name in ("disk.qed", "-d.qed", "a:b"):
            build(path / name, ImageSpec(size=MiB, layout="D-ZDD", cluster_size=64 * KiB))
        for name in ("over.qed", "-t.qed"):
            build(path / name, ImageSpec(size=MiB, layout="D", backing="-base.raw", no_probe=True))
        (path / "a:b").rename(path / "a:b.qed")
        assert run(["qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "1M"], cwd=path).rc == 0
    return paths


@pytest.mark.parametrize("line", [line for line in (GETOPT + SIZES + PROTOCOLS + OPTIONS).splitlines() if line])
def test_exit_codes_and_files(line: str, both: tuple[Path, Path]) -> None:
    words = shlex.split(line)
    before = sorted(os.listdir(both[0]))
    theirs, ours = run(["qemu-img", *words], cwd=both[0]), qed(*words, cwd=both[1])
    assert "Traceback" not in ours.text
    assert ours.rc == theirs.rc, (ours.text, theirs.text)
    # Where qemu-img fails, it may leave half of a file behind.
    assert sorted(os.listdir(both[1])) == (sorted(os.listdir(both[0])) if ours.rc == 0 else before), ours.text
    assert bool(ours.err) == bool(theirs.err), (ours.text, theirs.text)
    if "json" in line and ours.rc == 0 and ours.out.startswith(("[", "{")):
        shown = json.loads(ours.out)
        assert isinstance(shown, type(json.loads(theirs.out)))
