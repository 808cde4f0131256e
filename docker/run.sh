#!/bin/bash
# Start a run, follow its log to the end, and fail unless it completed. Arguments are run config
# keys, which win over the demo's:   docker-compose run --rm run rounds=20 'max-in-flight=1'
set -euo pipefail
connection=${CONNECTION:-federation}
folder=/runs/demo-$(date +%Y%m%d-%H%M%S)
config="output-dir=\"$folder\" run-name=\"demo\" min-clients=3 client-keys=\"${CLIENT_KEYS:-bind}\" $DEMO_CONFIG"
flwr run /app "$connection" --stream --run-config "$config" ${1:+--run-config "$*"}
flwr ls "$connection" --format json | python3 -c '
import json, sys
run = max(json.load(sys.stdin)["runs"], key=lambda run: run["pending-at"])
print("Run", run["run-id"], "is", run["status"])
sys.exit(run["status"] != "finished:completed")'
