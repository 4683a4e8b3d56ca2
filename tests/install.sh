#!/bin/sh
# Usage: install.sh PACKAGE...
# Install those of the named Debian packages whose tools are missing.  When nothing is missing,
# neither apt-get nor sudo is called.

set -eu
PATH=$PATH:/usr/sbin:/sbin
: "${PYTHON:=/usr/bin/python3}"

present() {
    case $1 in
        python3) "$PYTHON" -c '' ;;
        python3-venv) "$PYTHON" -c 'import ensurepip, venv' ;;
        python3-libnbd) "$PYTHON" -c 'import nbd' ;;
        python3-numpy) "$PYTHON" -c 'import numpy' ;;
        nbdkit-plugin-python) nbdkit --dump-plugin python ;;
        libnbd-bin) command -v nbdinfo && command -v nbdcopy ;;
        qemu-utils) command -v qemu-img && command -v qemu-io && command -v qemu-nbd ;;
        e2fsprogs) command -v mke2fs && command -v e2fsck ;;
        fuse3) command -v fusermount3 ;;
        perl) command -v pod2man ;;  # perl-base alone does not have it
        gnutls-bin) command -v psktool && command -v certtool ;;
        *) command -v "$1" ;;
    esac >/dev/null 2>&1
}

missing() {
    for package; do
        present "$package" || printf ' %s' "$package"
    done
}

wanted=$(missing "$@")
[ -n "$wanted" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "missing tools: please install what your distribution calls$wanted (the names are Debian's)" >&2
    exit 1
elif [ "$(id -u)" = 0 ]; then
    sudo=
elif command -v sudo >/dev/null; then
    sudo=sudo
else
    echo "missing tools, and neither root nor sudo to install them: apt-get install$wanted" >&2
    exit 1
fi

echo "Installing$wanted"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# $wanted and $sudo are lists of words.
if ! { $sudo apt-get update -q &&
       $sudo env DEBIAN_FRONTEND=noninteractive \
           apt-get install -q -y --no-install-recommends $wanted; } >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    exit 1
fi

wanted=$(missing "$@")
if [ -n "$wanted" ]; then
    echo "installed, but still not usable:$wanted" >&2
    exit 1
fi
