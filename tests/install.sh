#!/bin/sh
# Usage: install.sh PACKAGE... [-- PACKAGE...]
# Install those of the named Debian packages whose tools are missing, by apt-get, dnf or zypper.  Those after "--" are
# wished for: without them things are left out.  When nothing is missing, no package manager nor sudo is called.

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
        systemd) command -v systemd-socket-activate ;;
        fuse3) command -v fusermount3 ;;
        perl) command -v pod2man ;;  # perl-base alone does not have it
        build-essential) dpkg -s build-essential ;;  # dpkg-buildpackage asks dpkg, too
        debhelper) command -v dh ;;
        dh-python) command -v dh_python3 ;;
        gnutls-bin) command -v psktool && command -v certtool ;;
        *) command -v "$1" ;;
    esac >/dev/null 2>&1
}

missing() {
    for package; do
        present "$package" || printf ' %s' "$package"
    done
}

# What this system's packages are called; nothing if a package that is there anyway has it.
translated() {
    for package; do
        case $manager:$package in
            apt-get:*) ;;
            *:python3-venv) package=python3 ;;
            *:nbdkit-plugin-python) package=nbdkit-python-plugin ;;
            *:libnbd-bin) package=libnbd ;;
            dnf:qemu-utils) package=qemu-img ;;
            zypper:qemu-utils) package=qemu-tools ;;
            dnf:perl) package=perl-podlators ;;
            dnf:gnutls-bin) package=gnutls-utils ;;
            zypper:gnutls-bin) package=gnutls ;;
        esac
        printf ' %s' "$package"
    done
}

# Named packages, which are this system's.
install_named() {
    case $manager in
        apt-get)
            $sudo apt-get update -q &&
                $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
            ;;
        dnf) $sudo dnf install -q -y --setopt=install_weak_deps=False "$@" ;;
        zypper) $sudo zypper --non-interactive --quiet install --no-recommends "$@" ;;
    esac
}

needed= wished= dashes=
for package; do
    case $package in
        --) dashes=yes ;;
        *) if [ -z "$dashes" ]; then needed="$needed $package"; else wished="$wished $package"; fi ;;
    esac
done
# These and $sudo are lists of words.
needed=$(missing $needed)
wished=$(missing $wished)
[ -n "$needed$wished" ] || exit 0

manager=
for name in apt-get dnf zypper; do
    if command -v $name >/dev/null; then
        manager=$name
        break
    fi
done
if [ -z "$manager" ]; then
    echo "missing tools: please install what your distribution calls$needed$wished (the names are Debian's)" >&2
    [ -z "$needed" ] && exit 0
    exit 1
elif [ "$(id -u)" = 0 ]; then
    sudo=
elif command -v sudo >/dev/null; then
    sudo=sudo
else
    echo "missing tools, and neither root nor sudo to install them: $manager install$(translated $needed $wished)" >&2
    [ -z "$needed" ] && exit 0
    exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
all=$(translated $needed $wished)
echo "Installing$all"
if ! install_named $all >"$log" 2>&1 </dev/null && [ $manager != apt-get ]; then
    # RHEL may not have one of them, which keeps back the others: one at a time, what it has is installed.
    for name in $all; do
        install_named "$name" >>"$log" 2>&1 </dev/null || :
    done
fi

needed=$(missing $needed)
wished=$(missing $wished)
if [ -n "$needed" ]; then
    cat "$log" >&2
    echo "still not usable:$(translated $needed)" >&2
    exit 1
fi
[ -z "$wished" ] || echo "not to be had here, what needs it is left out:$(translated $wished)" >&2
