#!/bin/sh
# Installs the packages that `make demo` and `make test` need besides Rust, a C compiler and Python. This is the only list of them.
# It can be run repeatedly: installed packages are not changed, and missing ones are named before they are installed.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

usage() {
    cat <<'END'
Installs missing Debian packages that the demo or the tests need.

usage: deploy/setup.sh demo|test [--list]

  demo     packages for `make demo`: SoftHSM, OpenSSL
  test     also packages for `make test`: two more PKCS#11 modules, a browser
  --list   only print the missing packages, one per line

On other systems it prints the missing packages; install them yourself. Needs root or sudo.
END
}

# Each line: the package, and how to detect it (or the same software from another source).
for_demo='
softhsm2            program softhsm2-util
openssl             program openssl
util-linux          program flock
'
# Kryoptic is built from source: libclang generates its bindings to OpenSSL and SQLite, and pkg-config finds the libraries.
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

is_installed() {
    case $1 in
        program) command -v "$2" >/dev/null ;;
        file) [ -e "$2" ] ;;
        # libclang-cpp is a different library.
        libclang) [ -n "$(find /usr/lib/llvm-*/lib -name 'libclang.so*' -o -name 'libclang-[0-9]*.so*' 2>/dev/null)" ] ;;
        # Debian's Python has the venv module, but not its dependency ensurepip.
        venv) python3 -c 'import venv, ensurepip' 2>/dev/null ;;
    esac
}

missing() {
    printf '%s\n' "$1" | while read -r package kind what; do
        if [ -n "$package" ] && ! is_installed "$kind" "$what"; then printf '%s\n' "$package"; fi
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
    fail "missing packages (Debian names): $packages. Install them with your package manager." \
        "On Fedora, $here/../softhsm-setup/setup.sh --install-only installs SoftHSM"
fi
become=''
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "missing packages: $packages. As root, run: apt-get install -y $packages"
    # Without a terminal, sudo cannot ask for a password and must not wait for one.
    if [ -t 0 ]; then become=sudo; else become='sudo -n'; fi
fi
install="${become:+$become }apt-get install -y --no-install-recommends $packages"
printf 'setup: installing packages for %s: %s\n' "$1" "$install" >&2
# The package lists of a new container are empty or old. If the installation fails, update them and try once more.
# shellcheck disable=SC2086  # commands that must be split into words
{ DEBIAN_FRONTEND=noninteractive $install >/dev/null 2>&1 ||
    { $become apt-get update >/dev/null && DEBIAN_FRONTEND=noninteractive $install >/dev/null; }; } ||
    fail "installation failed. As root, run: apt-get update && apt-get install -y $packages"
