#!/usr/bin/env bash
# The whole way of a device on one machine: token, key ceremony, daemon, 100 devices, one wiped and recovered.
# Everything it makes is under target/demo/ and stays there to be looked at; a second run begins afresh.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'END'
usage: deploy/demo/demo.sh [--keep-running] [--devices N] [--directory DIR] [--port N] [--profile release|dev | --bin DIR]
                           [-- COMMAND...]

  --keep-running   leave the daemon running and print what to try; Ctrl-C ends it
  --devices N      how many devices to provision (default: 100)
  --directory DIR  where everything goes (default: target/demo); removed first if a demo made it
  --port N         the first of three ports (default: 7443; the next that are free are taken)
  --profile NAME   the cargo profile to build with (default: release)
  --bin DIR        take sppd, sppctl and spp-line from there and build nothing
  -- COMMAND...    run this against the daemon instead of the tour; it finds SPP_DIRECTORY, SPP_LINE, SPP_OFFICER,
                   SPP_PUBLIC (host:port) and SPP_BIN in its environment
END
}

main() {
    dir=target/demo profile=release devices=100 keep_running=no begun=no daemon='' bin='' first_port=7443 command=()
    parse_arguments "$@"
    exec 3>&1
    trap finish EXIT
    trap 'exit 130' INT TERM HUP

    begin_afresh
    build
    make_token
    run_ceremony
    enroll_callers
    start_daemon
    if [ ${#command[@]} -gt 0 ]; then
        run_command
        return
    fi
    provision
    wipe_and_recover
    verify_certificate
    mirror
    summary
    if [ "$keep_running" = yes ]; then
        stay
    fi
}

parse_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --keep-running) keep_running=yes ;;
            --devices) devices=${2:?--devices needs a number}; shift ;;
            --directory) dir=${2:?--directory needs a path}; shift ;;
            --profile) profile=${2:?--profile needs a name}; shift ;;
            --bin) bin=$(cd -- "${2:?--bin needs a directory}" && pwd); shift ;;
            --port) first_port=${2:?--port needs a number}; shift ;;
            --) shift; command=("$@"); return ;;
            -h | --help) usage; exit 0 ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
}

step() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'demo: %s\n' "$*" >&2
    exit 1
}

# Shows a command as one would type it, also when its output goes to a file, then runs it.
run() {
    { printf '   $'; printf ' %s' "${@/#"$PWD/"/}"; printf '\n'; } >&3
    "$@"
}

begin_afresh() {
    mkdir -p -- "$(dirname -- "$dir")"
    # Whoever holds this lock uses the directory: this script, and the daemon that inherits it.
    exec 8>"$dir.lock"
    flock -n 8 || fail "another demo is running from $dir: end it first"
    if [ -e "$dir" ] && [ ! -e "$dir/.made-by-demo" ]; then
        fail "$dir was not made by the demo: remove it yourself, or give another --directory"
    fi
    rm -rf -- "$dir"
    mkdir -p -- "$dir"
    : >"$dir/.made-by-demo"
    begun=yes
    dir=$(cd -- "$dir" && pwd)

    cp -R -- deploy/demo/sppd.toml deploy/demo/hsm.toml deploy/demo/ceremony.toml deploy/demo/profiles hsm-config "$dir/"
    choose_ports
}

# The first port and the two behind it, or the next three that are free.
choose_ports() {
    local base
    for base in $(seq "$first_port" 10 $((first_port + 200))); do
        if port_is_free "$base" && port_is_free $((base + 1)) && port_is_free $((base + 2)); then
            line=127.0.0.1:$base officer=127.0.0.1:$((base + 1)) public=127.0.0.1:$((base + 2))
            sed -i "s/127.0.0.1:7443/$line/; s/127.0.0.1:7444/$officer/; s/127.0.0.1:7445/$public/" "$dir/sppd.toml"
            return
        fi
    done
    fail "no three neighbouring ports from $first_port to $((first_port + 202)) are free on 127.0.0.1"
}

