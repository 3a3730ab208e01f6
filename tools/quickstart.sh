#!/usr/bin/env bash
# Set up if need be, then run the quickstart: a small teacher, and the same student taught by labels alone and by BASD.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
exec torchrun --nproc_per_node=1 -m basd train quickstart "$@"
