#!/usr/bin/env bash
# Runs each fuzz target for SECONDS_EACH seconds (default 30) and prints the result; TARGETS="a b" selects targets. Uses stable Rust
# without AddressSanitizer: the code has no unsafe parts; the targets find panics, hangs, memory growth and violated assertions.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
seconds=${SECONDS_EACH:-${1:-30}}
tools=$PWD/target/tools/bin
PATH=$tools:$PATH

command -v cargo-fuzz >/dev/null || {
    echo 'fuzz: building cargo-fuzz into target/tools' >&2
    cargo install --quiet cargo-fuzz --version 0.13.2 --locked --debug --root target/tools
}
command -v c++ >/dev/null || { echo 'fuzz: libFuzzer requires a C++ compiler; as root, run: apt-get install -y g++' >&2; exit 1; }

# Write valid samples as seeds.
SPP_WRITE_SEEDS=1 cargo test --quiet --locked --test integration parsers::samples_accepted_by_their_parser >/dev/null
cargo fuzz build --sanitizer none >&2
targets=${TARGETS:-$(cargo fuzz list)}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
printf '%-20s %12s %10s %10s %8s  %s\n' target executions per_second coverage corpus result
for target in $targets; do
    mkdir -p "fuzz/corpus/$target" "fuzz/regressions/$target"
    result=ok
    cargo fuzz run --sanitizer none "$target" "fuzz/corpus/$target" "fuzz/regressions/$target" -- \
        -max_total_time="$seconds" -max_len=70000 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 >"$log" 2>&1 || result=FAILED
    value() { awk -v name="$1" '$1 == "stat::" name ":" { print $2 }' "$log"; }
    coverage=$(awk '{ for (i = 1; i < NF; i++) if ($i == "cov:") c = $(i + 1) } END { print c }' "$log")
    printf '%-20s %12s %10s %10s %8s  %s\n' "$target" "$(value number_of_executed_units)" \
        "$(value average_exec_per_sec)" "$coverage" "$(find "fuzz/corpus/$target" -type f | wc -l)" "$result"
    if [ "$result" != ok ]; then
        status=1
        tail -n 20 "$log" >&2
        echo "fuzz: save the finding: cp fuzz/artifacts/$target/FILE fuzz/regressions/$target/; the test suite runs it from then on" >&2
    fi
done
exit "$status"
