#!/bin/sh
# Makes the PKCS#11 modules that the conformance suite runs on, beside SoftHSM: Kryoptic is built once, opencryptoki is installed, and
# its daemon started. Can be repeated. Needs root for what has to be installed.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
modules=$here/../../target/modules

fail() {
    printf 'modules: %s\n' "$*" >&2
    exit 1
}

need() {
    apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 || {
        apt-get update >/dev/null 2>&1 && apt-get install -y --no-install-recommends "$@" >/dev/null
    } || fail "these packages are needed: $*; as root, run: apt-get install -y $*"
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
    pkill -x pkcsslotd || true
    while pgrep -x pkcsslotd >/dev/null; do sleep 0.1; done
    rm -rf /var/lib/opencryptoki/swtok /dev/shm/var.lib.opencryptoki.swtok
    install -d -g pkcs11 -m 770 /var/lib/opencryptoki/swtok /var/lib/opencryptoki/swtok/TOK_OBJ
    pkcsslotd || fail 'pkcsslotd does not start'
}

if [ "${1-}" = --fresh-opencryptoki ]; then
    fresh_opencryptoki
    exit
fi

if ! command -v pkcsslotd >/dev/null || ! command -v pkcsconf >/dev/null; then
    need opencryptoki
fi
# Kryoptic's bindings to OpenSSL are made by libclang; libclang-cpp is another library.
libclang=$(find /usr/lib/llvm-*/lib -name 'libclang.so*' -o -name 'libclang-[0-9]*.so*' 2>/dev/null) || true
if [ ! -e /usr/include/openssl/evp.h ] || [ -z "$libclang" ]; then
    need libssl-dev libclang-dev clang
fi
cargo build --quiet --locked --manifest-path "$here/kryoptic/Cargo.toml" --target-dir "$modules"
set -- "$modules"/debug/deps/libkryoptic_pkcs11-*.so
[ -e "$1" ] || fail 'Kryoptic was built and gave no module'
ln -sf "$1" "$modules/libkryoptic_pkcs11.so"

# The daemon keeps no PIN and no key; it counts who uses which slot.
if ! pgrep -x pkcsslotd >/dev/null; then
    pkcsslotd || fail 'pkcsslotd does not start; it needs root, or the group pkcs11'
fi
