#!/bin/sh
# Installs what the two commands of the README need beside Rust, a C compiler and Python: the one list of it. Can be repeated;
# what is there is left alone, and what is installed is named first.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

usage() {
    cat <<'END'
Installs the Debian packages that the demo or the tests need and that are missing.

usage: deploy/setup.sh demo|test [--list]

  demo     what `make demo` needs: SoftHSM, OpenSSL
  test     also what `make test` needs: two more PKCS#11 modules, a browser
  --list   only print what is missing, one package a line

On other systems it names what is missing, and you install it. Needs root, or sudo.
END
}

# Each line: the package, and how to see that it (or the same from elsewhere) is there.
for_demo='
softhsm2            program softhsm2-util
openssl             program openssl
util-linux          program flock
'
# Kryoptic is built from source: its bindings to OpenSSL and SQLite are made by libclang and found by pkg-config.
for_tests='
python3-venv        venv
opencryptoki        program pkcsslotd
pkg-config          program pkg-config
libssl-dev          file /usr/include/openssl/evp.h
libsqlite3-dev      file /usr/include/sqlite3.h
libclang-dev        libclang
clang               program clang
chromium            program chromium
chromium-driver     program chromedriver
util-linux          program setpriv
bsdutils            program script
'

is_there() {
    case $1 in
        program) command -v "$2" >/dev/null ;;
        file) [ -e "$2" ] ;;
        # libclang-cpp is another library.
        libclang) [ -n "$(find /usr/lib/llvm-*/lib -name 'libclang.so*' -o -name 'libclang-[0-9]*.so*' 2>/dev/null)" ] ;;
        # Debian's Python has venv, and not what venv needs.
        venv) python3 -c 'import venv, ensurepip' 2>/dev/null ;;
    esac
}

missing() {
    printf '%s\n' "$1" | while read -r package kind what; do
        if [ -n "$package" ] && ! is_there "$kind" "$what"; then printf '%s\n' "$package"; fi
    done | sort -u
}

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

case ${1-} in
    demo) packages=$(missing "$for_demo") ;;
    test) packages=$(missing "$for_demo$for_tests") ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
case ${2-} in
    '') ;;
    --list) if [ -n "$packages" ]; then printf '%s\n' "$packages"; fi; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
if [ -z "$packages" ]; then exit 0; fi

packages=$(printf '%s' "$packages" | tr '\n' ' ')
if ! command -v apt-get >/dev/null; then
    fail "these are missing (names of Debian's packages): $packages. Install them with your package manager." \
        "$here/../softhsm-setup/setup.sh --install-only knows SoftHSM on Fedora"
fi
become=''
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "these packages are missing: $packages. As root, run: apt-get install -y $packages"
    # Without a terminal nobody could answer sudo's question: it must not wait for one then.
    if [ -t 0 ]; then become=sudo; else become='sudo -n'; fi
fi
install="${become:+$become }apt-get install -y --no-install-recommends $packages"
printf 'setup: installing what %s needs: %s\n' "$1" "$install" >&2
# The package lists of a fresh container are empty or old; then they are fetched and it is tried once more.
# shellcheck disable=SC2086  # commands, to be split into words
{ DEBIAN_FRONTEND=noninteractive $install >/dev/null 2>&1 ||
    { $become apt-get update >/dev/null && DEBIAN_FRONTEND=noninteractive $install >/dev/null; }; } ||
    fail "they could not be installed. As root, run: apt-get update && apt-get install -y $packages"
