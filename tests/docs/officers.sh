#!/usr/bin/env bash
# Runs the commands of docs/officers.md in order, in a temporary directory, and checks that they do what the document says.
set -euo pipefail

usage() {
    cat <<'MSG'
usage: tests/docs/officers.sh [--bin DIR] [--keep]

  --bin DIR   directory of sppd, sppctl and spp-line (default: target/debug)
  --keep      keep the directory and print its path
MSG
}

source=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
bin=$source/target/debug keep=no daemon=''
while [ $# -gt 0 ]; do
    case $1 in
        --bin) bin=$(cd -- "${2:?--bin needs a directory}" && pwd); shift ;;
        --keep) keep=yes ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done
PATH=$bin:$PATH
site=$(mktemp -d)
export XDG_STATE_HOME=$site/seen

finish() {
    local status=$?
    trap - EXIT
    if [ -n "$daemon" ]; then kill -KILL "$daemon" 2>/dev/null || true; fi
    if [ "$status" -ne 0 ] && [ -s "$site/sppd.log" ]; then tail -n 20 -- "$site/sppd.log" >&2; fi
    if [ "$keep" = yes ]; then printf 'files kept in %s\n' "$site"; else rm -rf -- "$site"; fi
    exit "$status"
}
trap finish EXIT

part() { printf '\n== %s\n' "$*"; }

run() {
    printf '$ %s\n' "$*"
    "$@"
}

# Runs a command that must fail with this message.
refused() {
    local why=$1 output
    shift
    printf '$ %s\n' "$*"
    if output=$("$@" 2>&1 </dev/null); then
        printf '%s\ncommand was not refused\n' "$output" >&2
        exit 1
    fi
    printf '%s\n' "$output"
    case $output in *"$why"*) ;; *) printf 'message not found: %s\n' "$why" >&2; exit 1 ;; esac
}

start() {
    sppd --config "${1:-sppd.toml}" >>sppd.log 2>&1 &
    daemon=$!
    run sppctl status "${o1[@]}" --wait 30s
}

stop() {
    kill -TERM "$daemon"
    wait "$daemon"
    daemon=''
}

# Approves the newest pending request as an officer does: reads its hash and types the first digits.
approve() {
    local id hash
    id=$(sppctl approvals list "${o2[@]}" | awk '$2 == "pending" { print $1; exit }')
    hash=$(sppctl approvals show "$id" "${o2[@]}" | awk '$1 == "hash" { print substr($2, 1, 8) }')
    printf '%s\n' "$hash" | run sppctl approvals approve "$id" "${o2[@]}"
}

provision() {
    run spp-line provision --simulate "$1" --profile phone --server "$line" --tls "$station" \
        --devices "$2" --manufacturer "$3" --log keys/log-1.vkey --report "$2.csv"
}

cd -- "$site"
base=$(((RANDOM % 3000) * 10 + 20000))
line=https://127.0.0.1:$base officer=https://127.0.0.1:$((base + 1)) public=https://127.0.0.1:$((base + 2))
o1=(--server "$officer" --tls tls/o-1) o2=(--server "$officer" --tls tls/o-2) station=station/tls

part 'An empty directory'
cp -R "$source/hsm-config" "$source/deploy/demo/profiles" "$source/deploy/demo/hsm.toml" "$source/deploy/demo/sppd.toml" .
sed -i "s/127.0.0.1:7443/${line#https://}/; s/127.0.0.1:7444/${officer#https://}/; s/127.0.0.1:7445/${public#https://}/" sppd.toml
sed -i 's/"256 MiB"/"1 MiB"\nreserve = "1 MiB"/; s/^low = 10/low = 1/; s/^high = 20/high = 2/' sppd.toml
sed -i 's/^# devices_per_hour = .*/devices_per_hour = 1200/; s/^# devices_total = .*/devices_total = 3/' sppd.toml

part 'Token'
run "$source/softhsm-setup/setup.sh" --dir hsm --label spp-demo --sppctl "$bin/sppctl"
run sppctl hsm slots --hsm hsm.toml

part 'Key ceremony'
cat >ceremony.toml <<'TOML'
[[backup_wrapping_key]]
name = "backup-1"
shares = 3
threshold = 2
officers = ["o-1", "o-2", "o-3"]

[[signing_key]]
name = "root"
use = "root"
kind = "p384"
certificate = "self-signed"
subject = { organization = "Example Devices AB", common_name = "Example Root" }
backup = "backup-1"

[[signing_key]]
name = "manufacturer"
kind = "p256"
certificate = "issued"
issuer = "root"
subject = { organization = "Example Devices AB", common_name = "Example Devices CA" }
backup = "backup-1"

[[log_key]]
name = "log-1"
origin = "spp.example/demo"
backup = "backup-1"

[[master_key]]
name = "master-1"
version = 1
prf = "hmac-sha-256"
backup = "backup-1"

