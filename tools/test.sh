#!/usr/bin/env bash
# Set up if need be, then everything that must hold: notebooks and package in step and clean, every notebook's
# tests, the tests that need processes, the docs with every link resolved, README equal to index.ipynb.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
python -m pip check & check=$!
unset PYTHONDONTWRITEBYTECODE           # or each process that imports torch would compile it
# compile most of what the tests import on the core that the export leaves idle
python -c "import torch, torchvision, timm, torchmetrics, sklearn.linear_model, scipy.stats, matplotlib.pyplot" & compiled=$!

before=$(git status --porcelain)
nbdev_export
nbdev_clean
wait "$compiled"
wait "$check" || { echo "pip check has found what does not fit together, see above"; exit 1; }
[ "$(git status --porcelain)" = "$before" ] || {
  git status --short; echo "notebooks and package are out of step: run nbdev_export and nbdev_clean, and commit"; exit 1
}

python tools/test_lanes.py
[ "$(git status --porcelain)" = "$before" ] || {
  git status --short; echo "README.md and index.ipynb are out of step: run python tools/docs.py, and commit"; exit 1
}
echo "all is well"
