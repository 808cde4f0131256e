#!/bin/bash
# Show the newest run, or the one that is named.
set -euo pipefail
exec mh-pfedhn show "${1:-$(ls -td /runs/*/ | head -n 1)}"
