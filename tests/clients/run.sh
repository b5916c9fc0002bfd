#!/bin/sh
# Runs the third-party client against a running daemon, then checks the certificates with pkilint.
# `make foreign-client` starts the daemon (deploy/demo/demo.sh) and sets SPP_DIRECTORY, SPP_LINE and SPP_PUBLIC.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
certificates=$SPP_DIRECTORY/certificates
mkdir -p -- "$certificates"

PYTHONPATH=$here python3 -m unittest test_device test_receipt

provision() {
    echo "-- provision.py $*"
    python3 "$here/provision.py" --line "$SPP_LINE" --public "$SPP_PUBLIC" --tls "$SPP_DIRECTORY/tls/line-1-a" \
        --manufacturer "$SPP_DIRECTORY/keys/manufacturer-ca.pem" --log-key "$SPP_DIRECTORY/keys/log-1.vkey" "$@"
}
provision --profile phone --certificate-out "$certificates/phone.pem"
provision --profile phone --sealed --certificate-out "$certificates/phone-sealed.pem"
provision --profile gateway --csr --certificate-out "$certificates/gateway.pem"
provision --profile sensor --sealed --certificate-out "$certificates/sensor.cwt"

"$here/../certificates/pkilint.sh" "$SPP_DIRECTORY/keys/manufacturer-ca.pem" "$certificates"/*.pem