port_is_free() {
    ! (exec 4<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

build() {
    if [ -n "$bin" ]; then return; fi
    step "Building (profile $profile; the first time this takes some minutes)"
    command -v cargo >/dev/null || fail 'Rust is missing: see https://rustup.rs'
    run cargo build --locked --bins --profile "$profile" 8>&-
    local folder=$profile
    if [ "$profile" = dev ]; then folder=debug; fi
    bin=$PWD/${CARGO_TARGET_DIR:-target}/$folder
    case ${CARGO_TARGET_DIR:-} in /*) bin=$CARGO_TARGET_DIR/$folder ;; esac
}

make_token() {
    step 'A SoftHSM token of our own'
    deploy/setup.sh demo
    run softhsm-setup/setup.sh --dir "$dir/hsm" --label spp-demo --sppctl "$bin/sppctl"
}

run_ceremony() {
    step 'The key ceremony: manufacturer key, master key, access CA, all inside the token'
    run "$bin/sppctl" ceremony run "$dir/ceremony.toml" --hsm "$dir/hsm.toml" --out "$dir/keys"
    run "$bin/sppctl" init --config "$dir/sppd.toml"
}

enroll_callers() {
    step 'Certificates for mutual TLS: the daemon, a station, an officer'
    run "$bin/sppctl" server enroll --config "$dir/sppd.toml" --dns localhost --ip 127.0.0.1 --out "$dir/tls/server"
    run "$bin/sppctl" station enroll line-1/a --config "$dir/sppd.toml" --out "$dir/tls/line-1-a"
    run "$bin/sppctl" officer enroll o-1 --config "$dir/sppd.toml" --out "$dir/tls/officer"
}

start_daemon() {
    step 'The daemon'
    run "$bin/sppd" --config "$dir/sppd.toml" --check
    "$bin/sppd" --config "$dir/sppd.toml" >"$dir/sppd.log" 2>&1 &
    daemon=$!
    printf '   started sppd (pid %s), log in %s\n' "$daemon" "${dir#"$PWD/"}/sppd.log"
    run "$bin/sppctl" status --server "https://$officer" --tls "$dir/tls/officer" --wait 30s &
    local ready=$!
    # Whichever ends first: a daemon that dies is not waited for.
    wait -n "$daemon" "$ready" || true
    if ! kill -0 "$daemon" 2>/dev/null; then
        kill "$ready" 2>/dev/null || true
        fail 'sppd ended before it was ready'
    fi
    wait "$ready" || fail 'sppd was not ready within 30 s'
}

run_command() {
    step "${command[*]}"
    SPP_DIRECTORY=$dir SPP_LINE=$line SPP_OFFICER=$officer SPP_PUBLIC=$public SPP_BIN=$bin "${command[@]}"
}

provision() {
    step "$devices phones, 32 in flight"
    run "$bin/spp-line" provision --simulate "$devices" --parallel 32 --profile phone \
        --server "https://$line" --tls "$dir/tls/line-1-a" \
        --devices "$dir/devices" --manufacturer "$dir/keys/manufacturer-ca.pem" --log "$dir/keys/log-1.vkey" \
        --report "$dir/report.csv" |
        tee "$dir/provision.txt"
}

wipe_and_recover() {
    chip=$(first_chip "$dir/report.csv")
    [ -n "$chip" ] || fail "no chip ID found in $dir/report.csv"
    step "Chip $chip loses its flash, and gets everything back from the public database"
    run "$bin/spp-line" wipe --chip "$chip" --devices "$dir/devices"
    run "$bin/spp-line" recover --chip "$chip" --devices "$dir/devices" \
        --server "https://$public" --ca "$dir/tls/server/ca.pem" | tee "$dir/recover.txt"
}

# The chip_id of the first device in the report, wherever that column is.
first_chip() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "chip_id") column = i }
             NR == 2 && column { gsub(/["\r]/, "", $column); print $column }' "$1"
}

verify_certificate() {
    step 'Its certificate, checked by OpenSSL'
    run "$bin/spp-line" show --chip "$chip" --server "https://$public" --ca "$dir/tls/server/ca.pem" \
        --certificate-out "$dir/one.pem"
    run openssl verify -x509_strict -CAfile "$dir/keys/manufacturer-ca.pem" "$dir/one.pem"
}

mirror() {
    step 'The whole database, as anybody can check and copy it'
    run "$bin/sppctl" registry verify "https://$public" --ca "$dir/tls/server/ca.pem" \
        --log "$dir/keys/log-1.vkey" --issuer "$dir/keys/manufacturer-ca.pem" --seen "$dir/seen.checkpoint"
    run "$bin/sppctl" registry export "$dir/mirror" --config "$dir/sppd.toml"
    run "$bin/spp-line" wipe --chip "$chip" --devices "$dir/devices"
    run "$bin/spp-line" recover --chip "$chip" --devices "$dir/devices" --from "$dir/mirror" >"$dir/from-mirror.txt"
    printf '   %s\n' 'wiped once more, and recovered from the mirror alone'
}

summary() {
    local here=${dir#"$PWD/"}
    step 'Summary'
    sed 's/^/   /' "$dir/provision.txt" "$dir/recover.txt"
    cat <<END

   $here/report.csv             one line for each device
   $here/devices/               the devices: ROM and flash, as files
   $here/one.pem                the certificate of $chip
   $here/keys/                  what the ceremony made: certificates, key names, transcript
   $here/sppd.toml, profiles/   the configuration
   $here/state/, public/        the stores
   $here/mirror/                a copy of the public database for any web server
   $here/hsm/                   the SoftHSM token and its PINs
   $here/sppd.log               what the daemon said
END
}

stay() {
    local here=${dir#"$PWD/"} tool=${bin#"$PWD/"}
    cat <<END

== The daemon is running: line $line, officers $officer, public $public. Ctrl-C ends it. To try:

   $tool/spp-line provision --simulate 1000 --parallel 32 --profile phone --server https://$line \\
       --tls $here/tls/line-1-a --devices $here/devices --manufacturer $here/keys/manufacturer-ca.pem \\
       --log $here/keys/log-1.vkey --report $here/more.csv
   $tool/spp-line show --chip $chip --server https://$public --ca $here/tls/server/ca.pem
   $tool/sppctl status --server https://$officer --tls $here/tls/officer
   openssl x509 -in $here/one.pem -noout -text
   curl --cacert $here/tls/server/ca.pem https://$public/v1/devices/$chip
   a browser at https://$public/
   tail -f $here/sppd.log
END
    trap 'exit 0' INT TERM
    wait "$daemon"
}

# Runs at every exit: stops what was started, and says where to look when something failed.
finish() {
    local status=$?
    trap - EXIT INT TERM HUP
    if [ -n "$daemon" ] && kill -TERM "$daemon" 2>/dev/null; then
        for _ in $(seq 100); do
            kill -0 "$daemon" 2>/dev/null || break
            sleep 0.1
        done
        if kill -KILL "$daemon" 2>/dev/null; then echo 'demo: sppd did not stop within 10 s and was killed' >&2; fi
    fi
    if [ "$begun" = yes ] && [ "$status" -ne 0 ] && [ "$status" -ne 130 ]; then
        if [ -s "$dir/sppd.log" ]; then
            printf '\ndemo: the end of %s:\n' "$dir/sppd.log" >&2
            tail -n 25 -- "$dir/sppd.log" >&2
        fi
        printf 'demo: failed (status %s); everything is still in %s\n' "$status" "$dir" >&2
    fi
    exit "$status"
}

main "$@"
