#!/bin/sh
# `make run` as a newcomer uses it: wait until it serves, run the first command that it says, end it as Ctrl-C does.

set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || kill -s INT -- "-$server" 2>/dev/null || :
    wait
    rm -rf "$dir"
}
trap finish EXIT

mkfifo "$dir/said"
# A process group of its own, as on a terminal: Ctrl-C reaches make and all that it runs.
setsid make run FILE="$dir/first.qed" SIZE=64M >"$dir/said" &
server=$!
exec 3<"$dir/said"
try=
while read -r line <&3; do
    printf '%s\n' "$line"
    case $line in
        nbdinfo*) try=$line ;;
        Ctrl-C*) break ;;
    esac
done
[ -n "$try" ] || { echo 'make run ended, or does not say what to try' >&2; exit 1; }
size=$(sh -c "${try%% *} --size ${try#* }")
[ "$size" = $((64 << 20)) ] || { echo "make run serves $size bytes, not 64 MiB" >&2; exit 1; }

kill -s INT -- "-$server"
pid=$server
server=
wait "$pid"
echo 'OK: served until Ctrl-C.'
