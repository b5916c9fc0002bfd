#!/bin/sh
# Makes the PKCS#11 modules that the conformance suite runs on, beside SoftHSM: Kryoptic is built once, opencryptoki is installed, and
# its daemon started. Can be repeated. Needs root for what has to be installed (deploy/setup.sh does that).
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
modules=$here/../../target/modules

fail() {
    printf 'modules: %s\n' "$*" >&2
    exit 1
}

# Those of that name, without the help of procps.
pids_of() {
    for comm in /proc/[0-9]*/comm; do
        if [ "$(cat "$comm" 2>/dev/null)" = "$1" ]; then
            pid=${comm#/proc/}
            printf '%s\n' "${pid%/comm}"
        fi
    done
}

# The software token of opencryptoki is one for the whole machine. It is made anew if it is nobody's: never initialised, or by the
# conformance suite.
fresh_opencryptoki() {
    token=$(pkcsconf -t -c 3) || fail 'slot 3 of opencryptoki cannot be read; does pkcsslotd run?'
    case $token in
        *'IBM SoftTok'*) ;;
        *) fail 'slot 3 of opencryptoki is not the software token' ;;
    esac
    case $token in
        *SO_PIN_TO_BE_CHANGED* | *spp-conformance*) ;;
        *) fail 'slot 3 of opencryptoki has a token of somebody; it is not touched' ;;
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

# Kept outside of the build directory under a name that says what it was made from, so that a new clone need not build it again.
kryoptic() {
    made_from=$({ cat "$here/kryoptic/Cargo.lock" "$here/kryoptic/Cargo.toml"; rustc --version; openssl version; uname -m; } |
        sha256sum | cut -c 1-16)
    kept=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/spp/libkryoptic_pkcs11-$made_from.so
    if [ ! -e "$kept" ]; then
        echo 'modules: building Kryoptic; this is done once and takes some minutes' >&2
        cargo build --quiet --locked --manifest-path "$here/kryoptic/Cargo.toml" --target-dir "$modules"
        set -- "$modules"/debug/deps/libkryoptic_pkcs11-*.so
        [ -e "$1" ] || fail 'Kryoptic was built and gave no module'
        mkdir -p "${kept%/*}"
        cp "$1" "$kept.$$"
        mv "$kept.$$" "$kept"
    fi
    mkdir -p "$modules"
    ln -sf "$kept" "$modules/libkryoptic_pkcs11.so"
}

"$here/../../deploy/setup.sh" test
kryoptic

# The daemon keeps no PIN and no key; it counts who uses which slot.
if [ -z "$(pids_of pkcsslotd)" ]; then
    pkcsslotd || fail 'pkcsslotd does not start; it needs root, or the group pkcs11'
fi
