#!/usr/bin/env bash
# Runs the complete device flow on one machine: token, key ceremony, daemon, 100 devices, one wiped and recovered.
# All files are kept under target/demo/ for inspection; the next run deletes them first.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'END'
usage: deploy/demo/demo.sh [--keep-running] [--devices N] [--directory DIR] [--port N] [--profile NAME | --bin DIR]
                           [-- COMMAND...]

  --keep-running   keep the daemon running and print commands to try; Ctrl-C stops it
  --devices N      number of devices to provision (default: 100)
  --directory DIR  output directory (default: target/demo); deleted first if a demo created it
  --port N         first of three consecutive ports (default: 7443; if in use, the next free ones)
  --profile NAME   cargo profile to build with, dev or release (default: dev, which builds in half the time)
  --bin DIR        directory of sppd, sppctl and spp-line; skips the build
  -- COMMAND...    run this command against the daemon instead of the demo; its environment has SPP_DIRECTORY, SPP_LINE,
                   SPP_OFFICER, SPP_PUBLIC (host:port) and SPP_BIN
END
}

main() {
    dir=target/demo profile=dev devices=100 keep_running=no begun=no daemon='' bin='' first_port=7443 command=()
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

# Prints a command as a user would type it, even if its output goes to a file, then runs it.
run() {
    { printf '   $'; printf ' %s' "${@/#"$PWD/"/}"; printf '\n'; } >&3
    "$@"
}

begin_afresh() {
    mkdir -p -- "$(dirname -- "$dir")"
    # The lock protects the directory while this script or the daemon, which inherits the lock, is running.
    exec 8>"$dir.lock"
    flock -n 8 || fail "another demo uses $dir: stop it first"
    if [ -e "$dir" ] && [ ! -e "$dir/.made-by-demo" ]; then
        fail "$dir was not created by the demo: remove it yourself, or use another --directory"
    fi
    rm -rf -- "$dir"
    mkdir -p -- "$dir"
    : >"$dir/.made-by-demo"
    begun=yes
    dir=$(cd -- "$dir" && pwd)

    cp -R -- deploy/demo/sppd.toml deploy/demo/hsm.toml deploy/demo/ceremony.toml deploy/demo/profiles hsm-config "$dir/"
    choose_ports
}

# Selects the first port and the two after it, or the next three that are free.
choose_ports() {
    local base
    for base in $(seq "$first_port" 10 $((first_port + 200))); do
        if port_is_free "$base" && port_is_free $((base + 1)) && port_is_free $((base + 2)); then
            line=127.0.0.1:$base officer=127.0.0.1:$((base + 1)) public=127.0.0.1:$((base + 2))
            sed -i "s/127.0.0.1:7443/$line/; s/127.0.0.1:7444/$officer/; s/127.0.0.1:7445/$public/" "$dir/sppd.toml"
            return
        fi
    done
    fail "no three consecutive ports from $first_port to $((first_port + 202)) are free on 127.0.0.1"
}

port_is_free() {
    ! (exec 4<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

build() {
    if [ -n "$bin" ]; then return; fi
    step "Build (profile $profile; the first build takes some minutes)"
    command -v cargo >/dev/null || fail 'Rust is not installed: see https://rustup.rs'
    run cargo build --locked --bins --profile "$profile" 8>&-
    local folder=$profile
    if [ "$profile" = dev ]; then folder=debug; fi
    bin=$PWD/${CARGO_TARGET_DIR:-target}/$folder
    case ${CARGO_TARGET_DIR:-} in /*) bin=$CARGO_TARGET_DIR/$folder ;; esac
}

make_token() {
    step 'SoftHSM token'
    deploy/setup.sh demo
    run softhsm-setup/setup.sh --dir "$dir/hsm" --label spp-demo --sppctl "$bin/sppctl"
}

run_ceremony() {
    step 'Key ceremony: manufacturer key, master key, access CA, all inside the token'
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
    step 'Daemon'
    run "$bin/sppd" --config "$dir/sppd.toml" --check
    "$bin/sppd" --config "$dir/sppd.toml" >"$dir/sppd.log" 2>&1 &
    daemon=$!
    printf '   started sppd (pid %s), log in %s\n' "$daemon" "${dir#"$PWD/"}/sppd.log"
    run "$bin/sppctl" status --server "https://$officer" --tls "$dir/tls/officer" --wait 30s &
    local ready=$!
    # Waits for the first of the two, so that a daemon that exits is noticed at once.
    wait -n "$daemon" "$ready" || true
    if ! kill -0 "$daemon" 2>/dev/null; then
        kill "$ready" 2>/dev/null || true
        fail 'sppd exited before it was ready'
    fi
    wait "$ready" || fail 'sppd was not ready within 30 s'
}

run_command() {
    step "${command[*]}"
    SPP_DIRECTORY=$dir SPP_LINE=$line SPP_OFFICER=$officer SPP_PUBLIC=$public SPP_BIN=$bin "${command[@]}"
}

provision() {
    step "Provision $devices phones, 32 in parallel"
    run "$bin/spp-line" provision --simulate "$devices" --parallel 32 --profile phone \
        --server "https://$line" --tls "$dir/tls/line-1-a" \
        --devices "$dir/devices" --manufacturer "$dir/keys/manufacturer-ca.pem" --log "$dir/keys/log-1.vkey" \
        --report "$dir/report.csv" |
        tee "$dir/provision.txt"
}

wipe_and_recover() {
    chip=$(first_chip "$dir/report.csv")
    [ -n "$chip" ] || fail "no chip ID found in $dir/report.csv"
    step "Wipe chip $chip and recover it from the public database"
    run "$bin/spp-line" wipe --chip "$chip" --devices "$dir/devices"
    run "$bin/spp-line" recover --chip "$chip" --devices "$dir/devices" \
        --server "https://$public" --ca "$dir/tls/server/ca.pem" | tee "$dir/recover.txt"
}

# Prints the chip_id of the first device in the report. The column may be at any position.
first_chip() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "chip_id") column = i }
             NR == 2 && column { gsub(/["\r]/, "", $column); print $column }' "$1"
}

verify_certificate() {
    step 'Verify the device certificate with OpenSSL'
    run "$bin/spp-line" show --chip "$chip" --server "https://$public" --ca "$dir/tls/server/ca.pem" \
        --certificate-out "$dir/one.pem"
    run openssl verify -x509_strict -CAfile "$dir/keys/manufacturer-ca.pem" "$dir/one.pem"
}

mirror() {
    step 'Verify and mirror the public database'
    run "$bin/sppctl" registry verify "https://$public" --ca "$dir/tls/server/ca.pem" \
        --log "$dir/keys/log-1.vkey" --issuer "$dir/keys/manufacturer-ca.pem" --seen "$dir/seen.checkpoint"
    run "$bin/sppctl" registry export "$dir/mirror" --config "$dir/sppd.toml"
    run "$bin/spp-line" wipe --chip "$chip" --devices "$dir/devices"
    run "$bin/spp-line" recover --chip "$chip" --devices "$dir/devices" --from "$dir/mirror" >"$dir/from-mirror.txt"
    printf '   %s\n' 'wiped again and recovered from the mirror only'
}

summary() {
    local here=${dir#"$PWD/"}
    step 'Summary'
    sed 's/^/   /' "$dir/provision.txt" "$dir/recover.txt"
    cat <<END

   $here/report.csv             one line per device
   $here/devices/               the devices: ROM and flash, as files
   $here/one.pem                the certificate of $chip
   $here/keys/                  results of the ceremony: certificates, key manifest, transcript
   $here/sppd.toml, profiles/   the configuration
   $here/state/, public/        the stores
   $here/mirror/                a copy of the public database for any web server
   $here/hsm/                   the SoftHSM token and its PINs
   $here/sppd.log               the daemon's log
END
}

stay() {
    local here=${dir#"$PWD/"} tool=${bin#"$PWD/"}
    cat <<END

== Daemon running: line $line, officers $officer, public $public. Ctrl-C stops it. Commands to try:

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

# Runs at every exit: stops the daemon and, after a failure, prints the end of its log.
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
            printf '\ndemo: end of %s:\n' "$dir/sppd.log" >&2
            tail -n 25 -- "$dir/sppd.log" >&2
        fi
        printf 'demo: failed (status %s); all files are kept in %s\n' "$status" "$dir" >&2
    fi
    exit "$status"
}

main "$@"
