#!/bin/sh
# Creates a private SoftHSM token without root (except for installing SoftHSM) and without system-wide changes.
# Can be repeated: existing files remain, and an interrupted run is completed. See --help and README.md.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

usage() {
    cat <<'END'
Create a private SoftHSM token directory with one token.

usage: setup.sh --dir DIR [--label LABEL] [--pin-file FILE] [--so-pin-file FILE] [--sppctl PATH]
       setup.sh --install-only
       setup.sh --print-module

  --dir DIR            output directory: DIR/tokens, DIR/softhsm2.conf, DIR/user.pin, DIR/so.pin
  --label LABEL        the token's label, 1 to 32 characters (default: spp)
  --pin-file FILE      the user PIN; created with a random PIN if it does not exist (default: DIR/user.pin)
  --so-pin-file FILE   the security officer's PIN; created likewise (default: DIR/so.pin)
  --sppctl PATH        initialise the token with `PATH token init`; otherwise with softhsm2-util on a pseudo-terminal
                       (needs python3)
  --install-only       only install SoftHSM if it is missing (Debian and Ubuntu: apt-get, Fedora: dnf)
  --print-module       print the path of libsofthsm2.so

PINs are never passed on a command line, where every user of the machine could read them.
END
}

fail() {
    printf 'softhsm-setup: %s\n' "$*" >&2
    exit 1
}

main() {
    dir='' label=spp pin_file='' so_pin_file='' sppctl='' install_only=no print_module=no
    while [ $# -gt 0 ]; do
        case $1 in
            --install-only) install_only=yes ;;
            --print-module) print_module=yes ;;
            -h | --help) usage; exit 0 ;;
            --dir | --label | --pin-file | --so-pin-file | --sppctl)
                if [ -z "${2-}" ]; then fail "$1 needs a value; see --help"; fi
                case $1 in
                    --dir) dir=$2 ;;
                    --label) label=$2 ;;
                    --pin-file) pin_file=$2 ;;
                    --so-pin-file) so_pin_file=$2 ;;
                    --sppctl) sppctl=$2 ;;
                esac
                shift ;;
            *) fail "unknown option $1; see --help" ;;
        esac
        shift
    done

    if [ "$print_module" = yes ]; then
        find_module || fail "libsofthsm2.so is not installed: run $0 --install-only"
        return
    fi
    install_softhsm
    if [ "$install_only" = no ]; then
        make_token
    fi
}

# --- installing -----------------------------------------------------------------------------------------------------

find_module() {
    for folder in /usr/lib/softhsm /usr/lib/x86_64-linux-gnu/softhsm /usr/lib/aarch64-linux-gnu/softhsm \
        /usr/lib64/pkcs11 /usr/lib64/softhsm /usr/local/lib/softhsm; do
        if [ -f "$folder/libsofthsm2.so" ]; then
            printf '%s\n' "$folder/libsofthsm2.so"
            return
        fi
    done
    return 1
}

is_installed() {
    command -v softhsm2-util >/dev/null && find_module >/dev/null
}

install_softhsm() {
    if is_installed; then
        return
    fi
    if command -v apt-get >/dev/null; then
        install='apt-get install -y --no-install-recommends softhsm2' refresh='apt-get update'
    elif command -v dnf >/dev/null; then
        install='dnf install -y softhsm' refresh=''
    else
        fail 'SoftHSM 2 is not installed, and there is neither apt-get nor dnf here. Install softhsm2-util and' \
            'libsofthsm2.so 2.6 with your package manager, or from https://github.com/softhsm/SoftHSMv2'
    fi

    become=''
    if [ "$(id -u)" -ne 0 ]; then
        # Without a terminal sudo must not prompt, because nobody could answer.
        if [ -t 0 ]; then become='sudo'; else become='sudo -n'; fi
        command -v sudo >/dev/null || fail "SoftHSM is not installed. As root, run: $install"
    fi
    echo "softhsm-setup: installing SoftHSM: ${become:+$become }$install" >&2
    # A new container has no package lists: fetch them and try again.
    # shellcheck disable=SC2086  # commands, to be split into words
    DEBIAN_FRONTEND=noninteractive $become $install >&2 ||
        { [ -n "$refresh" ] && $become $refresh >&2 && DEBIAN_FRONTEND=noninteractive $become $install >&2; } ||
        fail "cannot install SoftHSM. As root, run: ${refresh:+$refresh && }$install"
    is_installed || fail "SoftHSM was installed, but softhsm2-util or libsofthsm2.so was not found"
}

