#!/bin/sh
# Sets up the PKCS#11 modules for the conformance suite, besides SoftHSM: builds Kryoptic once, installs opencryptoki and starts
# its daemon. Can be repeated. Installing packages (deploy/setup.sh) requires root.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
modules=$here/../../target/modules

fail() {
    printf 'modules: %s\n' "$*" >&2
    exit 1
}

# Prints the PIDs of the processes with this name, without procps. A daemon of a chroot or of a container that shares /proc has
# other files, and serves only its own root.
pids_of() {
    for comm in /proc/[0-9]*/comm; do
        process=${comm%/comm}
        if [ "$(cat "$comm" 2>/dev/null)" = "$1" ] && [ "$process/root/" -ef / ]; then
            printf '%s\n' "${process#/proc/}"
        fi
    done
}

# Resets opencryptoki's software token, of which the machine has only one. Refuses a token that was initialised by anything other
# than the conformance suite.
fresh_opencryptoki() {
    token=$(pkcsconf -t -c 3) || fail 'cannot read slot 3 of opencryptoki; check that pkcsslotd runs'
    case $token in
        *'IBM SoftTok'*) ;;
        *) fail 'slot 3 of opencryptoki is not the software token' ;;
    esac
    case $token in
        *SO_PIN_TO_BE_CHANGED* | *spp-conformance*) ;;
        *) fail 'slot 3 of opencryptoki has a token of another user; it was not changed' ;;
    esac
    for pid in $(pids_of pkcsslotd); do kill "$pid" || true; done
    while [ -n "$(pids_of pkcsslotd)" ]; do sleep 0.1; done
    rm -rf /var/lib/opencryptoki/swtok /dev/shm/var.lib.opencryptoki.swtok
    install -d -g pkcs11 -m 770 /var/lib/opencryptoki/swtok /var/lib/opencryptoki/swtok/TOK_OBJ
    pkcsslotd || fail 'pkcsslotd does not start'
}

if [ "${1-}" = --fresh-opencryptoki ]; then
    fresh_opencryptoki
    exit
fi

# Caches the module outside the build directory under a hash of its inputs, so that a new clone does not build it again.
kryoptic() {
    inputs_hash=$({ cat "$here/kryoptic/Cargo.lock" "$here/kryoptic/Cargo.toml"; rustc --version; openssl version; uname -m; } |
        sha256sum | cut -c 1-16)
    cached=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/spp/libkryoptic_pkcs11-$inputs_hash.so
    if [ ! -e "$cached" ]; then
        echo 'modules: building Kryoptic once; this takes some minutes' >&2
        cargo build --quiet --locked --manifest-path "$here/kryoptic/Cargo.toml" --target-dir "$modules"
        set -- "$modules"/debug/deps/libkryoptic_pkcs11-*.so
        [ -e "$1" ] || fail 'the Kryoptic build has produced no module'
        mkdir -p "${cached%/*}"
        cp "$1" "$cached.$$"
        mv "$cached.$$" "$cached"
    fi
    mkdir -p "$modules"
    ln -sf "$cached" "$modules/libkryoptic_pkcs11.so"
}

"$here/../../deploy/setup.sh" test
kryoptic

# The daemon stores no PIN and no key; it only tracks slot usage.
if [ -z "$(pids_of pkcsslotd)" ]; then
    pkcsslotd || fail 'pkcsslotd does not start; it needs root, or the group pkcs11'
fi
