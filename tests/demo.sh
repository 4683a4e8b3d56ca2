#!/bin/sh
# `make demo`: a file system goes into a new QED image and comes out again, and every step is checked.

set -eu
PATH=$PATH:/usr/sbin:/sbin
: "${PYTHON:=/usr/bin/python3}"
top=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$top" PYTHONDONTWRITEBYTECODE=1

dir=$(mktemp -d /tmp/qed.XXXXXX)
server=
finish() {
    status=$?
    [ -z "$server" ] || kill "$server" 2>/dev/null || :
    wait
    rm -rf "$dir"
    [ $status = 0 ] || echo "FAILED (exit code $status)" >&2
    exit $status
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

step() { printf '* %s\n' "$*"; }

# serve OPTION...: start a server of the image, and wait until it answers.
serve() {
    rm -f "$dir/sock" "$dir/pid"
    nbdkit -f --exit-with-parent -U "$dir/sock" -P "$dir/pid" "$@" \
        python "$top/plugin/qed.py" file="$dir/disk.qed" &
    server=$!
    until [ -e "$dir/pid" ]; do
        kill -0 "$server" 2>/dev/null || { echo 'the server did not start' >&2; exit 1; }
        sleep 0.1
    done
}

# Ask it to end, and expect a clean end.
stop() {
    kill "$server"
    pid=$server
    server=
    wait "$pid"
}

uri="nbd+unix:///?socket=$dir/sock"

step 'make an ext4 file system of 256 MiB with files in it'
mkdir -p "$dir/files/empty" "$dir/files/source"
cp -R "$top/plugin" "$top/qedcore" "$top/README.md" "$top/LICENSE" "$dir/files/source"
head -c 20000000 /dev/urandom >"$dir/files/random"
: >"$dir/files/sparse"
dd if=/dev/urandom of="$dir/files/sparse" bs=4096 count=1 seek=10000 2>/dev/null
ln -s source/README.md "$dir/files/link"
mke2fs -q -t ext4 -d "$dir/files" "$dir/disk.raw" 256M >"$dir/log"

step 'create a QED image'
(cd "$top" && "$PYTHON" -m qedcore create "$dir/disk.qed" 256M) >"$dir/log" ||
    { cat "$dir/log"; exit 1; }

step 'copy the file system in (nbdcopy)'
serve
nbdcopy "$dir/disk.raw" "$uri"

step 'look at the served image (nbdinfo)'
nbdinfo "$uri" >"$dir/log"
grep -E 'export-size|is_read_only|can_(flush|fua|multi_conn|trim|zero):' "$dir/log" |
    sed 's/^[[:space:]]*/    /'

step 'copy it out (nbdcopy), check the file system (e2fsck), compare the bytes'
nbdcopy "$uri" "$dir/out.raw"
e2fsck -n -f "$dir/out.raw" >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
cmp "$dir/disk.raw" "$dir/out.raw"

if command -v qemu-img >/dev/null; then
    step 'convert it to qcow2 over NBD (qemu-img convert), compare'
    qemu-img convert -f raw -O qcow2 "$uri" "$dir/out.qcow2"
    qemu-img compare -f raw -F qcow2 "$dir/disk.raw" "$dir/out.qcow2" >"$dir/log" ||
        { cat "$dir/log"; exit 1; }
fi
stop

checked='every copy is identical, and every check is clean.'
if qemu-img create -q -f qed "$dir/theirs.qed" 64K 2>"$dir/log"; then
    step 'check and compare the QED file itself (qemu-img check, compare)'
    qemu-img check -q -f qed "$dir/disk.qed"
    qemu-img compare -f raw -F qed "$dir/disk.raw" "$dir/disk.qed" >"$dir/log" ||
        { cat "$dir/log"; exit 1; }
else
    step 'skipped qemu-img check: this QEMU has no QED driver'
    checked="every copy is identical; QEMU's own checks were skipped."
fi

step 'serve it again, read-only, and compare once more'
serve -r
nbdcopy "$uri" "$dir/again.raw"
cmp "$dir/disk.raw" "$dir/again.raw"
stop

echo "OK: $checked"
