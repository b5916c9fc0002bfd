#!/bin/sh
# Certificates under a foreign lint: pkilint (RFC 5280 and relatives), which must find nothing but what is known to be
# false or chosen. Usage: pkilint.sh FILE... (PEM or DER); lint_pkix_cert is found by PATH.
set -eu

if ! command -v lint_pkix_cert >/dev/null; then
    echo 'pkilint.sh: lint_pkix_cert is missing; install it with: pip install pkilint==0.13.3' >&2
    exit 1
fi
for file in "$@"; do
    # Its exit status counts the findings, also those that are allowed here: only its output is judged.
    findings=$(lint_pkix_cert lint -s WARNING -f JSON "$file") || [ -n "$findings" ]
    printf '%s' "$findings" | python3 -c '
import json, sys

def allowed(finding):
    # RFC 7254 names exactly such URNs; pkilint takes the part behind "imei:" for a host and port.
    false_alarm = finding["code"] == "pkix.invalid_uri_syntax" and "urn:gsma:imei:" in finding.get("message", "")
    # 802.1AR-2018 Table 8-2 recommends against the identifier in device certificates, RFC 5280 for it; the profile decides.
    chosen = finding["code"] == "pkix.certificate_skid_end_entity_missing"
    return false_alarm or chosen

results = json.load(sys.stdin)["results"]
found = [(result["node_path"], finding) for result in results for finding in result["finding_descriptions"]]
wrong = [(place, finding) for place, finding in found if not allowed(finding)]
for place, finding in wrong:
    print("  ", finding["severity"], finding["code"], finding.get("message", ""), "at", place)
known = len(found) - len(wrong)
name = sys.argv[1]
print(f"pkilint: {name}:", f"{len(wrong)} findings" if wrong else f"clean ({known} known findings)")
sys.exit(1 if wrong else 0)
' "$file"
done
