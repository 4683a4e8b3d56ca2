#!/bin/bash
# Usage: on_suite.sh [-k DIR] SUITE [COMMAND]
# Build a bare Debian of that suite (bookworm, trixie, sid), clone this checkout into it (what is committed), and run
# COMMAND in the clone as root with a clean environment. Without COMMAND: what README tells a newcomer to run, then lint
# and all tests. The exit code is COMMAND's; all mounts and processes end with it. Needs root, mmdebstrap and git.
#   -k DIR   keep the system in DIR, or use the one that is there again; only the clone is new
#   MIRROR   a mirror or a sources.list, as mmdebstrap takes it
#   TMP=disk leaves /tmp on the disk; else it is in memory where the suite has it so (Debian 13 and later)

set -euo pipefail
self=$(realpath "$0")
top=$(dirname "$(dirname "$self")")

# The second half runs in namespaces of its own, as their process 1: the kernel ends them with it.
if [ "${1:-}" = --inside ]; then
    root=$2 command=$3
    shift 3
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    mkdir -p "$root/run/lock"
    if [ "${TMP:-}" != disk ] && ! grep -q '^VERSION_CODENAME=bookworm' "$root/etc/os-release"; then
        mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    fi
    # Signals that the caller ignores (a CI job's shell ignores SIGINT for it) are not ignored by a newcomer's shell.
    # Not exec: process 1 gets no signal that it has no handler for.
    status=0
    env -i --default-signal=INT,QUIT,PIPE,HUP,TERM HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" "$@" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot "$root" bash -c 'cd "$HOME/qed" && eval "$1"' bash "$command" || status=$?
    exit $status
fi

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$self" >&2
    exit 2
}

tour='make demo && sh tests/first_run.sh && make lint && make check JOBS='${JOBS:-2}

keep=
while getopts k: option; do
    case $option in k) keep=$OPTARG ;; *) usage ;; esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] && [ $# -le 2 ] || usage
suite=$1 command=${2:-$tour}
[ "$(id -u)" = 0 ] || { echo "$0: must be root, to make a chroot" >&2; exit 1; }

work=$(mktemp -d)
child=
finish() {
    # Its mounts are in the child's namespace only: there is nothing to unmount here.
    [ -z "$child" ] || { kill "$child" 2>/dev/null || :; wait "$child" || :; }
    rm -rf --one-file-system "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# How this machine reaches its mirrors, and a Python registry.
apt-config dump 2>/dev/null | grep -E '^Acquire::([a-z]+::)?(Proxy|Verify|CaInfo|Check-)' >"$work/apt.conf" || :
pass=()
for name in {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY CI PIP_{INDEX_URL,TRUSTED_HOST,PROXY,DEFAULT_TIMEOUT}; do
    [ -z "${!name:-}" ] || pass+=("$name=${!name}")
done
cert=${PIP_CERT:-}
if command -v pip >/dev/null; then
    for option in index-url trusted-host proxy; do
        value=$(pip config get "global.$option" 2>/dev/null) || continue
        name=PIP_${option^^}
        pass+=("${name//-/_}=$value")
    done
    cert=${cert:-$(pip config get global.cert 2>/dev/null || :)}
fi
[ -z "$cert" ] || pass+=(PIP_CERT=/etc/registry.crt)

root=${keep:-$work/root}
mkdir -p "$root"
root=$(realpath "$root")
if [ ! -e "$root/etc/registry.crt" ]; then
    echo "Building a bare $suite" >&2
    # A newcomer who has cloned the project has git, and make.
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,git,make --aptopt="$work/apt.conf" \
        --skip=cleanup/apt/lists "$suite" "$root" ${MIRROR:+"$MIRROR"} >&2
    # An installed system has these, a bare one has not.
    printf '%s\n' '127.0.0.1 localhost' '::1 localhost' >"$root/etc/hosts"
    cp "${cert:-/dev/null}" "$root/etc/registry.crt"
fi
cp --remove-destination "$(realpath -m /etc/resolv.conf)" "$root/etc/resolv.conf" || :
rm -rf "$root/root/qed"
# The checkout may be somebody else's, which git wants to be allowed, in this file only.
HOME=$work git config --global safe.directory '*'
HOME=$work git clone -q --no-hardlinks "$top" "$root/root/qed"

unshare --mount --pid --fork --kill-child --propagation private \
    bash "$self" --inside "$root" "$command" "${pass[@]}" <&0 &
child=$!
status=0
wait "$child" || status=$?
child=
exit $status