[access_ca]
name = "access"
subject = { organization = "Example Devices AB", common_name = "Example Access CA" }
backup = "backup-1"
TOML
run sppctl ceremony plan ceremony.toml --hsm hsm.toml --out keys
run sppctl ceremony run ceremony.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2
run sppctl ceremony verify keys/transcript.txt --log keys/log-1.vkey | tail -n 1
run openssl verify -x509_strict -CAfile keys/root-ca.pem keys/manufacturer-ca.pem
openssl x509 -in keys/manufacturer-ca.pem -out manufacturer.pem
mkdir -p media/o-1 media/o-2 media/o-3
for o in o-1 o-2 o-3; do mv "keys/backup-1-$o.share" "media/$o/"; done

part 'An offline root'
cat >gateways.toml <<'TOML'
[[signing_key]]
name = "gateways"
kind = "p256"
certificate = "csr"
subject = { organization = "Example Devices AB", common_name = "Example Gateways CA" }
TOML
run sppctl ceremony run gateways.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2
mkdir offline-root
run openssl req -x509 -sha384 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -keyout offline-root/root.key \
    -out offline-root/root.pem -subj '/O=Example Devices AB/CN=Example Offline Root' -days 7300
run openssl x509 -req -sha384 -in keys/gateways.csr.pem -CA offline-root/root.pem -CAkey offline-root/root.key \
    -copy_extensions copyall -days 3650 -out offline-root/answer.pem
cat >import.toml <<'TOML'
[[import_certificate]]
key = "gateways"
file = "offline-root/answer.pem"
root = "offline-root/root.pem"
TOML
run sppctl ceremony plan import.toml --hsm hsm.toml --out keys
run sppctl ceremony run import.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2
run openssl verify -CAfile offline-root/root.pem keys/gateways-ca.pem

part 'Stores, first certificates, start'
run sppctl init --config sppd.toml
run sppctl server enroll --config sppd.toml --dns localhost --ip 127.0.0.1 --out tls/server
run sppctl officer enroll o-1 --config sppd.toml --out tls/o-1
run sppctl officer enroll o-2 --config sppd.toml --out tls/o-2
run sppd --config sppd.toml --check
start

part 'Callers'
run sppctl request --out station/tls
run sppctl station enroll line-1/a --csr station/tls/request.pem --days 90 "${o1[@]}" --out answer
cp answer/certificate.pem answer/ca.pem station/tls/
run sppctl auditor enroll x-1 "${o1[@]}" --out tls/auditor
run sppctl monitor enroll m-1 "${o1[@]}" --out tls/monitor
run sppctl station list "${o1[@]}"
run sppctl renew --server "$line" --tls station/tls --within 30d
run sppctl renew --server "$officer" --tls tls/o-2
run sppctl officer list "${o1[@]}"
refused 'may not call' sppctl station list --server "$officer" --tls tls/monitor
refused 'not of an officer' sppctl approvals request quota line-1/a --devices-total 5 --server "$officer" --tls tls/auditor

part 'A quota, and more of it'
provision 3 devices manufacturer.pem
refused 'has begun 3 devices' provision 4 devices manufacturer.pem
run sppctl approvals request quota line-1/a --devices-per-hour 1200 --devices-total 100 "${o1[@]}"
run sppctl approvals list "${o1[@]}"
refused 'nothing was done' sppctl approvals approve "$(sppctl approvals list "${o1[@]}" | awk '$2 == "pending" { print $1 }')" "${o2[@]}"
approve
sed -i 's/^devices_total = 3/devices_total = 100/' sppd.toml
run sppctl reload "${o1[@]}"
provision 4 devices manufacturer.pem
run sppctl identities load --profile phone --first imei:490154203237518 --count 1000 "${o1[@]}"
run sppctl identities list "${o1[@]}"

part 'Rotation of the master key and of the signing key'
cat >rotate.toml <<'TOML'
[[rotate_master_key]]
key = "master-1"
name = "master-2"
backup = "backup-1"