# --- the token ------------------------------------------------------------------------------------------------------

make_token() {
    [ -n "$dir" ] || fail 'missing option --dir DIR; see --help'
    [ ${#label} -le 32 ] || fail 'a token label has at most 32 characters'
    umask 077
    mkdir -p -- "$dir/tokens"
    dir=$(CDPATH='' cd -- "$dir" && pwd)
    case $dir in
        *'#'* | *'
'*) fail "the path $dir contains a character that softhsm2.conf cannot hold" ;;
    esac
    chmod 700 -- "$dir/tokens"
    : "${pin_file:=$dir/user.pin}" "${so_pin_file:=$dir/so.pin}"

    # Two concurrent runs would create two tokens with the same label.
    exec 9>"$dir/.lock"
    if command -v flock >/dev/null; then
        flock 9
    fi

    write_configuration
    state=$(token_state)
    if [ "$state" != absent ] && ! { [ -s "$pin_file" ] && [ -s "$so_pin_file" ]; }; then
        fail "the token '$label' exists in $dir/tokens, but a PIN file does not ($pin_file, $so_pin_file):" \
            'restore the PIN file, or remove the directory with its content, and run this again'
    fi
    make_pin "$pin_file"
    make_pin "$so_pin_file"
    case $state in
        ready) echo "softhsm-setup: token '$label' is ready in $dir (nothing to do)" ;;
        absent | half) initialise_token ;;
        several) fail "several tokens in $dir/tokens have the label '$label'; remove the directory and run this again" ;;
    esac
}

write_configuration() {
    # removable=false: a missing token directory is an error, not an empty slot. ERROR: at INFO every call is logged to syslog.
    cat >"$dir/softhsm2.conf.new" <<END
directories.tokendir = $dir/tokens
objectstore.backend = file
log.level = ERROR
slots.removable = false
END
    if cmp -s "$dir/softhsm2.conf.new" "$dir/softhsm2.conf"; then
        rm -- "$dir/softhsm2.conf.new"
    else
        mv -- "$dir/softhsm2.conf.new" "$dir/softhsm2.conf"
    fi
    export SOFTHSM2_CONF="$dir/softhsm2.conf"
}

# Prints absent, half (no user PIN yet: an earlier run was interrupted), ready or several.
token_state() {
    slots=$(softhsm2-util --show-slots) || fail "softhsm2-util could not read $dir/tokens"
    printf '%s\n' "$slots" | awk -v wanted="$label" '
        function value(line) { sub(/^[^:]*: */, "", line); sub(/ *$/, "", line); return line }
        /^ *User PIN init\.:/ { pin = value($0) }
        /^ *Label:/ && wanted != "" && value($0) == wanted { found++; state = pin == "yes" ? "ready" : "half" }
        END { print found == 0 ? "absent" : found == 1 ? state : "several" }'
}

# Writes a random PIN of 32 hex digits (128 bits) atomically.
make_pin() {
    if [ -s "$1" ]; then
        chmod go= -- "$1"
        return
    fi
    pin=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    [ ${#pin} -eq 32 ] || fail 'cannot read random numbers from /dev/urandom'
    # printf is a shell builtin, so the PIN is not in any process's argument list.
    printf '%s' "$pin" >"$1.new"
    mv -- "$1.new" "$1"
}

initialise_token() {
    if [ -n "$sppctl" ]; then
        "$sppctl" token init --module "$here/../hsm-config/softhsm2.toml" --directory "$dir" --label "$label" \
            --so-pin-file "$so_pin_file" --pin-file "$pin_file"
    else
        command -v python3 >/dev/null ||
            fail 'cannot initialise the token: specify --sppctl PATH, or install python3'
        # A token without a user PIN is empty, so initialising it again loses nothing.
        if [ "$state" = half ]; then which_token="--token=$label"; else which_token=--free; fi
        python3 "$here/init-token.py" "$label" "$which_token" "$so_pin_file" "$pin_file"
    fi
    state=$(token_state)
    [ "$state" = ready ] || fail "the token was initialised, but is '$state' afterwards: check $dir/tokens"
    # SoftHSM never syncs the files that it writes.
    sync -- "$dir"/tokens/*/* "$dir" "$pin_file" "$so_pin_file"
    echo "softhsm-setup: created token '$label' in $dir"
}

main "$@"
