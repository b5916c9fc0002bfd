#!/bin/sh
# Fails if a crate depends on what it must not depend on: see "The workspace" in docs/architecture.md.
set -eu
cd "$(dirname "$0")/.."

# check EDGES CRATE FORBIDDEN [cargo arguments]: EDGES as in cargo tree, FORBIDDEN an extended regular expression for package names.
check_edges() {
    edges=$1 crate=$2 forbidden=$3
    shift 3
    # Not piped: the status of cargo would be lost, and nothing be found.
    tree=$(cargo tree --locked --edges "$edges" --prefix none --format '{p}' "$@" --package "$crate")
    if echo "$tree" | sed 1d | grep --extended-regexp "^($forbidden) v"; then
        echo "check-dependencies: $crate must not depend on the packages above" >&2
        exit 1
    fi
}

check() { check_edges normal "$@"; }

# With what their tests use: none of these needs an HSM or the core.
check_tests() { check_edges normal,dev "$@"; }

check spp-format 'spp|spp-.*|tokio|tonic|sled|cryptoki'
check spp-device 'spp|spp-(line|log|program|proto|test.*)|tokio|tonic|sled|cryptoki'
check spp-proto 'spp|spp-.*|sled|cryptoki|axum'
check spp-log 'spp|spp-(device|line|program|proto|test.*)|tonic|axum|sled|cryptoki'
check spp-line 'spp|spp-test.*|axum|sled|cryptoki'
check spp-program 'spp|spp-.*|tokio|tonic|axum|sled|cryptoki'
check spp 'spp-(device|line|test.*)'
check spp-fuzz 'spp|spp-(line|log|proto)|tonic|axum|sled|cryptoki' --manifest-path fuzz/Cargo.toml

check_tests spp-format 'spp|spp-testkit|sled|cryptoki'
check_tests spp-device 'spp|spp-testkit|sled|cryptoki'
check_tests spp-log 'spp|spp-testkit|sled|cryptoki'
check_tests spp-line 'spp|spp-testkit|sled|cryptoki'
