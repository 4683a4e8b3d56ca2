#!/bin/sh
# Usage: test-installed.sh [DIRECTORY]
# Try the installed packages as a user would. With DIRECTORY, install the .deb files that are in it before (as root).

set -eu

if [ $# -gt 0 ]; then
    directory=$(realpath "$1")
    # A bare system leaves manual pages out when it installs packages.
    rm -f /etc/dpkg/dpkg.cfg.d/docker
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --reinstall "$directory"/*.deb libnbd-bin man-db
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# From elsewhere: nothing may come from the checkout.
cd "$work"

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

qed create -q disk.qed 64M
head -c 3000000 /dev/urandom >data
# nbdkit expands $uri when it runs the command.
nbdkit -U - qed file=disk.qed --run 'nbdinfo --size "$uri"' >size
[ "$(cat size)" = 67108864 ] || fail "nbdinfo tells the size $(cat size)"
truncate -s 64M data
nbdkit -U - qed file=disk.qed --run 'nbdcopy --flush data "$uri"'
qed check disk.qed
qed convert -f qed -O raw disk.qed back
cmp data back || fail 'what was copied in does not come out'

for page in qed nbdkit-qed-plugin; do
    man -w "$page" >/dev/null || fail "man does not find $page"
done
[ -e /usr/share/bash-completion/completions/qed ] || fail 'no bash completion'
# dpkg knows all of it: nothing was made at run time but what python3 compiled.
[ "$(readlink -f "$(command -v qed)")" = /usr/bin/qed ] || fail "qed is $(command -v qed)"
[ -e /usr/lib/systemd/system/nbdkit-qed@.socket ] || fail 'no systemd units'
echo 'The installed packages work.'
