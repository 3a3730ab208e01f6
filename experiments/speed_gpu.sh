#!/usr/bin/env bash
# The GPU rows of the page on speed, on a machine with a GPU and torch, torchvision and timm: installs what else the package
# needs (from the folder WHEELS if the machine has no network), measures, and leaves speed_gpu.json in the folder $1.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-experiments/results}"
python -c "import basd, fastcore, pydantic, yaml, sklearn, safetensors" 2>/dev/null ||
  python -m pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"} fastcore fastprogress pydantic pyyaml scikit-learn safetensors matplotlib
PYTHONPATH="$PWD" timeout 470 python experiments/speed.py --rows gpu --out "$out/speed_gpu.json"