[[rotate_signing_key]]
key = "manufacturer"
name = "manufacturer-2"
kind = "p256"
certificate = "issued"
issuer = "root"
subject = { organization = "Example Devices AB", common_name = "Example Devices CA 2" }
backup = "backup-1"
TOML
run sppctl ceremony plan rotate.toml --hsm hsm.toml --out keys
refused 'needs the approval' sppctl ceremony run rotate.toml --hsm hsm.toml --out keys --officer o-1
run sppctl approvals request ceremony rotate.toml --valid-for 2h "${o1[@]}"
approve
run sppctl ceremony run rotate.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2 "${o1[@]}"
refused 'hsm.keys: cannot be changed while the daemon runs' sppctl reload "${o1[@]}"
sed -i 's/"master-1"/"master-2"/; s/^issuer = "manufacturer"/issuer = "manufacturer-2"/' profiles/*.toml
stop
run sppd --config sppd.toml --check
start
provision 2 devices-2 keys/manufacturer-2-ca.pem
for one in devices:manufacturer devices-2:manufacturer-2; do
    files=("${one%:*}"/*.flash)
    chip=$(basename -- "${files[0]}" .flash)
    run spp-line show --chip "$chip" --server "$public" --ca tls/server/ca.pem --certificate-out "$chip.pem"
    run openssl verify -CAfile keys/root-ca.pem -untrusted "keys/${one#*:}-ca.pem" "$chip.pem"
done
run sppctl registry verify --config sppd.toml

part 'Check values, and the end of a retired key'
cat >check.toml <<'TOML'
[[check_value]]
key = "master-2"

[[check_value]]
key = "manufacturer"
TOML
run sppctl ceremony run check.toml --hsm hsm.toml --out keys --officer o-1
fingerprint=$(openssl x509 -in manufacturer.pem -noout -pubkey | openssl pkey -pubin -outform der | sha256sum | cut -d ' ' -f 1)
cat >destroy.toml <<TOML
[[destroy]]
key = "manufacturer"
fingerprint = "sha256:$fingerprint"
TOML
run sppctl ceremony plan destroy.toml --hsm hsm.toml --out keys
run sppctl approvals request ceremony destroy.toml "${o1[@]}"
approve
run sppctl ceremony run destroy.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2 "${o1[@]}"
stop
start
# Certificates signed by the destroyed key still verify.
run sppctl registry verify --config sppd.toml

part 'Revocation'
run sppctl station revoke line-1/a --reason 'stolen on 26 November' "${o1[@]}"
approve
refused 'is revoked' provision 3 devices-2 keys/manufacturer-2-ca.pem
run sppctl request --out station/tls-2
refused 'approvals request enroll station line-1/a' sppctl station enroll line-1/a --csr station/tls-2/request.pem "${o1[@]}" --out answer-2
run sppctl approvals request enroll station line-1/a --csr station/tls-2/request.pem "${o1[@]}"
approve
run sppctl station enroll line-1/a --csr station/tls-2/request.pem "${o1[@]}" --out answer-2
cp answer-2/certificate.pem answer-2/ca.pem station/tls-2/
station=station/tls-2
# The new certificate begins in the second after the revocation.
sleep 2
provision 3 devices-2 keys/manufacturer-2-ca.pem

part 'Reports'
run sppctl report production "${o1[@]}"
run sppctl device show "$chip" --config sppd.toml "${o1[@]}"
run sppctl sessions list "${o1[@]}"

part 'The audit log'
run sppctl audit tail --config sppd.toml -n 5
run sppctl audit show 1 --config sppd.toml
run sppctl audit export --config sppd.toml --format csv --out audit.csv
run sppctl audit verify --config sppd.toml
mkdir auditor
run sppctl audit fetch --out auditor/audit --server "$officer" --tls tls/auditor
stop
cp audit/audit.jsonl auditor/audit/audit.jsonl
run sppctl registry export mirror --config sppd.toml
cp -R mirror keys/log-1.vkey keys/access-ca.pem auditor/
run sppctl audit verify --directory auditor/audit --log auditor/mirror --key auditor/log-1.vkey --access-ca auditor/access-ca.pem
run sppctl audit tail --directory auditor/audit -n 2
head -n 20 audit/audit.jsonl >auditor/audit/audit.jsonl
refused 'are missing' sppctl audit verify --directory auditor/audit --log auditor/mirror --key auditor/log-1.vkey
mv audit audit.whole
mkdir audit
head -n 20 audit.whole/audit.jsonl >audit/audit.jsonl
refused 'was truncated or changed' sppd --config sppd.toml
refused 'was truncated or changed' sppd --config sppd.toml
rm -r audit
mv audit.whole audit

part 'Another token'
run "$source/softhsm-setup/setup.sh" --dir hsm-b --label spp-demo --sppctl "$bin/sppctl"
sed 's/"hsm"/"hsm-b"/; s#hsm/user.pin#hsm-b/user.pin#' hsm.toml >hsm-b.toml
: >restore.toml
for key in root manufacturer-2 access log-1 master-2; do
    cat >>restore.toml <<TOML
[[restore]]
file = "keys/$key.backup"
shares = ["media/o-1/backup-1-o-1.share", "media/o-3/backup-1-o-3.share"]

TOML
done
run sppctl ceremony plan restore.toml --hsm hsm-b.toml --out keys-b
run sppctl ceremony run restore.toml --hsm hsm-b.toml --out keys-b --officer o-1 --officer o-3
run sppctl ceremony verify keys-b/transcript.txt --log keys/log-1.vkey | tail -n 1
sed 's/^directory = "hsm"/directory = "hsm-b"/; s#"hsm/user.pin"#"hsm-b/user.pin"#; s#"keys/#"keys-b/#' sppd.toml >sppd-b.toml
start sppd-b.toml
provision 4 devices-2 keys/manufacturer-2-ca.pem
run sppctl pool status "${o1[@]}"
stop
run sppctl audit verify --config sppd-b.toml
