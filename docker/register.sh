#!/bin/bash
# Admit the participants: one public key and one name each. Repeating it changes nothing.
set -euo pipefail
for key in /certs/supernodes/*.pub; do
    name=$(basename "$key" .pub)
    if said=$(flwr supernode register "$key" "${CONNECTION:-federation}" --name "$name" 2>&1); then
        echo "registered $name"
    elif grep -qi "already in use" <<<"$said"; then
        echo "$name is registered already"
    else
        echo "$said" >&2
        exit 1
    fi
done
