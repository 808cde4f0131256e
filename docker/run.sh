#!/bin/bash
# Start a run, follow its log, and fail unless it completed. Arguments are run config keys, which win
# over the demo's:   docker-compose run --rm run rounds=20 'max-in-flight=1'
# To go on with one: docker-compose run --rm run 'resume-from="/runs/X"' 'output-dir="/runs/X"'
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; fi
connection=${CONNECTION:-federation}
folder=/runs/demo-$(date +%Y%m%d-%H%M%S)
for setting in "$@"; do
    if [[ $setting == output-dir=* ]]; then folder=$(tr -d '"' <<<"${setting#*=}"); fi
done
config="output-dir=\"$folder\" run-name=\"demo\" min-clients=3 client-keys=\"${CLIENT_KEYS:-bind}\" $DEMO_CONFIG"
flwr run /app "$connection" --stream --run-config "$config" ${1:+--run-config "$*"} || true
while true; do  # the log's stream may break off before the run ends, and its exit status says nothing
    status=$(flwr ls "$connection" --format json | python3 -c '
import json, sys
print(max(json.load(sys.stdin)["runs"], key=lambda run: run["pending-at"])["status"])')
    case $status in
        finished:completed) echo "The run is completed: $folder"; exit 0 ;;
        finished:*) echo "The run is $status: $folder" >&2; exit 1 ;;
    esac
    sleep 5
done
