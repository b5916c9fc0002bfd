#!/bin/sh
# Tests the public pages of a running daemon in a browser without JavaScript.
# `make pages` starts the daemon (deploy/demo/demo.sh) and sets SPP_DIRECTORY, SPP_LINE, SPP_PUBLIC and SPP_BIN.
# Screenshots go to SPP_SCREENSHOTS, by default to SPP_DIRECTORY/pages/screenshots.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
work=$SPP_DIRECTORY/pages
server=$SPP_DIRECTORY/tls/server
vkey=$SPP_DIRECTORY/keys/log-1.vkey

for program in chromium chromedriver; do
    command -v "$program" >/dev/null && continue
    echo "run.sh: $program is missing. As root, run: apt-get install -y chromium chromium-driver" >&2
    exit 1
done

mkdir -p -- "$work"
"$SPP_BIN/spp-line" provision --simulate 6 --parallel 3 --profile phone \
    --server "https://$SPP_LINE" --tls "$SPP_DIRECTORY/tls/line-1-a" --log "$vkey" \
    --devices "$work/devices" --manufacturer "$SPP_DIRECTORY/keys/manufacturer-ca.pem" --report "$work/report.csv"

# The chip_id of the last device in the report, in any column order.
chip=$(awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "chip_id") column = i }
                NR > 1 && column { gsub(/["\r]/, "", $column); chip = $column }
                END { print chip }' "$work/report.csv")
[ -n "$chip" ] || { echo "run.sh: no chip ID found in $work/report.csv" >&2; exit 1; }

"$SPP_BIN/spp-line" show --chip "$chip" --server "https://$SPP_PUBLIC" --ca "$server/ca.pem" --json \
    >"$work/expected.json"

PYTHONPATH=$here/../clients python3 "$here/person.py" --url "https://$SPP_PUBLIC" \
    --ca "$server/ca.pem" --certificate "$server/certificate.pem" --vkey "$vkey" \
    --expected "$work/expected.json" --screenshots "${SPP_SCREENSHOTS:-$work/screenshots}"
