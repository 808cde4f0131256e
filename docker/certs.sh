#!/bin/bash
# Make the secrets that are missing, and hand out copies: nobody holds one that it has no use for.
set -euo pipefail
mh-pfedhn certs /certs "$@"
cd /certs/server
install -m 0644 -t /certs/gateway ca.crt server.crt
install -m 0600 -t /certs/gateway server.key
install -m 0644 -t /certs/host ca.crt
install -m 0600 -t /certs/host superexec.secret
install -m 0644 -t /certs/operator ca.crt
install -m 0644 -D -t /certs/operator/supernodes supernodes/*.pub
